"""Capacity by hand: Megatron's C, and who is dropped when it is exceeded."""

import math

import numpy as np
import pytest

from router.assignment import UNUSED, Assignment
from router.candidates import Candidates
from router.capacity import Capacity
from router.context import RouteContext


def limit(capacity: Capacity, ids_TK: list[list[int]], weights_TK: list[list[float]], sources: list[int]) -> Assignment:
    """Drop from an assignment of two experts on two ranks."""
    ids, weights = np.array(ids_TK), np.array(weights_TK, dtype=np.float32)
    assignment = Assignment(
        ids_TK=ids,
        scores_TK=weights,
        weights_TK=weights,
        kept_TK=ids != UNUSED,
        rerouted_TK=np.zeros_like(ids, dtype=bool),
    )
    candidates = Candidates(
        ids_TC=ids, probs_TC=weights, source_rank_T=np.array(sources), experts=2, score_kind="softmax"
    )
    return capacity.limit(assignment, candidates, RouteContext(layer=0, ranks=2, renormalise=False))


@pytest.mark.parametrize(
    ("factor", "tokens", "k", "experts", "pairs"),
    [
        (1.0, 8, 2, 4, 4),  # 8 * 2 / 4
        (1.25, 64, 2, 16, 10),  # 1.25 * 8
        (1.5, 10, 2, 8, 4),  # 1.5 * 2.5 = 3.75
        (0.5, 3, 1, 8, 1),  # .1875: a part of a pair is one pair
        (2.0, 4, 2, 4, 4),  # as many as there are tokens: no expert can get more
        (1.0, 0, 2, 4, 0),
        (1.1, 100, 1, 10, 11),  # 10 * 1.1 = 11 exactly; 1.1 * 100 / 10 would be 11.000000000000002
        (1.1, 1000, 1, 10, 111),  # 100 * 1.1 = 110.00000000000001: Megatron's own rounding, kept as it is
    ],
)
def test_pairs_per_expert_as_megatron_counts(factor: float, tokens: int, k: int, experts: int, pairs: int) -> None:
    assert Capacity(factor=factor).pairs_per_expert(tokens, k, experts) == pairs
    # megatron/core/transformer/moe/moe_utils.py get_capacity, called with num_tokens = T_local * k
    assert pairs == math.ceil((tokens * k / experts) * factor)


def test_drop_by_position_keeps_the_earlier_tokens() -> None:
    # C = ceil(1 * 4 * 1 / 2) = 2 of expert 0's four pairs.
    kept = limit(Capacity(factor=1.0, drop="position"), [[0]] * 4, [[0.5], [0.9], [0.6], [0.8]], [0] * 4)
    assert kept.kept_TK[:, 0].tolist() == [True, True, False, False]


def test_drop_by_probs_keeps_the_larger_weights() -> None:
    kept = limit(Capacity(factor=1.0, drop="probs"), [[0]] * 4, [[0.5], [0.9], [0.6], [0.8]], [0] * 4)
    assert kept.kept_TK[:, 0].tolist() == [False, True, False, True]


def test_equal_weights_keep_the_earlier_token() -> None:
    kept = limit(Capacity(factor=1.0, drop="probs"), [[0]] * 4, [[0.5], [0.7], [0.5], [0.5]], [0] * 4)
    assert kept.kept_TK[:, 0].tolist() == [True, True, False, False]


def test_each_source_rank_has_a_capacity_of_its_own() -> None:
    # Two tokens a rank: C = ceil(1 * 2 * 1 / 2) = 1 on each. Over all four, C = 2.
    weights = [[0.8], [0.9], [0.1], [0.2]]
    sources = [0, 0, 1, 1]
    by_rank = limit(Capacity(factor=1.0, drop="probs", scope="source_rank"), [[0]] * 4, weights, sources)
    assert by_rank.kept_TK[:, 0].tolist() == [False, True, False, True]
    everywhere = limit(Capacity(factor=1.0, drop="probs", scope="global"), [[0]] * 4, weights, sources)
    assert everywhere.kept_TK[:, 0].tolist() == [True, True, False, False]


def test_a_rank_with_fewer_tokens_has_less_capacity() -> None:
    # Rank 0: ceil(3 / 2) = 2; rank 1: ceil(1 / 2) = 1.
    kept = limit(Capacity(factor=1.0, drop="position"), [[0]] * 4, [[0.5]] * 4, [0, 0, 0, 1])
    assert kept.kept_TK[:, 0].tolist() == [True, True, False, True]


def test_position_goes_token_by_token_and_probs_by_weight() -> None:
    # C = ceil(.5 * 2 * 2 / 2) = 1 an expert. Token 0 wants 1 then 0, token 1 wants 0 then 1.
    ids, weights = [[1, 0], [0, 1]], [[0.6, 0.4], [0.7, 0.3]]
    by_position = limit(Capacity(factor=0.5, drop="position"), ids, weights, [0, 0])
    assert by_position.kept_TK.tolist() == [[True, True], [False, False]]  # its second choice too
    by_weight = limit(Capacity(factor=0.5, drop="probs"), ids, weights, [0, 0])
    assert by_weight.kept_TK.tolist() == [[True, False], [True, False]]  # .6 > .3 and .7 > .4


def test_dropped_pairs_weigh_nothing_and_the_others_what_they_did() -> None:
    kept = limit(Capacity(factor=0.5, drop="probs"), [[1, 0], [0, 1]], [[0.6, 0.4], [0.7, 0.3]], [0, 0])
    np.testing.assert_allclose(kept.weights_TK, [[0.6, 0], [0.7, 0]])
    np.testing.assert_allclose(kept.scores_TK, [[0.6, 0.4], [0.7, 0.3]])
    assert kept.ids_TK.tolist() == [[1, 0], [0, 1]]
    assert kept.chosen_TK.all()


def test_unused_pairs_fill_nobodys_capacity() -> None:
    # C = ceil(1 * 2 * 2 / 2) = 2 pairs of expert 0; three unused pairs come first in the queue.
    kept = limit(Capacity(factor=1.0, drop="position"), [[UNUSED, UNUSED], [UNUSED, 0]], [[0, 0], [0, 0.5]], [0, 0])
    assert kept.kept_TK.tolist() == [[False, False], [False, True]]


def test_a_limit_above_the_tokens_drops_none() -> None:
    # C = ceil(2 * 4 * 1 / 2) = 4, and no expert can get more than one pair a token.
    assert limit(Capacity(factor=2.0), [[0]] * 4, [[0.5]] * 4, [0] * 4).kept_TK.all()


def test_limits_add_up_when_applied_twice() -> None:
    once = limit(Capacity(factor=1.0, drop="position"), [[0]] * 4, [[0.5]] * 4, [0] * 4)
    candidates = Candidates(
        ids_TC=once.ids_TK,
        probs_TC=once.scores_TK,
        source_rank_T=np.zeros(4, dtype=np.int64),
        experts=2,
        score_kind="softmax",
    )
    context = RouteContext(layer=0, ranks=2, renormalise=False)
    # C = ceil(.5 * 4 / 2) = 1 of the two that were left.
    twice = Capacity(factor=0.5, drop="position").limit(once, candidates, context)
    assert twice.kept_TK[:, 0].tolist() == [True, False, False, False]

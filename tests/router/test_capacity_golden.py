"""Capacity by hand: the places of each rule, who gets them, and who goes where when they run out."""

import math

import numpy as np
import pytest

from router.assignment import UNUSED, Assignment
from router.candidates import Candidates
from router.capacity import Capacity, Limit
from router.context import RouteContext
from router.policies.base import assign
from router.policies.capacity_aware import CapacityAware
from router.prices import RoutePrices
from traces.errors import InputError


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


@pytest.mark.parametrize(
    ("factor", "tokens", "k", "experts", "align", "pairs"),
    [
        (1.25, 10, 2, 4, 1, 6),  # 2 * int(1.25 * 3): 10 tokens on 4 experts are 3 each, rounded up first
        (1.25, 10, 2, 4, 4, 8),  # 6, up to a multiple of 4
        (1.0, 8, 2, 4, 1, 4),  # 2 * 2
        (0.4, 8, 1, 4, 1, 0),  # int(.8): rounded down, to nothing
        (0.4, 8, 1, 4, 4, 0),  # and 0 is a multiple of 4
        (1.0, 0, 2, 4, 1, 0),
    ],
)
def test_pairs_per_expert_as_tutel_counts(
    factor: float, tokens: int, k: int, experts: int, align: int, pairs: int
) -> None:
    capacity = Capacity(factor=factor, rule="tutel", align=align)
    assert capacity.pairs_per_expert(tokens, k, experts) == pairs


@pytest.mark.parametrize(
    ("factor", "fullest", "align", "pairs"),
    [
        (0.0, 7, 1, 7),  # as many as the fullest expert has
        (0.0, 7, 4, 8),
        (-1.0, 7, 1, 6),  # at most 2 * int(1 * ceil(10 / 4)) = 6
        (-1.0, 5, 1, 5),
        (-1.0, 5, 2, 6),
        (-0.5, 5, 1, 2),  # 2 * int(1.5)
    ],
)
def test_tutel_follows_the_fullest_expert(factor: float, fullest: int, align: int, pairs: int) -> None:
    capacity = Capacity(factor=factor, rule="tutel", align=align)
    assert capacity.places(tokens=10, k=2, experts=4, fullest_P=[fullest]) == (pairs,)


@pytest.mark.parametrize(
    ("factor", "tokens", "k", "experts", "by_pass"),
    [
        (1.5, 10, 2, 4, (3, 3)),  # int(1.5 * 2.5) in each of two passes
        (1.0, 8, 3, 4, (2, 2, 2)),
        (1.0, 11, 1, 4, (2,)),  # int(2.75)
        (1.0, 0, 2, 4, (0, 0)),
    ],
)
def test_places_by_pass_as_megablocks_counts(
    factor: float, tokens: int, k: int, experts: int, by_pass: tuple[int, ...]
) -> None:
    capacity = Capacity(factor=factor, rule="megablocks")
    assert capacity.places(tokens, k, experts) == by_pass
    assert capacity.pairs_per_expert(tokens, k, experts) == sum(by_pass)


def test_every_rule_aligns() -> None:
    assert Capacity(factor=1.25, align=4).pairs_per_expert(64, 2, 16) == 12  # 10
    assert Capacity(factor=1.5, rule="megablocks", align=4).pairs_per_expert(10, 2, 4) == 8  # 3 in each of 2 passes


def test_tutel_with_factor_0_pads_every_rank_to_the_fullest_and_drops_none() -> None:
    # Expert 0 has three pairs of rank 0, and expert 1 one of rank 1.
    ids, weights, sources = [[0], [0], [0], [1]], [[0.5]] * 4, [0, 0, 0, 1]
    capacity = Capacity(factor=0.0, rule="tutel")
    assert limit(capacity, ids, weights, sources).kept_TK.all()
    assert places_of(capacity, ids, weights, sources) == (3, 3)
    # Bounded by 1 * int(1 * ceil(3 / 2)) = 2 on rank 0, by int(ceil(1 / 2)) = 1 on rank 1.
    bounded = Capacity(factor=-1.0, rule="tutel", drop="position")
    assert limit(bounded, ids, weights, sources).kept_TK[:, 0].tolist() == [True, True, False, True]
    assert places_of(bounded, ids, weights, sources) == (2, 1)


def test_megablocks_gives_each_choice_places_of_its_own() -> None:
    # int(1 * 2 / 2) = 1 place a pass. Both want 0 first and 1 second: one of each is dropped. In one queue with two
    # places, as Megatron has, all would fit; so would a first and a second choice of one expert here.
    same = limit(Capacity(factor=1.0, rule="megablocks"), [[0, 1], [0, 1]], [[0.6, 0.4], [0.7, 0.3]], [0, 0])
    assert same.kept_TK.tolist() == [[False, True], [True, False]]
    crossed = limit(Capacity(factor=1.0, rule="megablocks"), [[0, 1], [1, 0]], [[0.6, 0.4], [0.7, 0.3]], [0, 0])
    assert crossed.kept_TK.all()
    assert limit(Capacity(factor=1.0), [[0, 1], [0, 1]], [[0.6, 0.4], [0.7, 0.3]], [0, 0]).kept_TK.all()


def test_megablocks_drops_none_where_its_capacity_is_nothing() -> None:
    # int(1 * 1 / 2) = 0: one token of its rank, and the fullest expert has 1 pair in each pass.
    ids, weights = [[0, 1]], [[0.6, 0.4]]
    assert limit(Capacity(factor=1.0, rule="megablocks"), ids, weights, [0]).kept_TK.all()
    assert places_of(Capacity(factor=1.0, rule="megablocks"), ids, weights, [0]) == (2, 0)


def test_first_choices_go_before_second_ones() -> None:
    # C = ceil(.5 * 2 * 2 / 2) = 1 an expert. By position token 0 would have both.
    kept = limit(Capacity(factor=0.5, drop="first_choice"), [[1, 0], [0, 1]], [[0.6, 0.4], [0.7, 0.3]], [0, 0])
    assert kept.kept_TK.tolist() == [[True, False], [True, False]]
    # And among first choices the earlier token's, whatever its weight.
    kept = limit(Capacity(factor=0.5, drop="first_choice"), [[0, 1], [0, 1]], [[0.6, 0.4], [0.7, 0.3]], [0, 0])
    assert kept.kept_TK.tolist() == [[True, True], [False, False]]


def test_tokens_with_the_best_score_go_first() -> None:
    # C = 1. Token 1's best is .7, so that it has both; by their own weights token 0's .3 would beat its .2.
    ids, weights = [[0, 1], [0, 1]], [[0.6, 0.3], [0.7, 0.2]]
    kept = limit(Capacity(factor=0.5, drop="batch_prioritised"), ids, weights, [0, 0])
    assert kept.kept_TK.tolist() == [[False, False], [True, True]]
    assert limit(Capacity(factor=0.5), ids, weights, [0, 0]).kept_TK.tolist() == [[False, True], [True, False]]
    # A second choice of the first token waits for all first choices.
    crossed = limit(Capacity(factor=0.5, drop="batch_prioritised"), [[1, 0], [0, 1]], weights, [0, 0])
    assert crossed.kept_TK.tolist() == [[True, False], [True, False]]
    # Equal bests: the earlier token.
    equal = limit(Capacity(factor=0.5, drop="batch_prioritised"), ids, [[0.6, 0.3], [0.6, 0.4]], [0, 0])
    assert equal.kept_TK.tolist() == [[True, True], [False, False]]


def rerouted(
    capacity: Limit, scores_TC: list[list[float]], k: int, ids_TC: list[list[int]], *, renormalise: bool = False
) -> Assignment:
    """Limit the `k` best of candidates on one source rank; experts 0 and 1 lie on rank 0, the others on rank 1."""
    ids, scores = np.array(ids_TC), np.array(scores_TC, dtype=np.float32)
    experts = ids.shape[1]
    candidates = Candidates(
        ids_TC=ids,
        probs_TC=scores,
        source_rank_T=np.zeros(len(ids), dtype=np.int64),
        experts=experts,
        score_kind="softmax",
    )
    rank_E = np.minimum(np.arange(experts) // 2, 1)
    prices = RoutePrices(
        share_LEG=(rank_E[None, :, None] == np.arange(2)).astype(np.float32),
        row_s=1e-6,
        active_s=1e-6,
        hop_s_GG=np.zeros((2, 2)),
        load_s_LE=np.zeros((1, experts)),
        node_of_G=np.zeros(2, dtype=np.int64),
    )
    context = RouteContext(layer=0, ranks=2, renormalise=renormalise, prices=prices)
    assignment = assign(candidates, np.ones((len(ids), k), dtype=bool), width=k, renormalise=renormalise)
    return capacity.limit(assignment, candidates, context)


def places_of(capacity: Limit, ids_TK: list[list[int]], weights_TK: list[list[float]], sources: list[int]) -> object:
    """The places of two experts on two ranks."""
    ids, weights = np.array(ids_TK), np.array(weights_TK, dtype=np.float32)
    candidates = Candidates(
        ids_TC=ids, probs_TC=weights, source_rank_T=np.array(sources), experts=2, score_kind="softmax"
    )
    context = RouteContext(layer=0, ranks=2, renormalise=False)
    used = np.ones(ids.shape, dtype=bool)
    assignment = assign(candidates, used, width=ids.shape[1], renormalise=False)
    return capacity.places_of(assignment, candidates, context)


THREE = [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.7, 0.2, 0.1]]


@pytest.mark.parametrize(
    ("drop", "experts"),
    [
        # C = ceil(3 / 3) = 1, and all want expert 0. Round 1: the two without a place ask for 1; round 2: the one that
        # came too late asks for 2.
        ("position", [0, 1, 2]),
        ("first_choice", [0, 1, 2]),
        ("batch_prioritised", [2, 1, 0]),  # .7, .6, .5
        ("probs", [1, 2, 0]),  # .7 stays; both others have .3 of expert 1, and the earlier gets it
    ],
)
def test_rerouting_asks_in_rounds(drop: str, experts: list[int]) -> None:
    capacity = Capacity(factor=1.0, drop=drop, reroute="any")  # type: ignore[arg-type]  # one of them
    moved = rerouted(capacity, THREE, 1, [[0, 1, 2]] * 3)
    assert moved.ids_TK[:, 0].tolist() == experts
    assert moved.kept_TK.all()
    assert moved.rerouted_TK[:, 0].tolist() == [expert != 0 for expert in experts]
    expected = [THREE[token][expert] for token, expert in enumerate(experts)]
    np.testing.assert_allclose(moved.scores_TK[:, 0], expected)
    np.testing.assert_allclose(moved.weights_TK[:, 0], expected)


def test_probs_gives_a_place_to_the_larger_score_of_the_expert_asked_for() -> None:
    # C = 1. Token 2 stays on 0; token 1 asks for 1 with .35, token 0, whose first choice weighed more, with .3.
    scores = [[0.6, 0.3, 0.1], [0.5, 0.35, 0.15], [0.7, 0.2, 0.1]]
    moved = rerouted(Capacity(factor=1.0, drop="probs", reroute="any"), scores, 1, [[0, 1, 2]] * 3)
    assert moved.ids_TK[:, 0].tolist() == [2, 1, 0]


def test_same_rank_goes_next_door_only() -> None:
    # C = ceil(4 / 4) = 1. Of rank 0's two experts, 1 is every token's third candidate; one of three can have it.
    scores, ids = [[0.4, 0.3, 0.2, 0.1]] * 4, [[0, 2, 1, 3]] * 4
    moved = rerouted(Capacity(factor=1.0, drop="position", reroute="same_rank"), scores, 1, ids)
    assert moved.ids_TK[:, 0].tolist() == [0, 1, 0, 0]
    assert moved.kept_TK[:, 0].tolist() == [True, True, False, False]
    anywhere = rerouted(Capacity(factor=1.0, drop="position", reroute="any"), scores, 1, ids)
    assert anywhere.ids_TK[:, 0].tolist() == [0, 2, 1, 3]


def test_capacity_aware_expands_to_its_rank() -> None:
    scores, ids = [[0.4, 0.3, 0.2, 0.1]] * 4, [[0, 2, 1, 3]] * 4
    plain = rerouted(CapacityAware(gamma=1.0), scores, 1, ids)
    assert plain.kept_TK[:, 0].tolist() == [True, False, False, False]
    expanded = rerouted(CapacityAware(gamma=1.0, expanded=True), scores, 1, ids)
    assert expanded.ids_TK[:, 0].tolist() == [0, 1, 0, 0]
    assert expanded.kept_TK[:, 0].tolist() == [True, True, False, False]


@pytest.mark.parametrize("renormalise", [False, True])
def test_rerouted_tokens_are_weighed_anew(renormalise: bool) -> None:
    # C = ceil(.75 * 2 * 2 / 4) = 1. Both want 0 and 1; token 0 has both. Token 1's first asks for 2, and then its
    # second for 3.
    scores = [[0.4, 0.3, 0.2, 0.1], [0.5, 0.25, 0.15, 0.1]]
    capacity = Capacity(factor=0.75, drop="position", reroute="any")
    moved = rerouted(capacity, scores, 2, [[0, 1, 2, 3]] * 2, renormalise=renormalise)
    assert moved.ids_TK.tolist() == [[0, 1], [2, 3]]
    np.testing.assert_allclose(moved.scores_TK, [[0.4, 0.3], [0.15, 0.1]])
    shares = [[4 / 7, 3 / 7], [0.6, 0.4]]
    np.testing.assert_allclose(moved.weights_TK, shares if renormalise else [[0.4, 0.3], [0.15, 0.1]], rtol=1e-6)


def test_a_dropped_pair_keeps_its_share_of_a_rerouted_token() -> None:
    # C = ceil(.5 * 3 * 2 / 4) = 1; token 0 has 0 and 1, token 1 has 2. Next door to 0 is 1, full: both later tokens
    # lose their first pair. Next door to 2 is 3: token 2's second goes there, with .2 of the .4 + .2 it chose.
    scores, ids = [[0.4, 0.3, 0.2, 0.1]] * 3, [[0, 1, 2, 3], [0, 2, 3, 1], [0, 2, 3, 1]]
    capacity = Capacity(factor=0.5, drop="position", reroute="same_rank")
    moved = rerouted(capacity, scores, 2, ids, renormalise=True)
    assert moved.ids_TK.tolist() == [[0, 1], [0, 2], [0, 3]]
    assert moved.dropped_TK.tolist() == [[False, False], [True, False], [True, False]]
    assert moved.rerouted_TK.tolist() == [[False, False], [False, False], [False, True]]
    np.testing.assert_allclose(moved.weights_TK, [[4 / 7, 3 / 7], [0, 3 / 7], [0, 1 / 3]], rtol=1e-6)


@pytest.mark.parametrize(
    ("capacity", "words"),
    [
        (Capacity(factor=1.25), "cf=1.25 probs"),
        (Capacity(factor=1.0, drop="first_choice", scope="global"), "cf=1 first_choice global"),
        (Capacity(factor=0.0, rule="tutel", align=8, pad=True), "cf=0 probs tutel align 8 pad"),
        (Capacity(factor=1.25, reroute="any"), "cf=1.25 probs reroute any"),
        (CapacityAware(gamma=1.5), "capacity_aware gamma=1.5"),
        (CapacityAware(gamma=1.5, expanded=True, scope="global"), "capacity_aware gamma=1.5 expanded global"),
    ],
)
def test_what_is_unusual_is_named(capacity: Limit, words: str) -> None:
    assert capacity.describe() == words


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(InputError, match=r"factor is -1; only rule tutel takes a negative one, rule megablocks one of"):
        Capacity(factor=-1.0, rule="megablocks")
    with pytest.raises(InputError, match=r"align is 0; it must be a whole number of at least 1"):
        Capacity(factor=1.0, align=0)
    with pytest.raises(InputError, match=r"drop is 'last'; use one of position, probs, first_choice, batch_pri"):
        Capacity(factor=1.0, drop="last")  # type: ignore[arg-type]  # that is the point
    with pytest.raises(InputError, match=r"with rule tutel and factor 0, places for 64 tokens on 16 experts depend on"):
        Capacity(factor=0.0, rule="tutel").pairs_per_expert(64, 2, 16)
    with pytest.raises(InputError, match=r"gamma is -1.0; it must be a number of at least 0"):
        CapacityAware(gamma=-1.0)

"""Adjustments on steps small enough to follow by hand."""

import json
from typing import Any

import numpy as np
import pytest

from router.candidates import Candidates
from router.context import RouteContext
from router.policies.batch_set import BatchSet
from router.policies.cache_aware import CacheAware
from router.policies.hardware_aware import HardwareAware
from router.policies.opportunistic import Opportunistic
from router.policies.topology_aware import TopologyAware
from router.prices import RoutePrices
from traces.errors import InputError


def candidates_of(ids_TC: Any, probs_TC: Any, *, experts: int, source_rank_T: Any = None) -> Candidates:
    ids = np.array(ids_TC)
    return Candidates(
        ids_TC=ids,
        probs_TC=np.array(probs_TC, dtype=np.float32),
        source_rank_T=np.zeros(len(ids), dtype=np.int64) if source_rank_T is None else np.array(source_rank_T),
        experts=experts,
        score_kind="softmax",
    )


def context_of(
    rank_E: Any, *, ranks: int, row_s: float = 0.0, active_s: float = 0.0, hop_s: float = 0.0
) -> RouteContext:
    share_LEG = np.zeros((1, len(rank_E), ranks), dtype=np.float32)
    share_LEG[0, np.arange(len(rank_E)), rank_E] = 1
    prices = RoutePrices(
        share_LEG=share_LEG,
        row_s=row_s,
        active_s=active_s,
        hop_s_GG=hop_s * (1 - np.eye(ranks)),
        load_s_LE=np.zeros((1, len(rank_E))),
        node_of_G=np.zeros(ranks, dtype=np.int64),
    )
    return RouteContext(layer=0, ranks=ranks, renormalise=True, prices=prices)


def used_ids(candidates: Candidates, adjusted_TC: Any) -> list[list[int]]:
    return [ids_C[used_C].tolist() for ids_C, used_C in zip(candidates.ids_TC, adjusted_TC, strict=True)]


def test_opportunistic_keeps_what_is_read_for_someones_best() -> None:
    # Best experts: 0, 1, 3. Token 0's second, 2, is nobody's best; token 1's second, 0, is token 0's best.
    candidates = candidates_of([[0, 2], [1, 0], [3, 2]], [[0.6, 0.4]] * 3, experts=4)
    used_TC = np.ones((3, 2), dtype=np.bool_)
    context = RouteContext(layer=0, ranks=1, renormalise=True)
    adjusted_TC, _ = Opportunistic(k0=1, scope="global").adjust(used_TC, candidates, context, {})
    assert used_ids(candidates, adjusted_TC) == [[0], [1, 0], [3]]


def test_opportunistic_of_a_source_rank_knows_only_its_own_tokens() -> None:
    # As above, but token 1 is alone on rank 1, where nobody's best is expert 0.
    candidates = candidates_of([[0, 2], [1, 0]], [[0.6, 0.4]] * 2, experts=4, source_rank_T=[0, 1])
    used_TC = np.ones((2, 2), dtype=np.bool_)
    context = RouteContext(layer=0, ranks=2, renormalise=True)
    adjusted_TC, _ = Opportunistic(k0=1).adjust(used_TC, candidates, context, {})
    assert used_ids(candidates, adjusted_TC) == [[0], [1]]


def test_batch_set_takes_the_heaviest_expert_of_each_rank() -> None:
    # Rank 0 holds 0 and 1, rank 1 holds 2 and 3; half of two is one each. Mass: 0: .5 + .1, 1: .3 + .4, 2: .2 + .3,
    # 3: .2: so 1 and 2. Token 0 has 0.5 of expert 0 but gets 1 and 2; token 1 gets 1 and 2 as well.
    candidates = candidates_of([[0, 1, 2], [1, 2, 3, 0][:3]], [[0.5, 0.3, 0.2], [0.4, 0.3, 0.2]], experts=4)
    used_TC = np.array([[True, True, False]] * 2)
    context = context_of([0, 0, 1, 1], ranks=2)
    adjusted_TC, _ = BatchSet(active_share=0.5, scope="global").adjust(used_TC, candidates, context, {})
    assert used_ids(candidates, adjusted_TC) == [[1, 2], [1, 2]]


def test_batch_set_leaves_a_token_its_first_where_the_set_has_none() -> None:
    # Two tokens want 0 or 1 on rank 0, one wants 2 and 3 there: a third of four experts is one, expert 0.
    candidates = candidates_of([[0, 1], [0, 1], [2, 3]], [[0.6, 0.3]] * 3, experts=4)
    used_TC = np.ones((3, 2), dtype=np.bool_)
    adjusted_TC, _ = BatchSet(active_share=1 / 3, scope="global").adjust(
        used_TC, candidates, context_of([0, 0, 0, 0], ranks=1), {}
    )
    assert used_ids(candidates, adjusted_TC) == [[0], [0], [2]]


def test_cached_experts_win_by_the_bonus_and_protected_ones_stay() -> None:
    # Scores 1/2, 1/4, 1/16: logarithms ln 2 * (-1, -2, -4), a spread of 3 ln 2. Step one leaves experts 0 and 1 in the
    # cache of two. A new token likes 2 and 3 best; expert 0 lies 2 ln 2 under 3, so that it takes a bonus of over 2/3.
    first = candidates_of([[0, 1, 2]], [[0.5, 0.25, 0.0625]], experts=4)
    second = candidates_of([[2, 3, 0]], [[0.5, 0.25, 0.0625]], experts=4)
    used_TC = np.array([[True, True, False]])
    context = RouteContext(layer=0, ranks=1, renormalise=True)
    for bonus, protected, expected in ((0.6, 1, [2, 3]), (0.7, 1, [2, 0]), (1.0, 2, [2, 3])):
        policy = CacheAware(bonus=bonus, cache_share=0.5, protected=protected)
        _, state = policy.adjust(used_TC, first, context, {})
        adjusted_TC, state = policy.adjust(used_TC, second, context, state)
        assert used_ids(second, adjusted_TC) == [expected], (bonus, protected)
    assert (state["hits"], state["reads"]) == (0, 4)  # two experts a step, none of the second's in the cache
    as_lists = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in state.items()}
    restored = {
        key: np.array(value) if isinstance(value, list) else value
        for key, value in json.loads(json.dumps(as_lists)).items()
    }
    ours, theirs = (policy.adjust(used_TC, first, context, before) for before in (state, restored))
    np.testing.assert_array_equal(ours[0], theirs[0])
    assert ours[1]["spreads"] == theirs[1]["spreads"]


def test_the_cache_forgets_what_was_used_longest_ago() -> None:
    policy = CacheAware(bonus=1.0, cache_share=0.5)
    # Of four experts two fit: those last used in steps 5 and 4. One that was never used does not fill the cache.
    assert policy.cached(np.array([3, 5, 4, -1]), np.ones(4, dtype=np.int64), 4).tolist() == [False, True, True, False]
    assert policy.cached(np.array([-1, 5, -1, -1]), np.ones(4, dtype=np.int64), 4).tolist() == [
        False,
        True,
        False,
        False,
    ]


def test_a_far_expert_must_be_better_by_its_way() -> None:
    # Expert 0 on rank 0, expert 1 on rank 1. From rank 0 the way to 1 costs the price, from rank 1 the way to 0. The
    # second candidate has 0.8 of the best one's score: it is nearer for token 0, and wins at prices over 0.2.
    candidates = candidates_of([[1, 0], [1, 0]], [[0.5, 0.4], [0.5, 0.4]], experts=2, source_rank_T=[0, 1])
    used_TC = np.array([[True, False]] * 2)
    context = context_of([0, 1], ranks=2, hop_s=1e-6)
    for price, expected in ((0.19, [[1], [1]]), (0.21, [[0], [1]])):
        adjusted_TC, _ = TopologyAware(price=price).adjust(used_TC, candidates, context, {})
        assert used_ids(candidates, adjusted_TC) == expected


def test_an_expert_closes_where_its_weights_cost_more_than_its_tokens_lose() -> None:
    # One rank, four tokens of one expert each: three on 0, one on 1 that would lose 0.1 of its 0.5 by going to 0. Gate
    # mass 2.0; closing expert 1 loses 0.05 of it and, as weights are all the time there is, half of the time.
    ids_TC = [[0, 1], [0, 1], [0, 1], [1, 0]]
    candidates = candidates_of(ids_TC, [[0.5, 0.4]] * 4, experts=2)
    used_TC = np.array([[True, False]] * 4)
    context = context_of([0, 0], ranks=1, active_s=1e-5)
    for price, expected in ((0.09, [[0], [0], [0], [1]]), (0.11, [[0], [0], [0], [0]])):
        adjusted_TC, _ = HardwareAware(price=price, scope="global").adjust(used_TC, candidates, context, {})
        assert used_ids(candidates, adjusted_TC) == expected


def test_a_busy_rank_sends_those_away_that_lose_least() -> None:
    # Four tokens, all on expert 0 of rank 0: 4 rows. Their second, on rank 1, is nearly as good for the last two.
    probs_TC = [[0.5, 0.05], [0.5, 0.06], [0.5, 0.49], [0.5, 0.48]]
    candidates = candidates_of([[0, 1]] * 4, probs_TC, experts=2)
    used_TC = np.array([[True, False]] * 4)
    policy = HardwareAware(price=0.2, scope="global")
    adjusted_TC, _ = policy.adjust(used_TC, candidates, context_of([0, 1], ranks=2, row_s=1e-6), {})
    assert used_ids(candidates, adjusted_TC) == [[0], [0], [1], [1]]  # 2 rows each: half the time for 1.5% of the mass


def test_a_choice_that_is_worth_less_than_its_row_is_skipped_if_it_may() -> None:
    # Each token's second expert has 2% of its gate mass, and takes half of the rows.
    candidates = candidates_of([[0, 1], [1, 0]], [[0.98, 0.02]] * 2, experts=2)
    used_TC = np.ones((2, 2), dtype=np.bool_)
    context = context_of([0, 1], ranks=2, row_s=1e-6)
    for may_skip, expected in ((True, [[0], [1]]), (False, [[0, 1], [1, 0]])):
        policy = HardwareAware(price=0.5, may_skip=may_skip, scope="global")
        adjusted_TC, _ = policy.adjust(used_TC, candidates, context, {})
        assert used_ids(candidates, adjusted_TC) == expected


@pytest.mark.parametrize(
    "policy",
    [BatchSet(active_share=0.5), TopologyAware(price=0.1), HardwareAware(price=0.1)],
    ids=lambda policy: str(policy.name),
)
def test_what_needs_prices_says_so(policy: Any) -> None:
    candidates = candidates_of([[0, 1]], [[0.6, 0.4]], experts=2)
    context = RouteContext(layer=0, ranks=1, renormalise=True)
    with pytest.raises(
        InputError, match=rf"^policy {policy.name} needs a placement and prices; give the context Route"
    ):
        policy.adjust(np.array([[True, False]]), candidates, context, {})

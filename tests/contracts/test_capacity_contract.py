"""What every capacity must hold, whatever it counts, drops and reroutes, on every backend."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.assignment import UNUSED, Assignment
from router.backends import first_fitting, largest_fitting, topk
from router.candidates import Candidates
from router.capacity import Capacity, Limit
from router.context import RouteContext
from router.policies import CAPACITIES, RoutingPolicy
from router.policies.base import assign
from router.policies.capacity_aware import CapacityAware
from router.policies.top_k import TopK
from router.prices import RoutePrices
from traces.errors import InputError

RANKS = 3
RULES = ("megatron", "tutel", "megablocks")
DROPS = ("position", "probs", "first_choice", "batch_prioritised")
SCOPES = ("source_rank", "global")
REROUTES = ("none", "same_rank", "any")
BACKENDS = {"numpy": np.asarray, "torch": lambda array: torch.as_tensor(np.array(array))}

every_drop = pytest.mark.parametrize("drop", DROPS)
every_reroute = pytest.mark.parametrize("reroute", REROUTES)
every_backend = pytest.mark.parametrize("backend", sorted(BACKENDS))


def test_every_capacity_is_under_this_contract() -> None:
    moves_work_not_pairs = {"least_loaded_spill"}  # tests/router/test_spill.py
    assert set(CAPACITIES) - moves_work_not_pairs == {"capacity", "capacity_aware"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step of one layer: all candidates, which of them tokens use, where experts are, how places are counted."""

    probs_TE: Any
    used_TC: Any
    source_rank_T: Any
    experts: int
    rank_E: Any
    width: int
    renormalise: bool
    rule: Any
    scope: Any
    factor: float
    align: int

    @property
    def tokens(self) -> int:
        return int(self.probs_TE.shape[0])

    def capacity(self, drop: Any, reroute: Any = "none") -> Capacity:
        return Capacity(
            factor=self.factor, drop=drop, scope=self.scope, rule=self.rule, align=self.align, reroute=reroute
        )

    def candidates(self, backend: str = "numpy") -> Candidates:
        probs_TC, ids_TC = topk(self.probs_TE, self.probs_TE.shape[1])
        array = BACKENDS[backend]
        return Candidates(
            ids_TC=array(ids_TC),
            probs_TC=array(probs_TC),
            source_rank_T=array(self.source_rank_T),
            experts=self.experts,
            score_kind="softmax",
            null_experts=self.probs_TE.shape[1] - self.experts,
        )

    @property
    def context(self) -> RouteContext:
        share_LEG = (self.rank_E[None, :, None] == np.arange(RANKS)).astype(np.float32)
        return RouteContext(layer=0, ranks=RANKS, renormalise=self.renormalise, prices=prices_where(share_LEG))

    def before(self, backend: str = "numpy") -> Assignment:
        used_TC = BACKENDS[backend](self.used_TC)
        return assign(self.candidates(backend), used_TC, width=self.width, renormalise=self.renormalise)

    def after(self, limit: Limit, backend: str = "numpy") -> Assignment:
        return limit.limit(self.before(backend), self.candidates(backend), self.context)

    @property
    def scope_T(self) -> Any:
        return self.source_rank_T if self.scope == "source_rank" else np.zeros_like(self.source_rank_T)

    def passes(self, capacity: Capacity) -> Iterator[tuple[int, int, Any, int]]:
        """Scope, pass, which pairs queue there [T, K], and the places of an expert, counted here by hand."""
        ids_TK = self.before().ids_TK
        column_TK = np.broadcast_to(np.arange(self.width), ids_TK.shape)
        by_pass = self.rule == "megablocks"
        scopes = RANKS if self.scope == "source_rank" else 1
        for number in range(self.width if by_pass else 1):
            of_pass_TK = (column_TK == number) if by_pass else np.ones_like(ids_TK, dtype=bool)
            loads = [
                np.bincount(ids_TK[of_pass_TK & (self.scope_T == scope)[:, None] & (ids_TK != UNUSED)], minlength=1)
                for scope in range(scopes)
            ]
            for scope in range(scopes):
                tokens = int((self.scope_T == scope).sum())
                fullest = int(max(loads, key=max).max() if self.rule == "tutel" else loads[scope].max())
                places = capacity.places(tokens, self.width, self.experts, [fullest] * self.width)[0]
                yield scope, number, of_pass_TK & (self.scope_T == scope)[:, None], places


def prices_where(share_LEG: Any) -> RoutePrices:
    layers, experts, ranks = share_LEG.shape
    return RoutePrices(
        share_LEG=share_LEG,
        row_s=1e-6,
        active_s=1e-6,
        hop_s_GG=np.zeros((ranks, ranks)),
        load_s_LE=np.zeros((layers, experts)),
        node_of_G=np.zeros(ranks, dtype=np.int64),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Scores are multiples of 1/64 under 1/4, many of them equal; some tokens use fewer experts than others."""
    tokens, experts, nulls = draw(st.integers(0, 16)), draw(st.integers(1, 7)), draw(st.sampled_from([0, 0, 0, 2]))
    rule = draw(st.sampled_from(RULES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    popular_E = rng.integers(0, draw(st.sampled_from([1, 12])), experts + nulls)
    return Case(
        probs_TE=((rng.integers(1, draw(st.integers(2, 6)), (tokens, experts + nulls)) + popular_E) / 64).astype(
            np.float32
        ),
        used_TC=rng.random((tokens, experts + nulls)) < draw(st.sampled_from([0.5, 0.9, 1.0])),
        source_rank_T=np.sort(rng.integers(0, RANKS, tokens)),
        experts=experts,
        rank_E=rng.integers(0, RANKS, experts),
        width=draw(st.integers(1, experts)),
        renormalise=draw(st.booleans()),
        rule=rule,
        scope=draw(st.sampled_from(SCOPES)),
        factor=draw(st.sampled_from([0.25, 0.5, 1.0, 1.25, *([0.0, -0.5, -1.0] if rule == "tutel" else [])])),
        align=draw(st.sampled_from([1, 1, 2])),
    )


@every_drop
@every_reroute
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_numpy_and_torch_agree(drop: str, reroute: str, case: Case) -> None:
    limit = case.capacity(drop, reroute)
    ours, theirs = case.after(limit, "numpy"), case.after(limit, "torch")
    np.testing.assert_array_equal(ours.ids_TK, theirs.ids_TK.numpy())
    np.testing.assert_array_equal(ours.kept_TK, theirs.kept_TK.numpy())
    np.testing.assert_array_equal(ours.rerouted_TK, theirs.rerouted_TK.numpy())
    np.testing.assert_array_equal(ours.scores_TK, theirs.scores_TK.numpy())
    np.testing.assert_allclose(ours.weights_TK, theirs.weights_TK.numpy(), atol=1e-6, rtol=0)
    on_torch = limit.places_of(case.before("torch"), case.candidates("torch"), case.context)
    assert limit.places_of(case.before(), case.candidates(), case.context) == on_torch


@every_drop
@every_reroute
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_what_is_chosen_is_kept_rerouted_or_dropped(drop: str, reroute: str, case: Case) -> None:
    before, after = case.before(), case.after(case.capacity(drop, reroute))
    kept_TK = after.kept_TK & ~after.rerouted_TK
    np.testing.assert_array_equal(after.chosen_TK, before.chosen_TK)
    parts_TK = kept_TK.astype(int) + after.rerouted_TK + after.dropped_TK
    np.testing.assert_array_equal(parts_TK, before.chosen_TK)  # each chosen pair is one of the three
    np.testing.assert_array_equal(after.ids_TK != before.ids_TK, after.rerouted_TK)
    assert (after.weights_TK[~after.kept_TK] == 0).all()
    assert (after.null_weights_TN is None) == (before.null_weights_TN is None)
    if reroute == "none":
        assert not after.rerouted_TK.any()
        np.testing.assert_array_equal(after.weights_TK, np.where(after.kept_TK, before.weights_TK, 0))


@every_drop
@every_reroute
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_no_expert_has_more_pairs_than_places(drop: str, reroute: str, case: Case) -> None:
    capacity = case.capacity(drop, reroute)
    after = case.after(capacity)
    by_scope: dict[int, int] = {}
    for scope, _, queue_TK, places in case.passes(capacity):
        load_E = np.bincount(after.ids_TK[queue_TK & after.kept_TK], minlength=case.experts)
        assert load_E.max() <= places
        by_scope[scope] = by_scope.get(scope, 0) + places
    # The same before and after, and passes add up.
    for assignment in (case.before(), after):
        assert capacity.places_of(assignment, case.candidates(), case.context) == tuple(by_scope.values())


@every_drop
@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_places_are_filled_in_queue_order(drop: str, case: Case) -> None:
    capacity = case.capacity(drop)
    before, after = case.before(), case.after(capacity)
    for _, _, queue_TK, places in case.passes(capacity):
        for expert in range(case.experts):
            asking = sorted(np.argwhere(queue_TK & (before.ids_TK == expert)).tolist(), key=place_in(drop, before))
            kept = [bool(after.kept_TK[token, column]) for token, column in asking]
            assert kept == [turn < places for turn in range(len(asking))]


def place_in(drop: str, assignment: Assignment) -> Any:
    """The sort key of a pair, [token, column], in its queue; ties stay in the order of pairs."""
    return {
        "position": lambda pair: (pair[0], pair[1]),
        "probs": lambda pair: -float(assignment.weights_TK[pair[0], pair[1]]),
        "first_choice": lambda pair: (pair[1], pair[0]),
        "batch_prioritised": lambda pair: (pair[1], -float(assignment.scores_TK[pair[0]].max()), pair[0]),
    }[drop]


@every_drop
@settings(max_examples=60, deadline=None)
@given(case=cases(), more=st.sampled_from([1.0, 1.5, 4.0]))
def test_a_larger_factor_never_keeps_fewer(drop: str, case: Case, more: float) -> None:
    small = case.capacity(drop)
    tokens_S = np.bincount(case.scope_T, minlength=RANKS)
    if any(small.asks_loads(int(tokens), case.experts) for tokens in tokens_S):
        return  # then the fullest expert sets the places, not the factor
    kept_TK = case.after(small).kept_TK
    assert (case.after(replace(small, factor=small.factor * more)).kept_TK >= kept_TK).all()


@every_drop
@pytest.mark.parametrize("reroute", ["same_rank", "any"])
@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_rerouted_pairs_go_where_they_may(drop: str, reroute: str, case: Case) -> None:
    before, capacity = case.before(), case.capacity(drop, reroute)
    after, without = case.after(capacity), case.after(case.capacity(drop))
    candidates = case.candidates()
    np.testing.assert_array_equal(after.kept_TK & ~after.rerouted_TK, without.kept_TK)  # nobody's place is taken
    for token in range(case.tokens):
        chosen = after.ids_TK[token][after.chosen_TK[token]].tolist()
        assert len(set(chosen)) == len(chosen)
        score_of = dict(zip(candidates.ids_TC[token].tolist(), candidates.probs_TC[token].tolist(), strict=True))
        for column in np.flatnonzero(after.rerouted_TK[token]):
            expert, own = int(after.ids_TK[token, column]), int(before.ids_TK[token, column])
            assert 0 <= expert < case.experts
            assert after.scores_TK[token, column] == score_of[expert]
            assert reroute == "any" or case.rank_E[expert] == case.rank_E[own]
        if not after.rerouted_TK[token].any():
            expected_K = np.where(after.kept_TK[token], before.weights_TK[token], 0)
        else:
            share = after.scores_TK[token].sum() if case.renormalise else 1
            expected_K = np.where(after.kept_TK[token], after.scores_TK[token] / share, 0)
        np.testing.assert_allclose(after.weights_TK[token], expected_K, atol=1e-6, rtol=0)


@every_drop
@pytest.mark.parametrize("reroute", ["same_rank", "any"])
@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_a_pair_is_dropped_only_where_no_place_is_left(drop: str, reroute: str, case: Case) -> None:
    capacity = case.capacity(drop, reroute)
    if case.rule == "megablocks":
        return  # a token's pairs in other passes can give up an expert after a pair was dropped
    after, candidates = case.after(capacity), case.candidates()
    for _, _, queue_TK, places in case.passes(capacity):
        load_E = np.bincount(after.ids_TK[queue_TK & after.kept_TK], minlength=case.experts)
        for token, column in np.argwhere(queue_TK & after.dropped_TK):
            for expert in set(candidates.ids_TC[token].tolist()) - set(after.ids_TK[token].tolist()):
                near = (
                    reroute == "any" or case.rank_E[expert % case.experts] == case.rank_E[after.ids_TK[token, column]]
                )
                assert expert >= case.experts or load_E[expert] == places or not near


@settings(max_examples=60, deadline=None)
@given(case=cases(), expanded=st.booleans(), scope=st.sampled_from(SCOPES), backend=st.sampled_from(sorted(BACKENDS)))
def test_capacity_aware_is_a_capacity(case: Case, expanded: bool, scope: Any, backend: str) -> None:
    aware = CapacityAware(gamma=case.factor if case.factor > 0 else 1.0, expanded=expanded, scope=scope)
    reroute: Any = "same_rank" if expanded else "none"
    capacity = Capacity(factor=aware.gamma, drop="probs", scope=scope, reroute=reroute)
    ours, theirs = case.after(aware, backend), case.after(capacity, backend)
    for name in ("ids_TK", "kept_TK", "rerouted_TK", "weights_TK"):
        np.testing.assert_array_equal(np.asarray(getattr(ours, name)), np.asarray(getattr(theirs, name)))
    step = case.before(backend), case.candidates(backend), case.context
    assert aware.places_of(*step) == capacity.places_of(*step)
    assert (aware.drop, aware.pad, aware.needs, aware.work) == ("probs", False, capacity.needs, capacity.work)


@every_backend
@every_drop
@every_reroute
@pytest.mark.parametrize("rule", RULES)
def test_an_empty_step_stays_empty(backend: str, drop: Any, reroute: Any, rule: Any) -> None:
    case = step_of(np.zeros((0, 4), dtype=np.float32), width=2)
    after = case.after(Capacity(factor=1.0, drop=drop, reroute=reroute, rule=rule), backend)
    assert tuple(after.ids_TK.shape) == tuple(after.kept_TK.shape) == (0, 2)


@every_backend
@every_drop
@every_reroute
def test_all_tokens_on_one_expert(backend: str, drop: Any, reroute: Any) -> None:
    # Ten tokens, four experts: C = ceil(10 / 4) = 3. Expert 0 keeps 3; its only neighbour takes 3; all take 10.
    probs_TE = np.tile(np.array([[0.4, 0.3, 0.2, 0.1]], dtype=np.float32), (10, 1))
    case = step_of(probs_TE, width=1, rank_E=np.array([0, 1, 0, 1]))
    after = case.after(Capacity(factor=1.0, drop=drop, reroute=reroute, scope="global"), backend)
    load_E = np.bincount(np.asarray(after.ids_TK)[np.asarray(after.kept_TK)], minlength=4)
    assert load_E.tolist() == {"none": [3, 0, 0, 0], "same_rank": [3, 0, 3, 0], "any": [3, 3, 3, 1]}[reroute]


@every_backend
@every_drop
@every_reroute
def test_one_expert_has_nobody_to_reroute_to(backend: str, drop: Any, reroute: Any) -> None:
    case = step_of(np.ones((4, 1), dtype=np.float32), width=1)
    after = case.after(Capacity(factor=0.5, drop=drop, reroute=reroute, scope="global"), backend)
    assert np.asarray(after.kept_TK)[:, 0].tolist() == [True, True, False, False]  # ceil(4 / 2) = 2
    assert not np.asarray(after.rerouted_TK).any()


@every_backend
def test_replicas_make_more_neighbours(backend: str) -> None:
    # Expert 0 lies on both ranks, so both 1 (rank 0) and 2 (rank 1) are its neighbours. C = ceil(3 / 3) = 1.
    case = step_of(np.tile(np.array([[0.5, 0.3, 0.2]], dtype=np.float32), (3, 1)), width=1)
    share_LEG = np.array([[[0.5, 0.5], [1, 0], [0, 1]]], dtype=np.float32)
    context = replace(case.context, prices=prices_where(share_LEG))
    capacity = Capacity(factor=1.0, reroute="same_rank", scope="global")
    after = capacity.limit(case.before(backend), case.candidates(backend), context)
    assert np.asarray(after.ids_TK)[:, 0].tolist() == [0, 1, 2]


def step_of(probs_TE: Any, *, width: int, rank_E: Any = None) -> Case:
    """All tokens on rank 0, each with its `width` best experts."""
    tokens, experts = probs_TE.shape
    return Case(
        probs_TE=probs_TE,
        used_TC=np.ones((tokens, width), dtype=bool),
        source_rank_T=np.zeros(tokens, dtype=np.int64),
        experts=experts,
        rank_E=np.zeros(experts, dtype=np.int64) if rank_E is None else rank_E,
        width=width,
        renormalise=True,
        rule="megatron",
        scope="source_rank",
        factor=1.0,
        align=1,
    )


def test_what_rerouting_needs_is_asked_for() -> None:
    probs_TE = np.full((4, 8), 0.125, dtype=np.float32)
    case = step_of(probs_TE, width=2)
    few = case.candidates().best(2)
    assignment = assign(few, case.used_TC, width=2, renormalise=True)
    for limit in (Capacity(factor=1.0, reroute="any"), CapacityAware(gamma=1.0, expanded=True)):
        with pytest.raises(InputError, match=r"more candidates than the 2 that a token uses; the trace recorded 2"):
            limit.limit(assignment, few, case.context)
    blind = replace(case.context, prices=None)
    for limit in (Capacity(factor=1.0, reroute="same_rank"), CapacityAware(gamma=1.0, expanded=True)):
        with pytest.raises(InputError, match=rf"policy {limit.name} needs a placement and prices"):
            limit.limit(case.before(), case.candidates(), blind)
    assert Capacity(factor=1.0, reroute="any").limit(case.before(), case.candidates(), blind).kept_TK.shape == (4, 2)


@pytest.mark.parametrize(
    ("limit", "needs"),
    [
        (Capacity(factor=1.0), ()),
        (Capacity(factor=1.0, reroute="any"), ("more candidates than k",)),
        (Capacity(factor=1.0, reroute="same_rank"), ("more candidates than k", "placement and prices")),
        (CapacityAware(gamma=1.0), ()),
        (CapacityAware(gamma=1.0, expanded=True), ("more candidates than k", "placement and prices")),
    ],
)
def test_needs_follow_the_parameters(limit: Limit, needs: tuple[str, ...]) -> None:
    assert limit.needs == needs
    policy = RoutingPolicy(selection=TopK(k=2), capacity=limit)
    assert policy.needs("placement and prices") == ("placement and prices" in needs)
    assert type(limit).needs == ()


@every_backend
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), items=st.integers(0, 40), groups=st.integers(1, 5))
def test_who_fits(backend: str, seed: int, items: int, groups: int) -> None:
    rng = np.random.default_rng(seed)
    key_N, places_X = rng.integers(0, groups, items), rng.integers(0, 8, groups)
    value_N, order_N = rng.integers(0, 4, items).astype(np.float32), rng.permutation(items)
    array = BACKENDS[backend]
    queues = {
        "as they stand": (first_fitting(array(key_N), array(places_X)), range(items)),
        "in order": (first_fitting(array(key_N), array(places_X), array(order_N)), order_N.tolist()),
        "largest": (
            largest_fitting(array(key_N), array(places_X), array(value_N)),
            sorted(range(items), key=lambda item: -value_N[item]),
        ),
    }
    for found_N, queue in queues.values():
        left_X, fits_N = places_X.tolist(), [False] * items
        for item in queue:
            fits_N[item] = left_X[key_N[item]] > 0
            left_X[key_N[item]] -= 1
        assert np.asarray(found_N).tolist() == fits_N

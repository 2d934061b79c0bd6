"""What every selection must hold, with and without capacity, on every backend."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.assignment import UNUSED, Assignment
from router.backends import topk
from router.candidates import Candidates
from router.capacity import Capacity
from router.context import RouteContext
from router.placement import place
from router.policies import SELECTIONS, RoutingPolicy
from router.policies.base import Selection
from router.policies.skip import Skip
from router.policies.top_k import TopK
from router.policies.top_p import TopP
from router.replicas import choose_slots
from traces.errors import InputError

RANKS = 3
CAPACITY_KINDS = [
    None,
    *((drop, scope) for drop in ("position", "probs") for scope in ("source_rank", "global")),
]
MAKERS = {
    "top_k": lambda k, share: TopK(k=k),
    "top_p": lambda k, share: TopP(p=share, k_max=k),
    "skip": lambda k, share: Skip(threshold=share, k_max=k),
}
BACKENDS = {"numpy": np.asarray, "torch": lambda array: torch.as_tensor(np.array(array))}

every_selection = pytest.mark.parametrize("name", sorted(SELECTIONS))
every_capacity = pytest.mark.parametrize("kind", CAPACITY_KINDS, ids=lambda kind: "-".join(kind or ["none"]))
every_backend = pytest.mark.parametrize("backend", sorted(BACKENDS))


def test_every_selection_is_under_this_contract() -> None:
    assert set(MAKERS) == set(SELECTIONS)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step of one layer, and the numbers that a policy is made of."""

    probs_TE: Any
    source_rank_T: Any
    renormalise: bool
    width: int
    share: float
    factor: float

    def selection(self, name: str) -> Selection:
        return MAKERS[name](self.width, self.share)

    def capacity(self, kind: tuple[Any, Any] | None) -> Capacity | None:
        return None if kind is None else Capacity(factor=self.factor, drop=kind[0], scope=kind[1])

    def candidates(self, backend: str = "numpy") -> Candidates:
        probs_TC, ids_TC = topk(self.probs_TE, self.probs_TE.shape[1])
        array = BACKENDS[backend]
        return Candidates(
            ids_TC=array(ids_TC),
            probs_TC=array(probs_TC),
            source_rank_T=array(self.source_rank_T),
            experts=self.probs_TE.shape[1],
            score_kind="softmax",
        )

    def route(self, name: str, kind: tuple[Any, Any] | None, backend: str = "numpy") -> Assignment:
        policy = RoutingPolicy(selection=self.selection(name), capacity=self.capacity(kind))
        context = RouteContext(layer=0, ranks=RANKS, renormalise=self.renormalise)
        assignment, state = policy.route(self.candidates(backend), context, {})
        assert state == {}, "none of these policies remembers anything"
        return assignment


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Scores are multiples of 1/64 under 1/4, many of them equal: float32 adds them without rounding."""
    tokens, experts = draw(st.integers(0, 20)), draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return Case(
        probs_TE=(rng.integers(1, draw(st.integers(2, 16)), (tokens, experts)) / 64).astype(np.float32),
        source_rank_T=np.sort(rng.integers(0, RANKS, tokens)),
        renormalise=draw(st.booleans()),
        width=draw(st.integers(1, experts)),
        share=draw(st.sampled_from([0.0, 1 / 64, 0.125, 0.3, 0.5, 1.0])),
        factor=draw(st.sampled_from([0.25, 0.5, 1.0, 1.25, 3.0])),
    )


@every_selection
@every_capacity
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_numpy_and_torch_agree(name: str, kind: tuple[Any, Any] | None, case: Case) -> None:
    ours, theirs = case.route(name, kind, "numpy"), case.route(name, kind, "torch")
    np.testing.assert_array_equal(ours.ids_TK, theirs.ids_TK.numpy())
    np.testing.assert_array_equal(ours.kept_TK, theirs.kept_TK.numpy())
    np.testing.assert_array_equal(ours.scores_TK, theirs.scores_TK.numpy())
    np.testing.assert_allclose(ours.weights_TK, theirs.weights_TK.numpy(), atol=1e-6, rtol=0)


@every_selection
@every_capacity
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_what_is_chosen_is_kept_or_dropped(name: str, kind: tuple[Any, Any] | None, case: Case) -> None:
    before, after = case.route(name, None), case.route(name, kind)
    dropped_TK = before.kept_TK & ~after.kept_TK
    np.testing.assert_array_equal(after.ids_TK, before.ids_TK)  # a dropped pair is still a choice
    np.testing.assert_array_equal(before.kept_TK, before.chosen_TK)
    np.testing.assert_array_equal(after.kept_TK | dropped_TK, after.chosen_TK)
    np.testing.assert_array_equal(after.weights_TK, np.where(dropped_TK, 0, before.weights_TK))
    assert not (after.kept_TK & ~before.kept_TK).any()
    if kind is None:
        assert not dropped_TK.any()


@every_selection
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_a_token_uses_distinct_candidates_and_always_its_first(name: str, case: Case) -> None:
    assignment, candidates = case.route(name, None), case.candidates()
    assert assignment.ids_TK.shape == (candidates.tokens, case.selection(name).width)
    np.testing.assert_array_equal(assignment.ids_TK[:, 0], candidates.ids_TC[:, 0])
    for ids_K, probs_K, offered_C in zip(assignment.ids_TK, assignment.scores_TK, candidates.ids_TC, strict=True):
        used = ids_K[ids_K != UNUSED].tolist()
        assert len(set(used)) == len(used)
        assert used == offered_C[: len(used)].tolist()  # a prefix of the candidates: better ones first
        assert (probs_K[ids_K == UNUSED] == 0).all()


@every_selection
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_weights_are_scores_or_shares_of_them(name: str, case: Case) -> None:
    assignment = case.route(name, None)
    assert np.isfinite(assignment.weights_TK).all()
    assert (assignment.weights_TK >= 0).all()
    assert (assignment.weights_TK[~assignment.chosen_TK] == 0).all()
    if case.renormalise:
        np.testing.assert_allclose(assignment.weights_TK.sum(axis=1), 1, atol=1e-6)
    else:
        np.testing.assert_array_equal(assignment.weights_TK, assignment.scores_TK)


@every_selection
@every_capacity
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_capacity_is_filled_in_its_order_and_never_exceeded(
    name: str, kind: tuple[Any, Any] | None, case: Case
) -> None:
    if kind is None:
        return
    capacity = case.capacity(kind)
    assert capacity is not None
    before, after = case.route(name, None), case.route(name, kind)
    drop, scope = kind
    scopes = [case.source_rank_T == rank for rank in range(RANKS)] if scope == "source_rank" else [slice(None)]
    for of_scope in scopes:
        ids_TK, weights_TK = before.ids_TK[of_scope], before.weights_TK[of_scope]
        kept_TK = after.kept_TK[of_scope]
        tokens, k = ids_TK.shape
        limit = capacity.pairs_per_expert(tokens, k, case.probs_TE.shape[1])
        for expert in range(case.probs_TE.shape[1]):
            asked_N = ids_TK.reshape(-1) == expert
            kept_N, weight_N = kept_TK.reshape(-1)[asked_N], weights_TK.reshape(-1)[asked_N]
            assert kept_N.sum() == min(limit, asked_N.sum())
            if drop == "position":
                assert kept_N[: kept_N.sum()].all()
            elif not kept_N.all() and kept_N.any():
                assert weight_N[kept_N].min() >= weight_N[~kept_N].max()


@every_backend
def test_ties_go_to_the_lower_expert(backend: str) -> None:
    # 64 equal scores, and two levels of them: torch.topk alone returns other ids than 0, 1, 2, ….
    level_E = np.zeros(64, dtype=np.float32)
    level_E[40:] = 1
    logits_TE = BACKENDS[backend](np.stack([np.zeros(64, dtype=np.float32), level_E]))
    candidates = Candidates.from_logits(logits_TE, BACKENDS[backend](np.zeros(2, dtype=np.int64)))
    assert candidates.ids_TC[0].tolist() == list(range(64))
    assert candidates.ids_TC[1].tolist() == [*range(40, 64), *range(40)]
    context = RouteContext(layer=0, ranks=1, renormalise=True)
    assignment, _ = RoutingPolicy(selection=TopK(k=3)).route(candidates, context, {})
    assert assignment.ids_TK.tolist() == [[0, 1, 2], [40, 41, 42]]


@every_backend
def test_candidates_are_the_softmax_best_first(backend: str) -> None:
    # exp(ln 1, ln 3, ln 4) / 8 = 1/8, 3/8, 4/8.
    logits_TE = BACKENDS[backend](np.log(np.array([[1, 3, 4]], dtype=np.float32)))
    candidates = Candidates.from_logits(logits_TE, BACKENDS[backend](np.zeros(1, dtype=np.int64)))
    assert candidates.ids_TC.tolist() == [[2, 1, 0]]
    np.testing.assert_allclose(np.asarray(candidates.probs_TC), [[0.5, 0.375, 0.125]], atol=1e-6)
    assert (candidates.tokens, candidates.count, candidates.experts) == (1, 3, 3)


@pytest.mark.parametrize("experts", [10, 12, 20, 24, 50])
def test_top_p_on_a_uniform_router_counts_as_on_paper(experts: int) -> None:
    """A router that knows nothing yet: sums of 1/E, rounded, fall on either side of p. On paper k = ceil(p * E)."""
    probs_TC = np.full((1, experts), np.float32(1) / np.float32(experts))
    for hundredth in range(1, 100):
        selection = TopP(p=hundredth / 100, k_max=experts)
        ours, theirs = selection.use(probs_TC), selection.use(torch.as_tensor(probs_TC))
        on_paper = -(-hundredth * experts // 100)
        assert (int(ours.sum()), int(theirs.sum())) == (on_paper, on_paper), f"experts used at p={hundredth / 100}"


def test_top_p_takes_the_fewest_that_reach_p() -> None:
    probs_TC = np.array([[0.5, 0.25, 0.125, 0.125]], dtype=np.float32)
    for p, used in ((0.0, 1), (0.5, 1), (0.501, 2), (0.75, 2), (0.8, 3), (0.9, 4), (1.0, 4)):
        assert TopP(p=p, k_max=4).use(probs_TC).sum() == used, p
    assert TopP(p=0.9, k_max=2).use(probs_TC[:, :2]).sum() == 2


def test_skip_leaves_out_what_is_under_its_share_of_the_best() -> None:
    probs_TC = np.array([[0.5, 0.25, 0.125]], dtype=np.float32)
    for threshold, used in ((0.0, 3), (0.25, 3), (0.26, 2), (0.5, 2), (0.51, 1), (2.0, 1)):
        assert Skip(threshold=threshold, k_max=3).use(probs_TC).sum() == used, threshold


@every_selection
@every_backend
def test_more_experts_than_candidates_is_refused(name: str, backend: str) -> None:
    case = Case(
        probs_TE=np.full((2, 8), 0.125, dtype=np.float32),
        source_rank_T=np.zeros(2, dtype=np.int64),
        renormalise=True,
        width=12,
        share=0.5,
        factor=1.0,
    )
    with pytest.raises(InputError) as refused:
        case.route(name, None, backend)
    assert str(refused.value) == f"policy {name} needs 12 candidates per token; the trace recorded 8"


@every_selection
@every_capacity
@every_backend
def test_a_step_without_tokens_gives_an_empty_assignment(name: str, kind: tuple[Any, Any] | None, backend: str) -> None:
    case = Case(
        probs_TE=np.zeros((0, 4), dtype=np.float32),
        source_rank_T=np.zeros(0, dtype=np.int64),
        renormalise=True,
        width=2,
        share=0.5,
        factor=1.0,
    )
    assignment = case.route(name, kind, backend)
    for array in (assignment.ids_TK, assignment.weights_TK, assignment.kept_TK):
        assert tuple(array.shape) == (0, 2)
    placement = place("lpt", np.ones((1, 4)), ranks=2, slots=6)
    slot_TK = choose_slots(assignment, placement, 0, case.candidates(backend).source_rank_T, "local")
    assert tuple(slot_TK.shape) == (0, 2)


@every_backend
def test_all_tokens_to_one_expert(backend: str) -> None:
    # 16 tokens, 4 experts, k = 1: C = ceil(1 * 16 * 1 / 4) = 4 of the 16 pairs are kept, whoever holds them.
    probs_TE = np.tile(np.array([0.01, 0.9, 0.01, 0.01], dtype=np.float32), (16, 1))
    source_rank_T = np.repeat([0, 1], 8)
    case = Case(probs_TE=probs_TE, source_rank_T=source_rank_T, renormalise=True, width=1, share=0.5, factor=1.0)
    assert case.route("top_k", ("position", "global"), backend).kept_TK[:, 0].tolist() == [True] * 4 + [False] * 12
    # Each rank's 8 tokens: C = ceil(8 / 4) = 2 on either.
    by_rank = case.route("top_k", ("probs", "source_rank"), backend)
    assert by_rank.kept_TK[:, 0].tolist() == ([True] * 2 + [False] * 6) * 2
    assert by_rank.ids_TK.tolist() == [[1]] * 16


@every_selection
@every_capacity
@every_backend
def test_one_expert_only(name: str, kind: tuple[Any, Any] | None, backend: str) -> None:
    case = Case(
        probs_TE=np.ones((3, 1), dtype=np.float32),
        source_rank_T=np.zeros(3, dtype=np.int64),
        renormalise=True,
        width=1,
        share=0.5,
        factor=1.0,
    )
    assignment = case.route(name, kind, backend)
    assert assignment.ids_TK.tolist() == [[0]] * 3
    assert assignment.weights_TK.tolist() == [[1.0]] * 3
    assert assignment.kept_TK.tolist() == [[True]] * 3


@every_selection
@every_backend
def test_gates_that_are_all_zero_give_finite_weights(name: str, backend: str) -> None:
    """A sigmoid gate under 2 ** -25 is 0 in a recorded float16, and `check_values` lets such a trace through."""
    case = Case(
        probs_TE=np.zeros((2, 4), dtype=np.float32),
        source_rank_T=np.zeros(2, dtype=np.int64),
        renormalise=True,
        width=2,
        share=0.5,
        factor=1.0,
    )
    assignment = case.route(name, ("probs", "source_rank"), backend)
    assert np.isfinite(np.asarray(assignment.weights_TK)).all()

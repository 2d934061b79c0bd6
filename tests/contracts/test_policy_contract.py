"""What every selection must hold, with and without capacity, on every backend."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from router.context import RouteContext, State
from router.history import RoutingHistory
from router.placement import place
from router.policies import SELECTIONS, RoutingPolicy
from router.policies.balance_bias import BalanceBias
from router.policies.base import Selection
from router.policies.expert_choice import ExpertChoice
from router.policies.group_limited import GroupLimited
from router.policies.held_top_p import HeldTopP
from router.policies.null_experts import NullExperts
from router.policies.partners import Partners
from router.policies.skip import Skip
from router.policies.skip_by_ratio import SkipByRatio
from router.policies.top_k import TopK
from router.policies.top_k_by_layer import TopKByLayer
from router.policies.top_p import TopP
from router.replicas import choose_slots
from traces.errors import InputError

RANKS = 3
CAPACITY_KINDS = [
    None,
    *((drop, scope) for drop in ("position", "probs") for scope in ("source_rank", "global")),
]


def group_limited(case: "Case") -> GroupLimited:
    """As few groups as divide the experts, and enough of them kept."""
    experts = case.probs_TE.shape[1]
    groups = next((size for size in range(2, experts + 1) if experts % size == 0), 1)
    kept_groups = min(-(-case.width * groups // experts), groups)
    return GroupLimited(k=case.width, groups=groups, kept_groups=kept_groups)


# A name in the registry, or one of its modes behind a colon.
MAKERS = {
    "top_k": lambda case: TopK(k=case.width),
    "top_k_by_layer": lambda case: TopKByLayer(mean_k=1 + case.share * (case.width - 1), k_max=case.width),
    "top_p": lambda case: TopP(p=case.share, k_max=case.width),
    "held_top_p": lambda case: HeldTopP(target=1 + case.share * (case.width - 1), k_max=case.width),
    "skip": lambda case: Skip(threshold=case.share, k_max=case.width),
    "skip_by_ratio": lambda case: SkipByRatio(quantile=case.share, k_max=case.width),
    "null_experts": lambda case: NullExperts(k=case.width),
    "balance_bias": lambda case: BalanceBias(k=case.width, rate=0.05),
    "group_limited": group_limited,
    "expert_choice:batch": lambda case: ExpertChoice(factor=case.factor, k_max=case.width, mode="batch"),
    "expert_choice:threshold": lambda case: ExpertChoice(factor=case.factor, k_max=case.width, mode="threshold"),
    "partners": lambda case: Partners(k=case.width, partners=case.width),
}
# Which use a token's best candidates and no other, and which may leave a token without experts.
BEST_FIRST = ("top_k", "top_k_by_layer", "top_p", "held_top_p", "skip", "skip_by_ratio")
KEEP_THE_FIRST = (*BEST_FIRST, "partners")
MAY_LEAVE_TOKENS = ("expert_choice:batch", "expert_choice:threshold", "null_experts")
REMEMBER = ("balance_bias", "expert_choice:threshold", "held_top_p")
BACKENDS = {"numpy": np.asarray, "torch": lambda array: torch.as_tensor(np.array(array))}

every_selection = pytest.mark.parametrize("name", sorted(MAKERS))
every_capacity = pytest.mark.parametrize("kind", CAPACITY_KINDS, ids=lambda kind: "-".join(kind or ["none"]))
every_backend = pytest.mark.parametrize("backend", sorted(BACKENDS))


def in_registry(name: str) -> type[Selection]:
    return SELECTIONS[name.partition(":")[0]]


def that_need(what: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name in sorted(MAKERS) if what in in_registry(name).needs])


def test_every_selection_is_under_this_contract() -> None:
    assert {in_registry(name) for name in MAKERS} == set(SELECTIONS.values())


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
        selection = MAKERS[name](self)
        assert isinstance(selection, in_registry(name))
        return selection

    def capacity(self, kind: tuple[Any, Any] | None) -> Capacity | None:
        return None if kind is None else Capacity(factor=self.factor, drop=kind[0], scope=kind[1])

    def candidates(self, name: str = "", backend: str = "numpy") -> Candidates:
        """All experts; for a policy of null experts one of these besides, which scores as the last real one does."""
        nulls = int(name == "null_experts")
        probs_TE = np.concatenate([self.probs_TE, self.probs_TE[:, self.probs_TE.shape[1] - nulls :]], axis=1)
        probs_TC, ids_TC = topk(probs_TE, probs_TE.shape[1])
        array = BACKENDS[backend]
        return Candidates(
            ids_TC=array(ids_TC),
            probs_TC=array(probs_TC),
            source_rank_T=array(self.source_rank_T),
            experts=self.probs_TE.shape[1],
            score_kind="softmax",
            null_experts=nulls,
        )

    def context(self, name: str = "") -> RouteContext:
        """With earlier traffic: of two layers, every expert as often used with the next ones as they are near."""
        experts = self.probs_TE.shape[1] + int(name == "null_experts")
        away_E = np.arange(experts)
        history = RoutingHistory(
            together_LEE=np.tile(experts - abs(away_E[:, None] - away_E), (2, 1, 1)),
            ratio_LQ=np.tile(np.linspace(0.2, 1, 101), (2, 1)),
            output_error_LK=np.array([[0.8, 0.1, 0.0], [0.3, 0.2, 0.0]]),
        )
        return RouteContext(layer=0, ranks=RANKS, renormalise=self.renormalise, history=history)

    def step(
        self, name: str, kind: tuple[Any, Any] | None, backend: str = "numpy", state: Mapping[str, Any] | None = None
    ) -> tuple[Assignment, State]:
        policy = RoutingPolicy(selection=self.selection(name), capacity=self.capacity(kind))
        return policy.route(self.candidates(name, backend), self.context(name), dict(state or {}))

    def route(self, name: str, kind: tuple[Any, Any] | None, backend: str = "numpy") -> Assignment:
        return self.step(name, kind, backend)[0]


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
@settings(max_examples=40, deadline=None)
@given(case=cases(), more=st.lists(st.integers(0, 2**32), min_size=2, max_size=2))
def test_numpy_and_torch_agree_and_remember_the_same(name: str, case: Case, more: list[int]) -> None:
    """Over three steps, the later ones of scores of their own."""
    steps = [case]
    for seed in more:
        sixtyfourths_TE = np.random.default_rng(seed).integers(1, 16, case.probs_TE.shape)
        steps.append(replace(case, probs_TE=(sixtyfourths_TE / 64).astype(np.float32)))
    ours: State = {}
    theirs: State = {}
    for step in steps:
        our_assignment, ours = step.step(name, None, "numpy", ours)
        their_assignment, theirs = step.step(name, None, "torch", theirs)
        np.testing.assert_array_equal(our_assignment.ids_TK, their_assignment.ids_TK.numpy())
        np.testing.assert_allclose(our_assignment.weights_TK, their_assignment.weights_TK.numpy(), atol=1e-6, rtol=0)
        assert plain(ours) == plain(theirs)
        assert all(np.isfinite(value).all() for value in ours.get("selection", {}).values())
    remembered = name in REMEMBER and case.probs_TE.shape[0] > 0
    assert bool(ours) == (remembered or name == "balance_bias")


@every_selection
@settings(max_examples=20, deadline=None)
@given(case=cases())
def test_what_is_remembered_survives_a_file(name: str, case: Case) -> None:
    _, state = case.step(name, None)
    read = {
        part: {key: np.array(value) if isinstance(value, list) else value for key, value in memory.items()}
        for part, memory in json.loads(json.dumps(plain(state))).items()
    }
    after, next_state = case.step(name, None, state=state)
    again, same_state = case.step(name, None, state=read)
    np.testing.assert_array_equal(after.ids_TK, again.ids_TK)
    assert plain(next_state) == plain(same_state)


def plain(state: State) -> dict[str, dict[str, Any]]:
    """The state with lists for arrays."""
    return {
        part: {key: value.tolist() if hasattr(value, "tolist") else value for key, value in memory.items()}
        for part, memory in state.items()
    }


@every_selection
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_a_token_uses_distinct_candidates_in_their_order(name: str, case: Case) -> None:
    assignment, candidates = case.route(name, None), case.candidates(name)
    assert assignment.ids_TK.shape == (candidates.tokens, case.selection(name).width)
    if name in KEEP_THE_FIRST:
        np.testing.assert_array_equal(assignment.ids_TK[:, 0], candidates.ids_TC[:, 0])
    if name not in MAY_LEAVE_TOKENS:
        assert assignment.chosen_TK.any(axis=1).all()
    for ids_K, probs_K, offered_C in zip(assignment.ids_TK, assignment.scores_TK, candidates.ids_TC, strict=True):
        used = ids_K[ids_K != UNUSED].tolist()
        assert len(set(used)) == len(used)
        assert used == ids_K[: len(used)].tolist()
        assert used == [expert for expert in offered_C.tolist() if expert in used]  # better ones first
        assert all(expert < candidates.experts for expert in used)
        if name in BEST_FIRST:
            assert used == offered_C[: len(used)].tolist()
        assert (probs_K[ids_K == UNUSED] == 0).all()


@every_selection
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_weights_are_scores_or_shares_of_them(name: str, case: Case) -> None:
    assignment = case.route(name, None)
    assert np.isfinite(assignment.weights_TK).all()
    assert (assignment.weights_TK >= 0).all()
    assert (assignment.weights_TK[~assignment.chosen_TK] == 0).all()
    np.testing.assert_array_equal(
        assignment.scores_TK[assignment.chosen_TK],
        np.take_along_axis(case.probs_TE, np.maximum(assignment.ids_TK, 0), axis=1)[assignment.chosen_TK],
    )
    if case.renormalise:
        served_T = assignment.chosen_TK.any(axis=1)
        np.testing.assert_allclose(assignment.weights_TK.sum(axis=1), served_T, atol=1e-6)
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
    recorded = case.candidates(name).count
    assert str(refused.value) == (
        f"policy {name.partition(':')[0]} needs 12 candidates per token; the trace recorded {recorded}: "
        "use fewer, or complete the trace (moeroute trace complete)"
    )


EVEN = Case(
    probs_TE=np.full((2, 8), 0.125, dtype=np.float32),
    source_rank_T=np.zeros(2, dtype=np.int64),
    renormalise=True,
    width=4,
    share=0.5,
    factor=1.0,
)


@that_need("full scores")
@every_backend
def test_full_scores_are_asked_for(name: str, backend: str) -> None:
    policy = RoutingPolicy(selection=EVEN.selection(name))
    with pytest.raises(InputError, match=r"needs the scores of all 8 experts; the trace recorded 7 .*complete"):
        policy.route(EVEN.candidates(name, backend).best(7), EVEN.context(), {})


@that_need("more candidates than k")
@every_backend
def test_more_candidates_than_k_are_asked_for(name: str, backend: str) -> None:
    policy = RoutingPolicy(selection=EVEN.selection(name))
    policy.route(EVEN.candidates(name, backend).best(5), EVEN.context(), {})
    with pytest.raises(InputError, match=r"more candidates than the 4 that a token uses; the trace recorded 4: record"):
        policy.route(EVEN.candidates(name, backend).best(4), EVEN.context(), {})


@that_need("earlier traffic")
@every_backend
def test_earlier_traffic_is_asked_for(name: str, backend: str) -> None:
    policy = RoutingPolicy(selection=EVEN.selection(name))
    with pytest.raises(InputError, match=r"needs earlier traffic of the model"):
        policy.route(EVEN.candidates(name, backend), replace(EVEN.context(), history=None), {})
    with pytest.raises(InputError, match=r"has 2 layers, but layer 2 is asked for"):
        policy.route(EVEN.candidates(name, backend), replace(EVEN.context(), layer=2), {})


@that_need("null experts")
@every_backend
def test_null_experts_are_asked_for(name: str, backend: str) -> None:
    policy = RoutingPolicy(selection=EVEN.selection(name))
    with pytest.raises(InputError, match=r"needs null experts, and the model has only its 8 real ones: use top_k"):
        policy.route(EVEN.candidates("", backend), EVEN.context(), {})


def test_every_need_of_a_selection_is_tried() -> None:
    tried = {"full scores", "more candidates than k", "earlier traffic", "null experts"}
    assert {need for selection in SELECTIONS.values() for need in selection.needs} == tried


@every_selection
@every_backend
def test_scores_that_are_nan_are_refused(name: str, backend: str) -> None:
    probs_TE = EVEN.probs_TE.copy()
    probs_TE[1, 3] = np.nan
    with pytest.raises(InputError, match=r"token 1 of the step has a score that is NaN"):
        replace(EVEN, probs_TE=probs_TE).route(name, None, backend)


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
    slot_TK = choose_slots(assignment, placement, 0, case.candidates(name, backend).source_rank_T, "local")
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
    for name in MAKERS:
        # Expert choice has C = ceil(16 * 1 / 4) = 4 places, for the first of tokens that are all alike.
        served = 4 if name == "expert_choice:batch" else 16
        ids_TK = case.route(name, None, backend).ids_TK.tolist()
        assert ids_TK == [[1]] * served + [[UNUSED]] * (16 - served), name


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

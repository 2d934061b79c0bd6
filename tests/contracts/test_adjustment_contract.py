"""What every adjustment must hold, on every backend."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.backends import topk
from router.candidates import Candidates
from router.context import RouteContext
from router.policies import ADJUSTMENTS
from router.policies.base import Adjustment
from router.policies.batch_set import BatchSet
from router.policies.cache_aware import CacheAware
from router.policies.hardware_aware import HardwareAware
from router.policies.opportunistic import Opportunistic
from router.policies.topology_aware import TopologyAware
from router.prices import RoutePrices

RANKS = 3
MAKERS: dict[str, Callable[[float, Any], Adjustment]] = {
    "opportunistic": lambda strength, scope: Opportunistic(k0=1 + int(2 / (strength + 1)), scope=scope),
    "batch_set": lambda strength, scope: BatchSet(active_share=1 / (1 + strength), scope=scope),
    "cache_aware": lambda strength, scope: CacheAware(bonus=strength, cache_share=0.5, protected=1),
    "topology_aware": lambda strength, scope: TopologyAware(price=strength),
    "hardware_aware": lambda strength, scope: HardwareAware(price=strength, scope=scope),
}
IDLE: dict[str, Adjustment] = {
    "opportunistic": Opportunistic(k0=8),
    "batch_set": BatchSet(active_share=1.0),
    "cache_aware": CacheAware(bonus=0.0, cache_share=0.5),
    "topology_aware": TopologyAware(price=0.0),
    "hardware_aware": HardwareAware(price=0.0),
}
SCOPES = ("source_rank", "global")
BACKENDS: dict[str, Callable[[Any], Any]] = {
    "numpy": np.asarray,
    "torch": lambda array: torch.as_tensor(np.array(array)),
}

every_adjustment = pytest.mark.parametrize("name", sorted(ADJUSTMENTS))
every_scope = pytest.mark.parametrize("scope", SCOPES)
every_backend = pytest.mark.parametrize("backend", sorted(BACKENDS))


def test_every_adjustment_is_under_this_contract() -> None:
    assert set(MAKERS) == set(IDLE) == set(ADJUSTMENTS)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Two steps of one layer, what a selection chose in them, where experts are, and how strongly to adjust."""

    probs_STE: Any
    used_STC: Any
    source_rank_T: Any
    prices: RoutePrices
    null_experts: int
    strength: float

    @property
    def context(self) -> RouteContext:
        return RouteContext(layer=0, ranks=RANKS, renormalise=True, prices=self.prices)

    def candidates(self, step: int, backend: str = "numpy") -> Candidates:
        probs_TC, ids_TC = topk(self.probs_STE[step], self.used_STC.shape[2])
        array = BACKENDS[backend]
        return Candidates(
            ids_TC=array(ids_TC),
            probs_TC=array(probs_TC),
            source_rank_T=array(self.source_rank_T),
            experts=self.probs_STE.shape[2] - self.null_experts,
            score_kind="softmax",
            null_experts=self.null_experts,
        )

    def adjust(self, adjustment: Adjustment, backend: str = "numpy") -> list[Any]:
        """The masks of both steps; the second with the state of the first."""
        state: dict[str, Any] = {}
        masks = []
        for step in range(2):
            used_TC = BACKENDS[backend](self.used_STC[step])
            adjusted_TC, state = adjustment.adjust(used_TC, self.candidates(step, backend), self.context, state)
            masks.append(np.asarray(adjusted_TC))
        return masks


def prices_at(share_EG: Any, *, row_s: float, active_s: float, hop_s: float, load_s_E: Any = None) -> RoutePrices:
    """Ranks 0 and 1 on one node, the third on another, twice as far."""
    experts, ranks = share_EG.shape
    node_of_G = np.arange(ranks) // 2
    far_GG = 1.0 + (node_of_G[:, None] != node_of_G)
    np.fill_diagonal(far_GG, 0)
    return RoutePrices(
        share_LEG=share_EG[None].astype(np.float32),
        row_s=row_s,
        active_s=active_s,
        hop_s_GG=hop_s * far_GG,
        load_s_LE=np.zeros((1, experts)) if load_s_E is None else load_s_E[None],
        node_of_G=node_of_G,
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Scores are multiples of 1/64 under 1/4, many of them equal; replicas, null experts and cold weights at times."""
    tokens, experts = draw(st.integers(0, 20)), draw(st.integers(1, 8))
    null_experts = draw(st.integers(0, 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    every = experts + null_experts
    count, most = draw(st.integers(1, every)), draw(st.integers(1, 4))
    uses_ST = rng.integers(1, min(most, count) + 1, (2, tokens))
    if draw(st.booleans()):  # the best, as most selections choose
        used_STC = np.arange(count) < uses_ST[..., None]
    else:
        used_STC = np.argsort(rng.random((2, tokens, count)), axis=2) < uses_ST[..., None]
    share_EG = np.zeros((experts, RANKS))
    share_EG[np.arange(experts), rng.integers(0, RANKS, experts)] = 1
    if draw(st.booleans()):
        share_EG[0] = [0.5, 0, 0.5]
    return Case(
        probs_STE=(rng.integers(0, draw(st.integers(2, 16)), (2, tokens, every)) / 64).astype(np.float32),
        used_STC=used_STC,
        source_rank_T=np.sort(rng.integers(0, RANKS, tokens)),
        prices=prices_at(
            share_EG,
            row_s=draw(st.sampled_from([0.0, 1e-6])),
            active_s=draw(st.sampled_from([0.0, 1e-6, 1e-5])),
            hop_s=draw(st.sampled_from([0.0, 1e-6])),
            load_s_E=rng.integers(0, 2, experts) * draw(st.sampled_from([0.0, 1e-5])),
        ),
        null_experts=null_experts,
        strength=draw(st.sampled_from([0.01, 0.1, 0.5, 1.0])),
    )


@every_adjustment
@every_scope
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_numpy_and_torch_agree_from_step_to_step(name: str, scope: Any, case: Case) -> None:
    adjustment = MAKERS[name](case.strength, scope)
    for ours_TC, theirs_TC in zip(case.adjust(adjustment), case.adjust(adjustment, "torch"), strict=True):
        np.testing.assert_array_equal(ours_TC, theirs_TC)


@every_adjustment
@every_scope
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_a_token_keeps_one_expert_and_gets_no_more_than_it_had(name: str, scope: Any, case: Case) -> None:
    before = [used_TC.copy() for used_TC in case.used_STC]
    for used_TC, adjusted_TC in zip(before, case.adjust(MAKERS[name](case.strength, scope)), strict=True):
        assert (adjusted_TC.shape, adjusted_TC.dtype) == (used_TC.shape, np.bool_)
        assert (adjusted_TC.sum(axis=1) <= used_TC.sum(axis=1)).all()
        assert (adjusted_TC.sum(axis=1) >= 1).all()
    np.testing.assert_array_equal(np.stack(before), case.used_STC)  # what goes in is not written to


@every_adjustment
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_an_idle_adjustment_changes_nothing(name: str, case: Case) -> None:
    for used_TC, adjusted_TC in zip(case.used_STC, case.adjust(IDLE[name]), strict=True):
        np.testing.assert_array_equal(adjusted_TC, used_TC)


@every_adjustment
@every_scope
@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_the_same_step_is_adjusted_the_same_and_its_state_is_not_written_to(name: str, scope: Any, case: Case) -> None:
    adjustment = MAKERS[name](case.strength, scope)
    _, state = adjustment.adjust(case.used_STC[0], case.candidates(0), case.context, {})
    kept = {key: np.copy(value) for key, value in state.items()}
    again = [adjustment.adjust(case.used_STC[1], case.candidates(1), case.context, state) for _ in range(2)]
    np.testing.assert_array_equal(again[0][0], again[1][0])
    for key, value in kept.items():
        np.testing.assert_array_equal(state[key], value)
        np.testing.assert_array_equal(again[0][1][key], again[1][1][key])


@every_adjustment
@every_scope
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_a_source_rank_alone_decides_as_beside_the_others(name: str, scope: Any, case: Case) -> None:
    """What the real run relies on: with the scope `source_rank` a rank need not see the others' tokens."""
    if scope == "global" or name == "cache_aware":  # remembers what all tokens used
        return
    adjustment = MAKERS[name](case.strength, scope)
    together_TC = case.adjust(adjustment)[0]
    for rank in range(RANKS):
        own_T = case.source_rank_T == rank
        alone = replace(
            case,
            probs_STE=case.probs_STE[:, own_T],
            used_STC=case.used_STC[:, own_T],
            source_rank_T=case.source_rank_T[own_T],
        )
        np.testing.assert_array_equal(alone.adjust(adjustment)[0], together_TC[own_T])


@every_adjustment
@every_scope
@every_backend
def test_all_tokens_to_one_expert_and_one_expert_only(name: str, scope: Any, backend: str) -> None:
    # Nine tokens, three on each rank, all prefer expert 1 of 4 by far and have two experts each.
    probs_TE = np.tile(np.array([0.02, 0.9, 0.04, 0.03], dtype=np.float32), (9, 1))
    share_EG = np.eye(4, RANKS)
    share_EG[3, 0] = 1
    case = Case(
        probs_STE=np.stack([probs_TE] * 2),
        used_STC=np.tile(np.arange(4) < 2, (2, 9, 1)),
        source_rank_T=np.repeat(np.arange(RANKS), 3),
        prices=prices_at(share_EG, row_s=1e-6, active_s=1e-5, hop_s=0.0),
        null_experts=0,
        strength=0.1,
    )
    for adjusted_TC in case.adjust(MAKERS[name](case.strength, scope), backend):
        assert adjusted_TC[:, 0].all(), "nine tenths of the gate mass"
    only = replace(
        case,
        probs_STE=np.ones((2, 9, 1), dtype=np.float32),
        used_STC=np.ones((2, 9, 1), dtype=np.bool_),
        prices=prices_at(np.eye(1, RANKS), row_s=1e-6, active_s=1e-5, hop_s=0.0),
    )
    for adjusted_TC in only.adjust(MAKERS[name](1.0, scope), backend):
        assert adjusted_TC.all()

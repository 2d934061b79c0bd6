from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.assignment import Assignment
from router.backends import topk
from router.candidates import Candidates
from router.capacity import Capacity
from router.context import RouteContext
from router.placement import place
from router.policies import RoutingPolicy
from router.policies.top_k import TopK
from router.quality import RoutingQuality, routing_quality
from sim.lower import lower
from traces.model import ModelSpec

CONTEXT = RouteContext(layer=0, ranks=1, renormalise=True)


def offered(ids, probs, *, experts: int, null_experts: int = 0) -> Candidates:
    return Candidates(
        ids_TC=np.array(ids, dtype=np.int32),
        probs_TC=np.array(probs, dtype=np.float32),
        source_rank_T=np.zeros(len(ids), dtype=np.int64),
        experts=experts,
        score_kind="softmax",
        null_experts=null_experts,
    )


def route(candidates: Candidates, k: int, capacity: Capacity | None = None) -> Assignment:
    assignment, _ = RoutingPolicy(selection=TopK(k=k), capacity=capacity).route(candidates, CONTEXT, {})
    return assignment


# Two experts, 0 and 1, and two null ones, 2 and 3.
WITH_NULLS = offered(
    [[2, 0, 1, 3], [0, 1, 3, 2], [3, 2, 0, 1]],
    [[0.5, 0.25, 0.125, 0.125], [0.5, 0.25, 0.125, 0.125], [0.5, 0.25, 0.125, 0.125]],
    experts=2,
    null_experts=2,
)


def test_what_null_experts_get_is_kept() -> None:
    # With k = 2, token 0 uses a null expert and a real one, token 1 two real ones, token 2 two null ones: 3 pairs.
    own = route(WITH_NULLS, 2)
    assert own.null_weights_TN.tolist() == [[0.5, 0], [0, 0], [0.25, 0.5]]
    assert routing_quality([WITH_NULLS], [own], top_k=2) == RoutingQuality(
        gate_mass=1.0, dropped_share=0.0, rerouted_share=0.0, experts_per_token=1.0
    )


def test_what_capacity_takes_is_lost_beside_null_experts() -> None:
    # C = ceil(3 * 2 / 2 / 3) = 1: expert 0 keeps token 0's pair, at weight 1, and loses token 1's. Token 0 keeps .75,
    # token 1 .25, token 2 .75, of .75 each; 1 of 3 pairs is dropped.
    limited = route(WITH_NULLS, 2, Capacity(factor=1 / 3, drop="position"))
    quality = routing_quality([WITH_NULLS], [limited], top_k=2)
    assert quality.gate_mass == pytest.approx(1.75 / 2.25)
    assert quality.dropped_share == pytest.approx(1 / 3)
    assert quality.experts_per_token == pytest.approx(2 / 3)


def test_tokens_with_null_experts_alone_drop_nothing_and_send_nothing() -> None:
    nulls = offered([[3, 2], [2, 3]], [[0.75, 0.25], [0.5, 0.25]], experts=2, null_experts=2)
    assignment = route(nulls, 2)
    assert routing_quality([nulls], [assignment], top_k=2) == RoutingQuality(
        gate_mass=1.0, dropped_share=0.0, rerouted_share=0.0, experts_per_token=0.0
    )
    model = ModelSpec(name="tiny", layers=1, experts=2, top_k=2, hidden=4, expert_hidden=4, null_experts=2)
    placement = place("contiguous", np.ones((1, 2)), slots=2, ranks=1)
    work = lower(
        model,
        [assignment],
        placement,
        policy=RoutingPolicy(selection=TopK(k=2)),
        source_rank_T=nulls.source_rank_T,
    )
    assert work.rows_LS.sum() == work.pairs_LGG.sum() == work.copies_LGG.sum() == 0


def test_a_rerouted_pair_counts_with_its_new_score() -> None:
    # Token 0 was to use experts 0 and 1 (.5 + .25), and uses 0 and 2 (.5 + .125) of the four.
    candidates = offered([[0, 1, 2, 3]], [[0.5, 0.25, 0.125, 0.125]], experts=4)
    chosen = route(candidates, 2)
    moved = replace(
        chosen,
        ids_TK=np.array([[0, 2]], dtype=np.int32),
        scores_TK=np.array([[0.5, 0.125]], dtype=np.float32),
        rerouted_TK=np.array([[False, True]]),
    )
    assert routing_quality([candidates], [moved], top_k=2) == RoutingQuality(
        gate_mass=0.625 / 0.75, dropped_share=0.0, rerouted_share=0.5, experts_per_token=2.0
    )


def test_more_experts_than_the_model_uses_earn_nothing() -> None:
    candidates = offered([[0, 1, 2]], [[0.5, 0.25, 0.25]], experts=3)
    assert routing_quality([candidates], [route(candidates, 3)], top_k=1).gate_mass == 1


@st.composite
def steps(draw: st.DrawFn) -> tuple[Candidates, int]:
    tokens, experts, nulls = draw(st.integers(1, 20)), draw(st.integers(1, 6)), draw(st.integers(0, 4))
    logits_TX = np.random.default_rng(draw(st.integers(0, 999))).normal(size=(tokens, experts + nulls))
    exp_TX = np.exp(logits_TX).astype(np.float32)
    probs_TC, ids_TC = topk(exp_TX / exp_TX.sum(axis=1, keepdims=True), experts + nulls)
    candidates = offered(ids_TC, probs_TC, experts=experts, null_experts=nulls)
    return candidates, draw(st.integers(1, experts + nulls))


@given(steps(), st.floats(0.75, 2.0))
def test_pairs_and_null_choices_add_up(step: tuple[Candidates, int], factor: float) -> None:
    candidates, k = step
    free, limited = route(candidates, k), route(candidates, k, Capacity(factor=factor))
    pairs_T = free.chosen_TK.sum(axis=1)
    nulls_T = 0 if free.null_weights_TN is None else (free.null_weights_TN > 0).sum(axis=1)
    assert (pairs_T + nulls_T == k).all()
    quality, lesser = (routing_quality([candidates], [a], top_k=k) for a in (free, limited))
    assert quality.gate_mass == pytest.approx(1)
    assert quality.dropped_share == 0
    assert 0 <= lesser.gate_mass <= quality.gate_mass + 1e-9
    assert lesser.experts_per_token == pytest.approx(quality.experts_per_token * (1 - lesser.dropped_share))

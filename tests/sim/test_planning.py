"""What earlier traffic and a deployment's costs say to a placement, by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cost_models.cluster import gpu_cluster
from cost_models.devices import device
from cost_models.roofline import Roofline
from router.placement.problem import PlacementProblem
from sim.layout import Layout
from sim.planning import rows_LE, with_steps
from traces.batching import Step
from traces.model import ModelSpec
from traces.trace import RoutingTrace

MODEL = ModelSpec(name="tiny", layers=2, experts=4, top_k=2, hidden=8, expert_hidden=16)
# Four tokens in two layers, three candidates each, of which the model uses two.
IDS_TLC = np.array(
    [[[0, 1, 2], [3, 2, 1]], [[0, 2, 1], [3, 1, 0]], [[3, 0, 1], [0, 1, 2]], [[0, 3, 2], [3, 2, 0]]], dtype=np.uint16
)
# Tokens 0 and 1 in the first step, 2 and 3 in the second, one on each of two ranks.
STEPS = [Step(tokens_T=np.array(tokens), source_rank_T=np.array([0, 1])) for tokens in ([0, 1], [2, 3])]


def trace_of(model: ModelSpec = MODEL) -> RoutingTrace:
    return RoutingTrace(
        model=model,
        expert_ids_TLC=IDS_TLC,
        gates_TLC=None,
        request_T=np.zeros(4, dtype=np.int32),
        position_T=np.arange(4, dtype=np.int32),
        phase_T=np.ones(4, dtype=np.uint8),
        score_kind="none",
        source="by hand",
    )


def known(trace: RoutingTrace, **other: Any) -> PlacementProblem:
    cluster = gpu_cluster(device("h100_sxm"), 2)
    problem = PlacementProblem(
        loads_LE=np.ones((2, 4)), ranks=2, slots=6, nodes=2, groups=2, away_share=0.5, seed=7, steps_WLE=None
    )
    details: dict[str, Any] = {"layout": Layout.on(cluster), "protocol": "per_expert", **other}
    return with_steps(problem, trace, STEPS, costs=Roofline(cluster), **details)


def test_rows_of_steps_count_the_models_own_top_k() -> None:
    assert rows_LE(trace_of(), STEPS[0]).tolist() == [[2, 1, 1, 0], [0, 1, 1, 2]]
    steps_WLE = known(trace_of()).steps_WLE
    assert steps_WLE is not None
    assert steps_WLE.tolist() == [[[2, 1, 1, 0], [0, 1, 1, 2]], [[2, 0, 0, 2], [1, 1, 1, 1]]]


def test_tokens_are_known_by_the_experts_that_they_use() -> None:
    ids_TLK = known(trace_of()).ids_TLK
    assert ids_TLK is not None
    assert ids_TLK.tolist() == IDS_TLC[:, :, :2].tolist()


def test_tokens_that_use_null_experts_are_not_known() -> None:
    some_null = replace(MODEL, experts=3, null_experts=1, null_kind="zero")
    problem = with_steps(
        PlacementProblem(loads_LE=np.ones((2, 3)), ranks=2, slots=4),
        trace_of(some_null),
        STEPS,
        costs=Roofline(gpu_cluster(device("h100_sxm"), 2)),
        layout=Layout.one_node(2),
        protocol="per_expert",
    )
    assert problem.ids_TLK is None
    assert problem.steps_WLE is not None
    assert problem.steps_WLE.tolist() == [[[2, 1, 1], [0, 1, 1]], [[2, 0, 0], [1, 1, 1]]]


def test_what_was_asked_stays_as_it_was() -> None:
    problem = known(trace_of())
    assert (problem.ranks, problem.slots, problem.nodes, problem.groups) == (2, 6, 2, 2)
    assert (problem.away_share, problem.seed) == (0.5, 7)


def test_a_rank_may_hold_all_its_slots_active_with_the_rows_of_every_rank() -> None:
    seconds = known(trace_of()).seconds
    assert seconds is not None
    assert seconds.active_A.tolist() == [0, 1, 2, 3]  # three of the six slots
    assert seconds.rows_R[-1] >= 2 * 1 * 2  # two ranks, a token each, two experts


@pytest.mark.parametrize(
    ("choice", "split"), [("even", None), ("local", None), ("nearest", None), ("fewest_active", "fewest_active")]
)
def test_only_a_choice_by_counts_is_a_split(choice: Any, split: str | None) -> None:
    assert known(trace_of(), replica_choice=choice).split == split

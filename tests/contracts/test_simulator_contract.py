"""What both simulators must hold: the same stages give the same timeline where nothing contends."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.replay import SIMULATORS
from sim.stages import Stage
from sim.timeline import Timeline

every_simulator = pytest.mark.parametrize("simulate", SIMULATORS.values(), ids=SIMULATORS)


def compute(name: str, *seconds_G: float, under_next: bool = False) -> Stage:
    """One layer of a compute stage."""
    return Stage(name=name, stream="compute", seconds_LG=np.array([seconds_G]), under_next=under_next)


def communicate(name: str, seconds: float, ranks: int = 2) -> Stage:
    return Stage(name=name, stream="communication", seconds_LG=np.full((1, ranks), seconds))


def times(timeline: Timeline, operation: str) -> list[tuple[float, float]]:
    """Start and end on each rank, in rank order."""
    found = sorted((i.rank, i.start_s, i.end_s) for i in timeline.intervals if i.operation == operation)
    return [(start_s, end_s) for _, start_s, end_s in found]


@every_simulator
def test_a_collective_waits_for_the_slowest_rank(simulate: Any) -> None:
    # Ranks are ready after 1 s and 3 s; 2 s of all-to-all: both are done at 5 s.
    timeline = simulate([compute("gate", 1, 3), communicate("dispatch", 2)])
    assert times(timeline, "dispatch") == [(3, 5), (3, 5)]
    assert timeline.step_s == 5


@every_simulator
def test_ranks_meet_at_every_collective(simulate: Any) -> None:
    # 1 | 3, meet at 3; 2 s; 4 | 1, meet at 9; 1 s; then 1 | 2: the step ends at 12. Slowest first: 3 + 2 + 4 + 1 + 2.
    timeline = simulate(
        [
            compute("gate", 1, 3),
            communicate("dispatch", 2),
            compute("experts", 4, 1),
            communicate("return", 1),
            compute("combine", 1, 2),
        ]
    )
    assert times(timeline, "experts") == [(5, 9), (5, 6)]
    assert times(timeline, "combine") == [(10, 11), (10, 12)]
    assert timeline.step_s == 12


@every_simulator
def test_layers_follow_one_another(simulate: Any) -> None:
    gate = Stage(name="gate", stream="compute", seconds_LG=np.array([[1.0, 3.0], [2.0, 1.0]]))
    dispatch = Stage(name="dispatch", stream="communication", seconds_LG=np.array([[2.0, 2.0], [1.0, 1.0]]))
    # Layer 0 ends at 5 for both; layer 1: 7 | 6, meet at 7, 8.
    timeline = simulate([gate, dispatch])
    assert timeline.step_s == 8
    assert [i.layer for i in timeline.intervals if i.operation == "dispatch" and i.rank == 0] == [0, 1]


@every_simulator
@pytest.mark.parametrize(("shared_s", "experts_start_s"), [(1, 3), (2, 3), (5, 6)])
def test_shared_experts_hide_under_the_dispatch(simulate: Any, shared_s: float, experts_start_s: float) -> None:
    # Gate 1 s, dispatch 2 s: experts start at 3, or when the rank's shared experts are done.
    timeline = simulate(
        [
            compute("gate", 1, 1),
            compute("shared", shared_s, 0, under_next=True),
            communicate("dispatch", 2),
            compute("experts", 1, 1),
        ]
    )
    assert times(timeline, "shared") == [(1, 1 + shared_s), (1, 1)]
    assert times(timeline, "dispatch") == [(1, 3), (1, 3)]
    assert times(timeline, "experts") == [(experts_start_s, experts_start_s + 1), (3, 4)]


@every_simulator
def test_one_compute_stream_does_one_thing_at_a_time(simulate: Any) -> None:
    # A second compute stage cannot hide under the dispatch too: it queues behind the shared experts.
    timeline = simulate([compute("shared", 3, 3, under_next=True), compute("gate", 1, 1), communicate("dispatch", 2)])
    assert times(timeline, "gate") == [(3, 4), (3, 4)]
    assert timeline.step_s == 6


@every_simulator
def test_a_step_lasts_until_the_last_interval_ends(simulate: Any) -> None:
    timeline = simulate([communicate("return", 1), compute("shared", 4, 0, under_next=True)])
    assert timeline.step_s == 5


@every_simulator
def test_a_rank_is_idle_while_it_waits_for_others(simulate: Any) -> None:
    """Layer 0: rank 0 waits 3 - 1 s for rank 1; layer 1: rank 1 waits 2 - 1 s for rank 0."""
    gate = Stage(name="gate", stream="compute", seconds_LG=np.array([[1.0, 3.0], [2.0, 1.0]]))
    assert simulate([gate, communicate_layers("dispatch", [2.0, 1.0])]).idle_G().tolist() == [2, 1]


def communicate_layers(name: str, seconds_L: list[float]) -> Stage:
    return Stage(name=name, stream="communication", seconds_LG=np.repeat(np.array(seconds_L)[:, None], 2, axis=1))


@st.composite
def any_stages(draw: st.DrawFn) -> list[Stage]:
    """Stages of any kind in any order: compute, compute under the next, collectives."""
    layers, ranks = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    seconds = st.one_of(st.just(0.0), st.integers(0, 5).map(float), st.floats(0, 1e3))
    stages = []
    for index, kind in enumerate(
        draw(st.lists(st.sampled_from(["compute", "under", "collective"]), min_size=1, max_size=7))
    ):
        columns = 1 if kind == "collective" else ranks
        flat = draw(st.lists(seconds, min_size=layers * columns, max_size=layers * columns))
        stages.append(
            Stage(
                name=f"{kind} {index}",
                stream="communication" if kind == "collective" else "compute",
                seconds_LG=np.broadcast_to(np.array(flat).reshape(layers, columns), (layers, ranks)),
                under_next=kind == "under",
            )
        )
    return stages


@settings(max_examples=300, deadline=None)
@given(stages=any_stages())
def test_analytic_and_event_agree_since_nothing_contends(stages: Sequence[Stage]) -> None:
    analytic, event = (SIMULATORS[fidelity](stages) for fidelity in ("analytic", "event"))
    assert analytic.step_s <= event.step_s
    assert analytic == event


@every_simulator
@settings(max_examples=150, deadline=None)
@given(stages=any_stages())
def test_a_timeline_runs_every_stage_once_without_overlap(simulate: Any, stages: Sequence[Stage]) -> None:
    timeline = simulate(stages)
    layers, ranks = stages[0].seconds_LG.shape
    found = sorted((i.operation, i.layer, i.rank) for i in timeline.intervals)
    assert found == sorted((s.name, layer, rank) for s in stages for layer in range(layers) for rank in range(ranks))
    expected_s = {stage.name: stage.seconds_LG for stage in stages}
    for rank in range(ranks):
        for stream in ("compute", "communication"):
            line = sorted((i.start_s, i.end_s) for i in timeline.intervals if (i.rank, i.stream) == (rank, stream))
            assert all(one[1] <= other[0] for one, other in pairwise(line))
    for i in timeline.intervals:
        assert i.end_s - i.start_s == pytest.approx(expected_s[i.operation][i.layer, i.rank], abs=1e-9)
    starts = [(i.start_s, i.rank) for i in timeline.intervals]
    assert starts == sorted(starts)
    # A rank is idle while neither of its streams runs: the step less the union of its intervals.
    for rank, idle_s in enumerate(timeline.idle_G()):
        edges = sorted({0.0, timeline.step_s} | {t for i in timeline.intervals for t in (i.start_s, i.end_s)})
        busy_s = sum(
            end_s - start_s
            for start_s, end_s in pairwise(edges)
            if any(i.start_s <= start_s and end_s <= i.end_s for i in timeline.intervals if i.rank == rank)
        )
        assert idle_s == pytest.approx(timeline.step_s - busy_s, abs=1e-9)
        assert idle_s >= -1e-9


@every_simulator
@settings(max_examples=100, deadline=None)
@given(stages=any_stages(), more=st.floats(0, 100))
def test_a_slower_stage_never_ends_the_step_earlier(simulate: Any, stages: Sequence[Stage], more: float) -> None:
    slower = [
        Stage(name=s.name, stream=s.stream, seconds_LG=s.seconds_LG + more * (i == 0), under_next=s.under_next)
        for i, s in enumerate(stages)
    ]
    assert simulate(slower).step_s >= simulate(stages).step_s - 1e-9

"""The timeline as a file: what Perfetto reads."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sim.analytic import simulate_analytic
from sim.program import Program
from sim.stages import Block, Stage
from sim.timeline import Timeline, write_chrome_trace

STAGES = [
    Stage(name="gate", stream="compute", seconds_LG=np.array([[1.0, 3.0], [2.0, 1.0]])),
    Stage(name="shared", stream="compute", seconds_LG=np.array([[4.0, 0.5], [0.0, 1.0]]), under_next=True),
    Stage(name="dispatch", stream="communication", seconds_LG=np.array([[2.0, 2.0], [1.0, 1.0]])),
    Stage(name="experts", stream="compute", seconds_LG=np.array([[1.0, 1.0], [2.0, 5.0]])),
]


def simulated(stages: list[Stage] = STAGES, *, lanes: int = 1) -> Timeline:
    return simulate_analytic(Program.of([(Block.of(stages),)] * lanes))


def test_a_chrome_trace_holds_every_interval_in_microseconds(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "timeline.json"
    timeline = simulated()
    write_chrome_trace(path, {"baseline": timeline, "winner": timeline})
    document = json.loads(path.read_text(encoding="utf-8"))
    events = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert len(events) == 2 * len(timeline.intervals) == 2 * 4 * 2 * 2
    gate = next(e for e in events if e["name"] == "gate" and e["args"]["layer"] == 0 and e["pid"] == 2)
    assert (gate["ts"], gate["dur"], gate["cat"]) == (0, 3e6, "compute")


def test_each_rank_is_a_process_and_each_stream_a_named_thread(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    write_chrome_trace(path, {"baseline": simulated(), "winner": simulated()})
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes == {
        1: "baseline: rank 0",
        2: "baseline: rank 1",
        3: "winner: rank 0",
        4: "winner: rank 1",
    }
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    used = {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"}
    assert used == set(threads)
    assert {threads[e["pid"], e["tid"]] == e["cat"] for e in events if e["ph"] == "X"} == {True}


@pytest.mark.parametrize("lanes", [1, 2])
def test_nothing_overlaps_on_one_thread(tmp_path: Path, lanes: int) -> None:
    path = tmp_path / "timeline.json"
    write_chrome_trace(path, {"only": simulated(lanes=lanes)})
    events = [e for e in json.loads(path.read_text(encoding="utf-8"))["traceEvents"] if e["ph"] == "X"]
    for thread in {(e["pid"], e["tid"]) for e in events}:
        line = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if (e["pid"], e["tid"]) == thread)
        assert all(before[1] <= after[0] for before, after in pairwise(line))


def test_two_microbatches_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    write_chrome_trace(path, {"only": simulated(lanes=2)})
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    names = {e["name"] for e in events if e["ph"] == "X"}
    assert names == {f"{stage.name} {half}" for stage in STAGES for half in "AB"}
    assert sum(e["ph"] == "X" for e in events) == 2 * 4 * 2 * 2


def test_intervals_come_in_order_of_start_rank_and_stream() -> None:
    # Gate 1 | 3 s, then the dispatch of 2 s and, beside it, shared experts from when their rank is ready.
    first_layer = [stage_of_layer(stage, 0) for stage in STAGES]
    assert [(i.start_s, i.rank, i.stream, i.operation) for i in simulated(first_layer).intervals] == [
        (0, 0, "compute", "gate"),
        (0, 1, "compute", "gate"),
        (1, 0, "compute", "shared"),
        (3, 0, "communication", "dispatch"),
        (3, 1, "communication", "dispatch"),
        (3, 1, "compute", "shared"),
        (5, 0, "compute", "experts"),
        (5, 1, "compute", "experts"),
    ]


def stage_of_layer(stage: Stage, layer: int) -> Stage:
    return replace(stage, seconds_LG=stage.seconds_LG[layer : layer + 1])


def test_what_never_ran_is_no_interval_and_takes_no_time() -> None:
    """A rank that was lost has NaN from then on."""
    timeline = simulated()
    lost = replace(
        timeline,
        start_OG=np.where([True, False], timeline.start_OG, np.nan),
        end_OG=np.where([True, False], timeline.end_OG, np.nan),
    )
    assert {i.rank for i in lost.intervals} == {0}
    assert lost.step_s == timeline.end_OG[:, 0].max()
    assert lost.idle_G()[1] == lost.step_s
    nothing = replace(lost, start_OG=np.full_like(lost.start_OG, np.nan), end_OG=np.full_like(lost.end_OG, np.nan))
    assert nothing.step_s == 0.0
    assert nothing.intervals == ()

"""The timeline as a file: what Perfetto reads."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np

from sim.analytic import simulate_analytic
from sim.stages import Stage
from sim.timeline import Interval, Timeline, write_chrome_trace

STAGES = [
    Stage(name="gate", stream="compute", seconds_LG=np.array([[1.0, 3.0], [2.0, 1.0]])),
    Stage(name="shared", stream="compute", seconds_LG=np.array([[4.0, 0.5], [0.0, 1.0]]), under_next=True),
    Stage(name="dispatch", stream="communication", seconds_LG=np.array([[2.0, 2.0], [1.0, 1.0]])),
    Stage(name="experts", stream="compute", seconds_LG=np.array([[1.0, 1.0], [2.0, 5.0]])),
]


def test_a_chrome_trace_holds_every_interval_in_microseconds(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "timeline.json"
    timeline = simulate_analytic(STAGES)
    write_chrome_trace(path, {"baseline": timeline, "winner": timeline})
    document = json.loads(path.read_text(encoding="utf-8"))
    events = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert len(events) == 2 * len(timeline.intervals) == 2 * 4 * 2 * 2
    gate = next(e for e in events if e["name"] == "gate" and e["args"]["layer"] == 0 and e["pid"] == 2)
    assert (gate["ts"], gate["dur"], gate["cat"]) == (0, 3e6, "compute")


def test_each_rank_is_a_process_and_each_stream_a_named_thread(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    write_chrome_trace(path, {"baseline": simulate_analytic(STAGES), "winner": simulate_analytic(STAGES)})
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


def test_nothing_overlaps_on_one_thread(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    write_chrome_trace(path, {"only": simulate_analytic(STAGES)})
    events = [e for e in json.loads(path.read_text(encoding="utf-8"))["traceEvents"] if e["ph"] == "X"]
    for thread in {(e["pid"], e["tid"]) for e in events}:
        line = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if (e["pid"], e["tid"]) == thread)
        assert all(before[1] <= after[0] for before, after in pairwise(line))


def test_intervals_come_in_one_order_however_they_were_found() -> None:
    def interval(rank: int, start_s: float, operation: str = "gate") -> Interval:
        return Interval(rank=rank, stream="compute", operation=operation, layer=0, start_s=start_s, end_s=start_s + 1)

    intervals = [interval(1, 0), interval(0, 2), interval(0, 0), interval(0, 0, "a")]
    timeline = Timeline.of(2, intervals)
    assert timeline == Timeline.of(2, intervals[::-1])
    assert [(i.start_s, i.rank, i.operation) for i in timeline.intervals] == [
        (0, 0, "a"),
        (0, 0, "gate"),
        (0, 1, "gate"),
        (2, 0, "gate"),
    ]


def test_an_empty_timeline_takes_no_time() -> None:
    assert Timeline.of(2, []).step_s == 0.0

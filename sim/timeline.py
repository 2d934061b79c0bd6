"""Timeline: what ran when, on which rank and stream."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from sim.program import STREAMS, Program
from sim.stages import Stream
from traces.files import write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """One stage of one layer and microbatch (`lane`) on one rank; seconds from the start of the step."""

    rank: int
    stream: Stream
    operation: str
    layer: int
    lane: int
    start_s: float
    end_s: float


@dataclass(frozen=True, eq=False, kw_only=True)  # no slots: what is derived is made once and kept
class Timeline:
    """When each operation of a program ran on each rank: `start_OG` to `end_OG`, NaN where it never did."""

    program: Program
    start_OG: NDArray[np.float64]
    end_OG: NDArray[np.float64]

    @property
    def ranks(self) -> int:
        """G."""
        return self.program.ranks

    @cached_property
    def step_s(self) -> float:
        """When the last operation ends."""
        return float(np.nanmax(self.end_OG, initial=0.0))

    @cached_property
    def intervals(self) -> tuple[Interval, ...]:
        """All of it, in order of start, rank and stream."""
        program = self.program
        found = [
            Interval(
                rank=rank,
                stream=STREAMS[program.stream_O[o]],
                operation=program.name_O[o],
                layer=int(program.layer_O[o]),
                lane=int(program.lane_O[o]),
                start_s=float(self.start_OG[o, rank]),
                end_s=float(self.end_OG[o, rank]),
            )
            for o, rank in zip(*np.nonzero(~np.isnan(self.start_OG)), strict=True)
            for rank in [int(rank)]
        ]
        return tuple(sorted(found, key=lambda i: (i.start_s, i.rank, i.stream, i.layer, i.lane, i.end_s, i.operation)))

    def idle_G(self) -> NDArray[np.float64]:
        """Seconds of the step in which neither stream of a rank runs anything."""
        idle_G = np.empty(self.ranks)
        _idle(self.start_OG, self.end_OG, self.program.stream_O, self.step_s, idle_G)
        return idle_G

    @cached_property
    def arrival_OG(self) -> NDArray[np.float64]:
        """When each rank came to each collective: when its lane was done with what goes before; NaN for computation."""
        arrival_OG = np.full_like(self.end_OG, np.nan)
        _arrivals(self.end_OG, self.program.lane_O, self.program.stream_O, self.program.lanes, arrival_OG)
        return arrival_OG


@numba.njit(cache=True)
def _arrivals(end_OG: Any, lane_O: Any, stream_O: Any, lanes: int, arrival_OG: Any) -> None:
    ready = np.zeros((lanes, end_OG.shape[1]))
    for o in range(end_OG.shape[0]):
        for g in range(end_OG.shape[1]):
            if stream_O[o] == 1:
                arrival_OG[o, g] = ready[lane_O[o], g]
            if end_OG[o, g] > ready[lane_O[o], g]:
                ready[lane_O[o], g] = end_OG[o, g]


@numba.njit(cache=True)
def _idle(start_OG: Any, end_OG: Any, stream_O: Any, step_s: float, idle_G: Any) -> None:
    """Merge the two streams of each rank, each already in order."""
    operations = start_OG.shape[0]
    for g in range(idle_G.size):
        busy = 0.0
        until = 0.0
        cursor = np.zeros(2, dtype=np.int64)
        while True:
            for stream in range(2):
                while cursor[stream] < operations and (
                    stream_O[cursor[stream]] != stream or np.isnan(start_OG[cursor[stream], g])
                ):
                    cursor[stream] += 1
            if cursor.min() >= operations:
                break
            first = 0
            if cursor[0] >= operations or (cursor[1] < operations and start_OG[cursor[1], g] < start_OG[cursor[0], g]):
                first = 1
            o = cursor[first]
            busy += max(end_OG[o, g] - max(start_OG[o, g], until), 0.0)
            until = max(until, end_OG[o, g])
            cursor[first] += 1
        idle_G[g] = step_s - busy


def write_chrome_trace(path: Path, timelines: Mapping[str, Timeline]) -> None:
    """Write timelines side by side in the Chrome trace format, which Perfetto and chrome://tracing open.

    A process for each rank of each timeline, a thread for each stream; times in microseconds, as the format wants.
    """
    threads: dict[Stream, int] = {"compute": 1, "communication": 2}
    events: list[dict[str, object]] = []
    process = 0
    for name, timeline in timelines.items():
        by_rank: list[list[Interval]] = [[] for _ in range(timeline.ranks)]
        for interval in timeline.intervals:
            by_rank[interval.rank].append(interval)
        several = timeline.program.lanes > 1
        for rank, intervals in enumerate(by_rank):
            process += 1
            label = {"name": f"{name}: rank {rank}"}
            events.append({"ph": "M", "pid": process, "name": "process_name", "args": label})
            events.append({"ph": "M", "pid": process, "name": "process_sort_index", "args": {"sort_index": process}})
            for stream, thread in threads.items():
                events.append(
                    {"ph": "M", "pid": process, "tid": thread, "name": "thread_name", "args": {"name": stream}}
                )
            events += [
                {
                    "ph": "X",
                    "pid": process,
                    "tid": threads[interval.stream],
                    "name": f"{interval.operation} {chr(ord('A') + interval.lane)}" if several else interval.operation,
                    "cat": interval.stream,
                    "ts": interval.start_s * 1e6,
                    "dur": (interval.end_s - interval.start_s) * 1e6,
                    "args": {"layer": interval.layer},
                }
                for interval in intervals
            ]
    write_json(path, {"traceEvents": events, "displayTimeUnit": "ms"})

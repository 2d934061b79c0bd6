"""Timeline: what ran when, on which rank and stream."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sim.stages import Stream
from traces.files import write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """One stage of one layer on one rank; seconds from the start of the step."""

    rank: int
    stream: Stream
    operation: str
    layer: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """All intervals of one step, in order of start, rank and stream."""

    ranks: int
    intervals: tuple[Interval, ...]

    @property
    def step_s(self) -> float:
        """When the last interval ends."""
        return max((interval.end_s for interval in self.intervals), default=0.0)

    def idle_G(self) -> NDArray[np.float64]:
        """Seconds of the step in which neither stream of a rank runs anything."""
        idle_G = np.full(self.ranks, self.step_s)
        busy_until_G = np.zeros(self.ranks)
        for interval in self.intervals:  # in order of start
            rank = interval.rank
            idle_G[rank] -= max(interval.end_s - max(interval.start_s, busy_until_G[rank]), 0.0)
            busy_until_G[rank] = max(busy_until_G[rank], interval.end_s)
        return idle_G

    @classmethod
    def of(cls, ranks: int, intervals: list[Interval]) -> "Timeline":
        """Put the intervals into the one order that both simulators give."""
        in_order = sorted(intervals, key=lambda i: (i.start_s, i.rank, i.stream, i.layer, i.end_s, i.operation))
        return cls(ranks=ranks, intervals=tuple(in_order))


def write_chrome_trace(path: Path, timelines: dict[str, Timeline]) -> None:
    """Write timelines side by side in the Chrome trace format, which Perfetto and chrome://tracing open.

    A process for each rank of each timeline, a thread for each stream; times in microseconds, as the format wants.
    """
    threads: dict[Stream, int] = {"compute": 1, "communication": 2}
    events: list[dict[str, object]] = []
    process = 0
    for name, timeline in timelines.items():
        for rank in range(timeline.ranks):
            process += 1
            names = {"process_name": f"{name}: rank {rank}"}
            events.append({"ph": "M", "pid": process, "name": "process_name", "args": {"name": names["process_name"]}})
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
                    "name": interval.operation,
                    "cat": interval.stream,
                    "ts": interval.start_s * 1e6,
                    "dur": (interval.end_s - interval.start_s) * 1e6,
                    "args": {"layer": interval.layer},
                }
                for interval in timeline.intervals
                if interval.rank == rank
            ]
    write_json(path, {"traceEvents": events, "displayTimeUnit": "ms"})

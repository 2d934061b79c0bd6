"""Timing a call on a device: CPU time for computation on a CPU, wall time for collectives, events on CUDA.

On a shared machine CPU time varies a few per cent where wall time varies by half; collectives wait for other
processes, so only wall time means anything there.
"""

import time
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

Clock = Literal["compute", "wall"]


def seconds_of_each(
    call: Callable[[], object], repeats: int, device: torch.device, clock: Clock, between: Callable[[], object]
) -> list[float]:
    """Seconds of each of `repeats` calls; `between` runs before each and is not counted."""
    seconds = []
    for _ in range(repeats):
        between()
        seconds.append(_cuda_s(call) if device.type == "cuda" else _cpu_s(call, clock))
    return seconds


def _cpu_s(call: Callable[[], object], clock: Clock) -> float:
    now_ns = time.thread_time_ns if clock == "compute" else time.perf_counter_ns
    start_ns = now_ns()
    call()
    return (now_ns() - start_ns) * 1e-9


def _cuda_s(call: Callable[[], object]) -> float:
    start: torch.Event = torch.Event("cuda", enable_timing=True)
    end: torch.Event = torch.Event("cuda", enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def median_s(seconds: list[float]) -> float:
    """The median, which a few interruptions do not move."""
    return float(np.median(seconds))

"""What a microbenchmark is, and how all of them are measured on several ranks at once.

Every rank runs the same case at the same time, so that what ranks take from each other (memory bandwidth,
caches, power) is in the figures, as it is in a real run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from cost_models.microbench.ranks import RankGroup
from cost_models.microbench.timer import Clock, median_s, seconds_of_each
from cost_models.ops import Operation

_WARM_UP_CALLS = 2
_FEWEST_REPEATS = 7
_MOST_REPEATS: dict[Clock, int] = {"compute": 16, "wall": 60}  # wall time is the noisier one


class Benchmark(Protocol):
    """One operation at several sizes. Picklable: it is sent to the ranks."""

    @property
    def clock(self) -> Clock:
        """`compute` for work of one rank, `wall` for collectives."""

    def cases(self) -> Sequence[Operation]:
        """The operations to time, scalar ones, in order of size: every other one is held out of the fit."""

    def prepare(self, case: Operation, group: RankGroup) -> Callable[[], object]:
        """Make the inputs of a case and return the call to time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Seconds that one operation took: the mean over ranks of each rank's median."""

    operation: Operation
    seconds: float
    repeats: int
    held_out: bool


def rest_of_step(group: RankGroup, *, wait: bool) -> Callable[[], object]:
    """A call that leaves a rank as the rest of a step would: matrix products over other weights, then a wait.

    A kernel that is called again and again finds its data in the caches and its branches predicted; in a step it comes
    after other kernels and a blocking collective, and takes 1.4 to 3 times as long (benchmarks/hot_or_in_step.py).
    Collectives are timed without the `wait`, so that they have the skew of ranks that come to them
    from work.
    """
    weights_XDD = torch.randn(8, 512, 512, device=group.device)  # 8 MB, several times a core's own caches
    rows_ND = torch.randn(16, 512, device=group.device)

    def disturb() -> None:
        for weight_DD in weights_XDD:
            torch.mm(rows_ND, weight_DD)
        if wait:
            group.barrier()

    return disturb


def measure(group: RankGroup, plan: tuple[Sequence[Benchmark], float]) -> list[Measurement]:
    """Measure every case of the plan's benchmarks, about the plan's seconds each; the same list on every rank."""
    benchmarks, case_budget_s = plan
    measurements = []
    with torch.inference_mode():
        for benchmark in benchmarks:
            for index, case in enumerate(benchmark.cases()):
                torch.manual_seed(index)
                call = benchmark.prepare(case, group)
                between = rest_of_step(group, wait=benchmark.clock == "compute")
                first_s = seconds_of_each(call, _WARM_UP_CALLS, group.device, "wall", between)[-1]
                slowest_s = max(group.gather(first_s))
                repeats = int(min(max(case_budget_s / slowest_s, _FEWEST_REPEATS), _MOST_REPEATS[benchmark.clock]))
                group.barrier()
                own_s = median_s(seconds_of_each(call, repeats, group.device, benchmark.clock, between))
                by_rank_s = group.gather(own_s)
                measurements.append(
                    Measurement(
                        operation=case,
                        seconds=sum(by_rank_s) / len(by_rank_s),
                        repeats=repeats,
                        held_out=index % 2 == 1,
                    )
                )
    return measurements

"""The same kernels called again and again, and after what the rest of a step does: CPU time on two ranks, in turn.

python benchmarks/hot_or_in_step.py
"""

import os
import statistics

import numpy as np
import torch

from cost_models.microbench.benchmark import Benchmark, rest_of_step
from cost_models.microbench.permute import CombineBenchmark, PermuteBenchmark
from cost_models.microbench.ranks import RankGroup, run_on_ranks
from cost_models.microbench.timer import seconds_of_each
from cost_models.ops import Combine, Gate, Operation, Permute, Route
from router.nn.microbench import GateBenchmark
from router.nn.route_benchmark import RouteBenchmark

TOKENS, K, HIDDEN, EXPERTS, ROUNDS = 1024, 4, 128, 16, 30
CASES: list[tuple[Benchmark, Operation]] = [
    (
        GateBenchmark(hidden=HIDDEN, experts=EXPERTS),
        Gate(tokens_X=np.array(TOKENS), hidden=HIDDEN, experts=EXPERTS),
    ),
    (
        RouteBenchmark(experts=EXPERTS, ranks=2),
        Route(tokens_X=np.array(TOKENS), width=K, parts=("top_p",)),
    ),
    (
        PermuteBenchmark(hidden=HIDDEN, slots=EXPERTS, row_bytes=4 * HIDDEN),
        Permute(pairs_X=np.array(TOKENS * K), rows_X=np.array(TOKENS * K), row_bytes=4 * HIDDEN),
    ),
    (
        CombineBenchmark(hidden=HIDDEN, row_bytes=4 * HIDDEN),
        Combine(rows_X=np.array(TOKENS * K), tokens_X=np.array(TOKENS), row_bytes=4 * HIDDEN),
    ),
]


def measure(group: RankGroup, rounds: int) -> dict[str, tuple[float, float]]:
    medians = {}
    disturb = rest_of_step(group, wait=True)
    with torch.inference_mode():
        for benchmark, case in CASES:
            call = benchmark.prepare(case, group)
            hot, in_step = [], []
            for _ in range(rounds):
                hot += seconds_of_each(call, 4, group.device, "compute", lambda: None)[1:]
                in_step += seconds_of_each(call, 1, group.device, "compute", disturb)
            medians[type(case).__name__] = (statistics.median(hot), statistics.median(in_step))
    return medians


def main() -> None:
    medians = run_on_ranks(measure, ROUNDS, ranks=2)
    print(f"{TOKENS} tokens, top {K}, {ROUNDS} rounds, load average {os.getloadavg()[0]:.1f}")
    for name, (hot_s, in_step_s) in medians.items():
        print(f"{name:8} hot {hot_s * 1e6:6.0f} us, in a step {in_step_s * 1e6:6.0f} us: {in_step_s / hot_s:.2f} times")


if __name__ == "__main__":
    main()

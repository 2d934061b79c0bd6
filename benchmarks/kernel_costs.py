"""What measured kernels cost to use: predictions a second on one core, and the time to load a profile.

python benchmarks/kernel_costs.py
"""

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from cost_models.cluster import gpu_cluster
from cost_models.devices import device
from cost_models.kernel_costs import KernelCosts
from cost_models.kernel_profile import SHIPPED, KernelProfile
from cost_models.ops import Experts

OPERATIONS, SLOTS = 1_000_000, 8
ROUNDS = 7


def median_s(call: Callable[[], object]) -> float:
    """Median CPU time of a call; the first compiles and is not counted."""
    seconds = []
    for round_ in range(ROUNDS + 1):
        start = time.process_time()
        call()
        if round_:
            seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def load(path: Path) -> None:
    """Read a profile and unpack each of its fits."""
    for kernel in KernelProfile.read(path).kernels:
        _ = kernel.fit


def main() -> None:
    print(f"{ROUNDS} rounds, medians of CPU time on one core, load average {os.getloadavg()[0]:.1f}")
    rows_XS = np.random.default_rng(0).integers(0, 512, (OPERATIONS, SLOTS))
    for name, dtype in (
        ("h100_sxm_trtllm", "fp8_block"),
        ("h100_sxm_sglang", "fp8_block"),
        ("b200_sxm_trtllm", "nvfp4"),
    ):
        profile = KernelProfile.read(SHIPPED / f"{name}.json")
        costs = KernelCosts([profile], gpu_cluster(device(profile.gpu), 8))
        operation = Experts(
            rows_XS=rows_XS,
            hidden=7168,
            expert_hidden=2048,
            matrices=3,
            weight_bytes=1,
            row_bytes=2 * 7168,
            dtype=dtype,
        )
        seconds = median_s(partial(costs.predict, operation))
        kernel = costs.kernel_for(operation)
        print(f"{name}, {dtype} experts ({kernel.table}): {OPERATIONS / seconds:,.0f} predictions a second")
    for path in sorted(SHIPPED.glob("*.json")):
        load_s = median_s(partial(load, path))
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} KB, loaded and unpacked in {load_s * 1e3:.1f} ms")


if __name__ == "__main__":
    main()

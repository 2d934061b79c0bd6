"""The same kernels in processes that give freed memory back and in ones that keep it, as ranks do, in turn: CPU time.

python benchmarks/kept_memory.py
"""

import os
import statistics
import subprocess
import sys

from cost_models.microbench.ranks import KEEP_MEMORY

ALLOCATORS = {
    "kept": KEEP_MEMORY,
    "C library's default": {},
    "mapped from 256 KB on": {"MALLOC_MMAP_THRESHOLD_": "262144"},
}
ROUNDS = 5
KERNELS = """
import statistics, time, torch
from cost_models.microbench.permute import combine, regroup
torch.set_num_threads(1)
rows = torch.randn(4096, 128)
weights, pairs = torch.rand(1024, 4), torch.randperm(4096)
times = []
with torch.inference_mode():
    for _ in range(60):
        start = time.thread_time()
        out = combine(regroup(rows, [[256] * 8] * 2), pairs, weights)
        times.append(time.thread_time() - start)
print(statistics.median(times[10:]))
"""


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in ALLOCATORS}
    for _ in range(ROUNDS):
        for name, settings in ALLOCATORS.items():
            inherited = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
            done = subprocess.run(
                [sys.executable, "-c", KERNELS],
                env={**inherited, **settings},
                check=True,
                capture_output=True,
                text=True,
            )
            seconds[name].append(float(done.stdout))
    kept_s = statistics.median(seconds["kept"])
    print(f"regroup and combine of 4096 rows of 512 bytes, {ROUNDS} rounds, load average {os.getloadavg()[0]:.1f}")
    for name, times in seconds.items():
        print(f"{name:22} {statistics.median(times) * 1e6:5.0f} us, {statistics.median(times) / kept_s:.2f} times kept")


if __name__ == "__main__":
    main()

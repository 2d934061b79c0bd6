"""Max-min fair flows and the port-load bound: their times, and what batches of ends cost in accuracy.

python benchmarks/flows.py [--json]

4,032 flows (64 H100, 8 nodes) of uneven sizes, on rails that block nothing and on a spine at 2:1; and 58 all-to-alls
of 1,024 ranks at once. Times are medians of CPU time on one core. The error is against the same flows with each end on
its own, which `tests/sim/test_flows.py` holds against a simulation by the book.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cost_models.cluster import Cluster, gpu_cluster
from cost_models.degrade import degrade
from cost_models.devices import device
from sim.flows import max_min_makespan_s

ROUNDS = 9
RANKS, ROW_BYTES = 64, 7168
LAYERS, MANY_RANKS = 58, 1024
SPREADS = (0.3, 1.0, 2.0)  # of the logarithm of a flow's bytes
SEEDS = 10


def median_s(call: Callable[[], object]) -> float:
    """Median CPU time of a call; the first compiles and is not counted."""
    seconds = []
    for round_ in range(ROUNDS + 1):
        start = time.process_time()
        call()
        if round_:
            seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def uneven_bytes(spread: float, seed: int) -> NDArray[np.float64]:
    """Bytes by rank pair: lognormal, 20 tokens in the median."""
    return 20 * ROW_BYTES * np.random.default_rng(seed).lognormal(0, spread, (RANKS, RANKS))


def batch_errors(cluster: Cluster) -> list[float]:
    """Relative errors of the makespan against each end on its own."""
    errors = []
    for spread in SPREADS:
        for seed in range(SEEDS):
            bytes_GG = uneven_bytes(spread, seed)
            exact_s = max_min_makespan_s(cluster, bytes_GG, batch=0.0)
            errors.append(abs(max_min_makespan_s(cluster, bytes_GG) / exact_s - 1))
    return errors


def over_bound(cluster: Cluster) -> float:
    """How much longer than the port-load bound fair flows take, at most."""
    cases = [uneven_bytes(spread, seed) for spread in SPREADS for seed in range(SEEDS)]
    return max(max_min_makespan_s(cluster, b_GG) / cluster.all_to_all_s(b_GG) - 1 for b_GG in cases)


def measure() -> dict[str, float]:
    h100 = device("h100_sxm")
    clusters = {
        "non_blocking": gpu_cluster(h100, RANKS),
        "oversubscribed": gpu_cluster(h100, RANKS, oversubscription=2.0),
        "degraded": degrade(gpu_cluster(h100, RANKS), ["nic5=0.5", "nic12=lost", "leaf2-spine=0.25"]),
    }
    figures: dict[str, float] = {}
    bytes_GG = uneven_bytes(1.0, 0)
    for name, cluster in clusters.items():
        figures[f"flows_{name}_s"] = median_s(lambda cluster=cluster: max_min_makespan_s(cluster, bytes_GG))
        errors = batch_errors(cluster)
        figures[f"error_{name}_max"] = max(errors)
        figures[f"error_{name}_median"] = statistics.median(errors)
        figures[f"over_bound_{name}_max"] = over_bound(cluster)
    figures["flows_each_end_alone_s"] = median_s(
        lambda: max_min_makespan_s(clusters["non_blocking"], bytes_GG, batch=0.0)
    )
    bytes_LGG = np.stack([bytes_GG] * LAYERS)
    figures["port_load_64_ranks_s"] = median_s(lambda: clusters["non_blocking"].port_load_s(bytes_LGG))
    rows_LGG = np.random.default_rng(0).integers(0, 5, (LAYERS, MANY_RANKS, MANY_RANKS), dtype=np.int32)
    figures["routes_1024_ranks_s"] = median_s(lambda: gpu_cluster(h100, MANY_RANKS).routes)
    many = gpu_cluster(h100, MANY_RANKS)
    figures["port_load_1024_ranks_s"] = median_s(lambda: many.port_load_s(rows_LGG, scale=ROW_BYTES))
    back_LGG = rows_LGG.swapaxes(1, 2)
    figures["port_load_1024_ranks_back_s"] = median_s(lambda: many.port_load_s(back_LGG, scale=ROW_BYTES))
    blocked = gpu_cluster(h100, MANY_RANKS, oversubscription=2.0)
    figures["port_load_1024_ranks_oversubscribed_s"] = median_s(lambda: blocked.port_load_s(rows_LGG, scale=ROW_BYTES))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON document and nothing else")
    as_json = parser.parse_args().json
    figures = measure()
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    print(f"{ROUNDS} rounds, medians of CPU time on one core, load average {os.getloadavg()[0]:.1f}")
    for name, value in figures.items():
        print(f"{name}: {value * 1e3:.2f} ms" if name.endswith("_s") else f"{name}: {value:.4%}")


if __name__ == "__main__":
    main()

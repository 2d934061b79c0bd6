"""How long the simulator takes for a step of DeepSeek-V3's shape, and how that grows with ranks, layers and tokens.

58 MoE layers, 256 experts, top-8, decode on H100s priced by SGLang's measured kernels; 64 ranks of 128 tokens but where
told otherwise. Whole steps, attention and head too. Seconds of one core (CPU time), medians.

python benchmarks/sim_speed.py [--json] [--plot FILE.svg]
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import moeroute as mr
from cost_models.cluster import Cluster, gpu_cluster
from cost_models.kernel_costs import KernelCosts
from router.assignment import Assignment
from router.candidates import Candidates
from router.context import RouteContext
from router.placement.base import Placement
from sim.analytic import simulate_analytic
from sim.blocks import blocks_of
from sim.engine import simulate_events
from sim.execution import Execution
from sim.flows import max_min_makespan_s
from sim.layout import Layout
from sim.lower import Work, lower
from sim.network import Network
from sim.program import Program
from sim.stages import Blocks
from traces.context import Context
from traces.routing import choose_experts

MODEL = mr.preset("deepseek-v3")
POLICY = mr.RoutingPolicy(selection=mr.TopK(k=MODEL.top_k))
ROUNDS = 9
DRAWN = 4  # layers are drawn and come again, so that a step of 1,024 ranks need not be held


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A step to simulate: its ranks, tokens of each, and MoE layers that are simulated one by one."""

    ranks: int = 64
    tokens_per_rank: int = 128
    layers: int = MODEL.layers

    @cached_property
    def cluster(self) -> Cluster:
        return gpu_cluster(mr.device("h100_sxm"), self.ranks)

    @cached_property
    def costs(self) -> KernelCosts:
        return KernelCosts.shipped(self.cluster, "sglang", "trtllm")

    @cached_property
    def source_rank_T(self) -> Any:
        return np.repeat(np.arange(self.ranks), self.tokens_per_rank)

    @cached_property
    def candidates(self) -> list[Candidates]:
        rng = np.random.default_rng(0)
        tokens = self.source_rank_T.size
        found = []
        for layer in range(DRAWN):
            popularity_E = rng.lognormal(sigma=0.5, size=MODEL.experts)
            ids_TC = choose_experts(popularity_E, tokens=tokens, top_k=MODEL.top_k, seed=layer)
            probs_TC = -np.sort(-rng.random(ids_TC.shape, dtype=np.float32), axis=1)
            found.append(
                Candidates(
                    ids_TC=ids_TC,
                    probs_TC=probs_TC,
                    source_rank_T=self.source_rank_T,
                    experts=MODEL.experts,
                    score_kind="softmax",
                )
            )
        return found

    @cached_property
    def drawn(self) -> list[Assignment]:
        return [self.route(layer) for layer in range(DRAWN)]

    @cached_property
    def placement(self) -> Placement:
        slots = max(MODEL.experts, self.ranks)
        placement = Placement(
            slot_to_expert_LS=np.tile(np.arange(slots) % MODEL.experts, (self.layers, 1)),
            experts=MODEL.experts,
            ranks=self.ranks,
        )
        _ = placement.expert_slots_LEX  # planned once, used for many steps
        return placement

    def route(self, layer: int) -> Assignment:
        context = RouteContext(layer=layer, ranks=self.ranks, renormalise=True)
        return POLICY.route(self.candidates[layer % DRAWN], context, {})[0]

    def assignments(self) -> Iterator[Assignment]:
        return (self.drawn[layer % DRAWN] for layer in range(self.layers))

    def routed(self) -> Iterator[Assignment]:
        return (self.route(layer) for layer in range(self.layers))

    def lower(self, assignments: Iterator[Assignment]) -> Work:
        return lower(
            MODEL,
            assignments,
            self.placement,
            policy=POLICY,
            source_rank_T=self.source_rank_T,
            layout=Layout.on(self.cluster),
            context=Context.even(
                "decode", ranks=self.ranks, requests=self.tokens_per_rank, new_tokens=1, cached_tokens=2000
            ),
            dispatch_dtype="fp8",
            row_of_layer=np.arange(MODEL.layers) * self.layers // MODEL.layers,
        )

    def price(self, work: Work) -> Blocks:
        return blocks_of(work, self.costs, Execution(), device=self.cluster.device)

    def analytic(self, work: Work) -> float:
        return simulate_analytic(Program.of([self.price(work)])).step_s

    def event(self, work: Work) -> float:
        network = Network(cluster=self.cluster, costs=self.costs)
        return simulate_events(Program.of([self.price(work)]), network).step_s


def cpu_s(function: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The median CPU time of a call; the first, which compiles, does not count."""
    function()
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def measure() -> dict[str, float]:
    case = _Step()
    sampled = replace(case, layers=8)
    cached = case.lower(case.assignments())
    fabric = gpu_cluster(mr.device("h100_sxm"), 64, oversubscription=2.0)
    bytes_GG = np.random.default_rng(0).lognormal(sigma=0.5, size=(64, 64)) * 1e5
    _ = fabric.routes
    large_s, large_bytes = in_a_process_of_its_own(large_step)
    return {
        "analytic_step_s": cpu_s(lambda: case.analytic(case.lower(case.assignments()))),
        "analytic_cached_step_s": cpu_s(lambda: case.analytic(cached)),
        "event_step_s": cpu_s(lambda: case.event(case.lower(case.assignments()))),
        "policy_step_s": cpu_s(lambda: case.analytic(case.lower(case.routed()))),
        "sampled8_step_s": cpu_s(lambda: sampled.analytic(sampled.lower(sampled.routed()))),
        "flows_s": cpu_s(lambda: max_min_makespan_s(fabric, bytes_GG)),
        "analytic_1024_s": large_s,
        "analytic_1024_peak_bytes": large_bytes,
    }


def large_step() -> tuple[float, float]:
    """1,024 ranks, from assignments: seconds, and the process's peak memory."""
    case = _Step(ranks=1024)
    _ = case.cluster.routes
    seconds = cpu_s(lambda: case.analytic(case.lower(case.assignments())), rounds=3)
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def in_a_process_of_its_own(function: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function)


def growth() -> dict[str, tuple[Sequence[int], list[float], list[float]]]:
    """By what grows: its sizes, and seconds of the analytic and the event simulation from assignments."""
    sweeps: dict[str, list[tuple[int, _Step]]] = {
        "ranks": [(ranks, _Step(ranks=ranks)) for ranks in (8, 16, 32, 64, 128, 256)],
        "MoE layers simulated one by one": [(layers, _Step(layers=layers)) for layers in (4, 8, 16, 29, 58)],
        "tokens a rank": [(tokens, _Step(tokens_per_rank=tokens)) for tokens in (8, 32, 128, 512, 2048)],
    }
    found = {}
    for name, cases in sweeps.items():
        analytic, event = [], []
        for _, case in cases:
            analytic.append(cpu_s(lambda case=case: case.analytic(case.lower(case.assignments())), rounds=3))
            event.append(cpu_s(lambda case=case: case.event(case.lower(case.assignments())), rounds=3))
        found[name] = ([size for size, _ in cases], analytic, event)
    return found


def plot(path: Path) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "moeroute"
    found = growth()
    figure, axes = plt.subplots(1, len(found), figsize=(12, 3.6), sharey=True, layout="constrained")
    for axis, (name, (sizes, analytic, event)) in zip(axes, found.items(), strict=True):
        axis.loglog(sizes, [1e3 * s for s in analytic], "o-", label="lowering + analytic")
        axis.loglog(sizes, [1e3 * s for s in event], "s-", label="lowering + event")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms a step, one core")
    axes[0].legend()
    figure.suptitle("DeepSeek-V3 at decode: 64 ranks x 128 tokens, 58 MoE layers, but for what grows")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--plot", type=Path, help="also plot how time grows into this file")
    options = parser.parse_args()
    figures = measure()
    if options.plot:
        plot(options.plot)
    if options.json:
        print(json.dumps(figures, indent=1))
        return
    print(f"load average {os.getloadavg()[0]:.1f}")
    for name, value in figures.items():
        print(f"{name:26} {value / 1e6:8.0f} MB" if name.endswith("bytes") else f"{name:26} {value * 1e3:8.1f} ms")


if __name__ == "__main__":
    main()

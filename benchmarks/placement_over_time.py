"""The section of `placement.py` on rebalancing: what a placement that follows its traffic saves, moves included.

Synthetic loads drift and burst, and their steps are what `RankSeconds` predicts of experts and exchanges; recorded
steps are simulated whole. Every rebalancer sees earlier steps alone and starts from a balanced plan of earlier loads.
While weights move, the step waits. EPLB runs at three intervals, and is compared to by the best of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from placement_cases import loads_of
from placement_recorded import Deployment, deployment_for_rebalancing

from cost_models.cluster import gpu_cluster
from cost_models.devices import device
from cost_models.kernel_costs import KernelCosts
from router.placement import place
from router.placement.base import Placement
from router.policies import RoutingPolicy, TopK
from router.rebalance import (
    Incremental,
    MoveSeconds,
    Never,
    Rebalancer,
    Replan,
    StepSeconds,
    WhenItPays,
    predicted_by,
)
from sim.layout import Layout
from sim.rank_seconds import rank_seconds_of
from sim.rebalancing import migration_s, rebalance_over_time
from sim.replayed_steps import ReplayedSteps
from traces.batching import split_requests
from traces.drift import drifting_loads
from traces.presets import preset

RANKS, REDUNDANT, STEPS = 8, 16, 400
DECODE, PREFILL = 64, 2048  # tokens a rank
EVERY, WINDOW = 25, 25
HORIZONS = (25, 50)  # steps in which a move must pay
EPLB_EVERY = (1, 3, 6)  # times as many steps
RECORDED_EVERY = 6  # a recorded trace has few steps


@dataclass(frozen=True, eq=False, kw_only=True)
class Stretch:
    """Steps one after another, and what they and the moves between them take."""

    name: str
    start: Placement
    loads_WLE: NDArray[np.integer]
    step_s: Callable[[int, Placement], float]
    predicted_s: StepSeconds
    move_s: MoveSeconds
    every: int

    def run(self) -> Iterator[dict[str, Any]]:
        """A row for every rebalancer; `vs_eplb` is all the time over that of EPLB at its best fixed interval."""
        every, window = self.every, min(WINDOW, 2 * self.every)
        pays = {"every": every, "window": window, "step_s": self.predicted_s, "move_s": self.move_s}
        eplb = [Replan(every=times * every, window=window) for times in EPLB_EVERY]
        rebalancers: list[Rebalancer] = [
            *eplb,
            Never(),
            Replan(every=every, window=window, renumber=True),
            Replan(every=every, window=window, algorithm="balanced", renumber=True),
            Incremental(every=every, window=window, budget_share=0.05),
            Incremental(every=every, window=window, budget_share=0.1),
            *(WhenItPays(horizon=horizon, **pays) for horizon in HORIZONS),
        ]
        runs = [
            rebalance_over_time(rebalancer, self.start, self.loads_WLE, step_s=self.step_s, move_s=self.move_s)
            for rebalancer in rebalancers
        ]
        best_eplb_s = min(run.total_s for run in runs[: len(eplb)])
        for run in runs:
            yield {
                "loads": self.name,
                "rebalancer": run.name,
                "steps": run.step_s_W.size,
                "step_s": float(run.step_s_W.mean()),
                "stall_s": float(run.stall_s_W.sum()),
                "total_s": run.total_s,
                "vs_eplb": run.total_s / best_eplb_s,
                "times": run.rebalancings,
                "moved": run.moved / self.start.slot_to_expert_LS.size,
            }


def rebalancing_cases(traces: Path | None) -> Iterator[dict[str, Any]]:
    """Synthetic drift and bursts at the tokens of decode and of prefill, and a recorded trace where there is one."""
    for name, tokens, drift in (
        ("steady", DECODE, {}),
        ("drift 0.05 a step", DECODE, {"sigma": 0.05}),
        ("bursts", DECODE, {"burst_every": 60, "burst_steps": 40}),
        ("drift 0.01 a step", PREFILL, {"sigma": 0.01}),
        ("drift 0.05 a step", PREFILL, {"sigma": 0.05}),
        ("bursts", PREFILL, {"burst_every": 60, "burst_steps": 40}),
    ):
        yield from _synthetic(name, tokens, drift).run()
    deployment = None if traces is None else deployment_for_rebalancing(traces)
    if deployment is not None:
        yield from _recorded(deployment).run()


def _synthetic(name: str, tokens: int, drift: dict[str, Any]) -> Stretch:
    model = preset("qwen3-30b-a3b")
    cluster = gpu_cluster(device("h100_sxm"), ranks=RANKS)
    costs = KernelCosts.shipped(cluster, "trtllm", "sglang", "nccl")
    layout = Layout.on(cluster)
    popularity_LE = loads_of("zipf 0.8", layers=model.layers, experts=model.experts)
    rows = RANKS * tokens * model.top_k
    loads_WLE = drifting_loads(popularity_LE, steps=STEPS, rows=rows, **drift)
    slots = model.experts + REDUNDANT
    predicted_s = predicted_by(
        rank_seconds_of(
            model,
            costs,
            layout=layout,
            protocol="per_expert",
            dispatch_dtype=model.activation_dtype,
            slots_per_rank=slots // RANKS,
            tokens_per_rank=tokens,
            width=model.top_k,
        )
    )
    return Stretch(
        name=f"synthetic {model.name}, {tokens} tokens a rank, {name}",
        start=place("balanced", popularity_LE, ranks=RANKS, slots=slots),
        loads_WLE=loads_WLE,
        step_s=lambda step, placement: predicted_s(placement, loads_WLE[step : step + 1]),
        predicted_s=predicted_s,
        move_s=partial(migration_s, model=model, costs=costs, layout=layout),
        every=EVERY,
    )


def _recorded(deployment: Deployment) -> Stretch:
    earlier, later = split_requests(deployment.trace, (1, deployment.blocks - 1))
    replay = deployment.replay_of(later, steps=None)
    problem = deployment.problem_of(earlier, replay)
    assert problem.seconds is not None
    steps = ReplayedSteps(replay=replay, policy=RoutingPolicy(selection=TopK(k=later.model.top_k)))
    return Stretch(
        name=f"{deployment.name}, {deployment.ranks} ranks, {deployment.slots} slots",
        start=place("balanced", problem.loads_LE, ranks=deployment.ranks, slots=deployment.slots),
        loads_WLE=steps.loads_WLE,
        step_s=steps.step_s,
        predicted_s=predicted_by(problem.seconds),
        move_s=partial(migration_s, model=later.model, costs=deployment.costs, layout=replay.shared),
        every=RECORDED_EVERY,
    )

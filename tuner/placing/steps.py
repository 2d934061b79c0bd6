"""Simulated steps: what a placement makes the steps of some windows take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cost_models.cluster import Cluster
from cost_models.ops import CostModel
from cost_models.roofline import Roofline
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.policies.top_k import TopK
from router.replicas import ReplicaChoice
from sim.execution import Execution
from sim.lower import Work
from sim.memory import MemoryUse
from sim.replay import Replay
from sim.report import Report
from traces.errors import InputError
from traces.trace import RoutingTrace
from tuner.placing.serving_setup import ServingSetup
from tuner.placing.windows import Window


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Scored:
    """A placement on some windows: of each a report, and the work of its steps."""

    reports: Sequence[Report]
    works: Sequence[Sequence[tuple[Work, ...]]]

    @property
    def step_s(self) -> float:
        """The mean step; each window counts as much as the others."""
        return float(np.mean([report.step_s for report in self.reports]))

    @property
    def step_s_XW(self) -> list[NDArray[np.float64]]:
        """Seconds of each step, by window."""
        return [np.array(report.step_s_by_step) for report in self.reports]

    @property
    def active_WLG(self) -> NDArray[np.int64]:
        """Active experts of each rank in each step, the steps of all windows."""
        steps = [work for of_window in self.works for of_step in of_window for work in of_step]
        return np.stack([(work.rows_LGS > 0).sum(axis=2) for work in steps])

    @property
    def parts_s(self) -> dict[str, float]:
        """Seconds of a step by part, the mean rank's, and of waiting: what other ranks take longer."""
        return _mean_of([{**report.breakdown_s, "waiting": report.waiting_s} for report in self.reports])

    @property
    def bytes_by_tier(self) -> dict[str, float]:
        """Bytes a step inside nodes and between them."""
        return _mean_of([report.bytes_by_tier for report in self.reports])

    @property
    def memory(self) -> MemoryUse:
        """Of the fullest rank."""
        return self.reports[0].memory


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Stand:
    """Some windows, ready to be simulated under one placement after another, with the model's own top k."""

    replays: Sequence[Replay]
    replica_choice: ReplicaChoice

    @classmethod
    def of(cls, windows: Sequence[Window], serving: ServingSetup, cluster: Cluster, costs: CostModel) -> Self:
        """The windows on a cluster."""
        model = windows[0].trace.model
        replays = [
            Replay(
                trace=window.trace,
                steps=window.steps,
                cluster=cluster,
                costs=costs,
                phase=serving.phase,
                protocol=serving.sends,
                kv_tokens_per_rank=serving.kv_tokens_per_rank,
                execution=Execution(extent="whole" if model.attention else "moe"),
            )
            for window in windows
        ]
        return cls(replays=replays, replica_choice=serving.replica_choice)

    def score(self, placement: Placement) -> Scored:
        """Simulate all steps in closed form."""
        policy = RoutingPolicy(selection=TopK(k=self.replays[0].trace.model.top_k))
        reports, works = [], []
        for replay in self.replays:
            report, _, of_window = replay.run(policy, placement, replica_choice=self.replica_choice)
            reports.append(report)
            works.append(of_window)
        return Scored(reports=reports, works=works)


def costs_for(
    window: Window, serving: ServingSetup, cluster: Cluster, placement: Placement
) -> tuple[CostModel, list[str]]:
    """The serving's cost model, and what there is to say of it.

    Where nobody asked for measured kernels and none of the GPU run the model as it is, the datasheet prices it: that is
    found out with one step. Errors: `InputError` where the kernels that were asked for do not.
    """
    costs = serving.cost_model(cluster)
    if isinstance(costs, Roofline):
        asked = bool(serving.costs)
        return costs, [] if asked else [f"no measured kernels of {serving.gpu}: priced by its datasheet"]
    one_step = replace(window, steps=window.steps[:1])
    try:
        Stand.of([one_step], serving, cluster, costs).score(placement)
    except InputError as error:
        if serving.costs:
            raise InputError(f"{error}; give other costs or other weights") from error
        why = f"priced by the datasheet, since no measured kernels run the model as it is ({error})"
        return Roofline(cluster), [f"{why}; with other --weights, say bfloat16, some may"]
    return costs, []


def with_scores(trace: RoutingTrace) -> tuple[RoutingTrace, list[str]]:
    """The trace with gates that the simulator can read; the model's own top k needs only their order.

    A trace without gates, or with logits, gets falling ones: its candidates are in the order of their scores.
    """
    if trace.gates_TLC is not None and trace.score_kind != "logits":
        return trace, []
    falling_C = 1 / np.arange(1, trace.candidates + 1)
    gates_TLC = np.broadcast_to((falling_C / falling_C.sum()).astype(np.float16), trace.expert_ids_TLC.shape)
    lacks = "no gates" if trace.gates_TLC is None else "logits in place of gates"
    return (
        replace(trace, gates_TLC=gates_TLC, score_kind="softmax"),
        [f"the trace has {lacks}: the first {trace.model.top_k} candidates of each token are the ones it uses"],
    )


def _mean_of(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: float(np.mean([part.get(name, 0.0) for part in parts])) for name in names}

"""Setting: a trace cut into windows, what it runs on, and the placement problem that its first requests pose."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cost_models.cluster import Cluster
from cost_models.ops import CostModel
from router.placement.base import Placement
from router.placement.problem import PlacementProblem
from sim.layout import Layout
from sim.planning import with_steps
from traces.model import ModelSpec
from traces.trace import RoutingTrace
from tuner.placing.notes import facts_on, notes_on
from tuner.placing.plan import problem_of, running_now
from tuner.placing.request import PlacingRequest
from tuner.placing.serving_setup import ServingSetup
from tuner.placing.steps import Stand, costs_for, with_scores
from tuner.placing.windows import PlacingWindows, Window
from tuner.weights import in_weights


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Setting:
    """`before`: what runs now; `problem`: all that the plan window says; `notes`: what there is to say of it."""

    request: PlacingRequest
    serving: ServingSetup
    source: str
    windows: PlacingWindows
    cluster: Cluster
    costs: CostModel
    before: Placement
    problem: PlacementProblem
    notes: tuple[str, ...]

    @classmethod
    def of(cls, request: PlacingRequest, trace: RoutingTrace, serving: ServingSetup) -> Self:
        """Make it ready; `InputError` where the trace is too short, or something does not fit together."""
        scored, of_scores = with_scores(in_weights(trace, serving.weights))
        windows = PlacingWindows.of(
            scored,
            phase=serving.phase,
            ranks=request.ranks - (request.gone is not None),
            tokens_per_rank=serving.tokens_per_rank,
        )
        loads_LE = windows.plan.trace.loads_LE().astype(np.float64)
        cluster = serving.cluster(ranks=request.ranks, nodes=request.nodes, gone=request.gone)
        before = running_now(request, loads_LE)
        costs, of_costs = costs_for(windows.choose, serving, cluster, before)
        problem = _problem(request, serving, windows, loads_LE, cluster, costs)
        return cls(
            request=request,
            serving=serving,
            source=trace.source,
            windows=windows,
            cluster=cluster,
            costs=costs,
            before=before,
            problem=problem,
            notes=(*of_scores, *notes_on(request, problem), *of_costs),
        )

    @property
    def model(self) -> ModelSpec:
        """What is served."""
        return self.windows.plan.trace.model

    @property
    def layout(self) -> Layout:
        """Every rank has its own tokens and whole experts."""
        return Layout.on(self.cluster)

    def stand(self, *windows: Window) -> Stand:
        """Some of the windows, to be simulated."""
        return Stand.of(windows, self.serving, self.cluster, self.costs)

    @property
    def facts(self) -> tuple[str, ...]:
        """What the steps are, for people."""
        windows, serving = self.windows, self.serving
        blocks = len(windows.held_out)
        steps = sum(len(window.steps) for window in windows.held_out)
        judging = sum(window.requests for window in windows.held_out)
        sends, replicas = serving.sends.replace("_", " "), serving.replica_choice.replace("_", " ")
        step = f"Steps of {windows.tokens_per_rank} tokens a rank, {serving.phase}"
        judged = f"judged by {steps} steps of the last {judging} in {blocks} window{'s' if blocks > 1 else ''}"
        chosen = f"chosen on the next {windows.choose.requests}"
        whole = "" if self.model.attention else ", its MoE layers alone"
        return (
            f"{self.model.name}{whole} on {self.cluster.name}; {self.source}.",
            facts_on(self.request, self.problem),
            f"{step}; dispatch {sends}; replicas: {replicas}.",
            f"Planned on {windows.plan.requests} requests, {chosen}, {judged}.",
            f"Costs: {self.costs.name}; intervals are over requests, the costs' own errors are not in them.",
        )


def _problem(
    request: PlacingRequest,
    serving: ServingSetup,
    windows: PlacingWindows,
    loads_LE: NDArray[np.float64],
    cluster: Cluster,
    costs: CostModel,
) -> PlacementProblem:
    return with_steps(
        problem_of(request, loads_LE, model_groups=windows.plan.trace.model.expert_groups),
        windows.plan.trace,
        windows.plan.steps,
        costs=costs,
        layout=Layout.on(cluster),
        protocol=serving.sends,
        replica_choice=serving.replica_choice,
    )

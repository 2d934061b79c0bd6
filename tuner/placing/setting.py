"""Setting: a trace cut into windows, what it runs on, and the placement problem that its first requests pose."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cost_models.cluster import Cluster
from cost_models.devices import dtype_bytes
from cost_models.ops import CostModel
from router.placement.base import Placement
from router.placement.problem import PlacementProblem
from sim.layout import Layout
from sim.planning import with_steps
from traces.model import ModelSpec
from traces.trace import RoutingTrace
from tuner.placing.answer import PlacingRequest
from tuner.placing.deployment import Deployment
from tuner.placing.plan import about_the_gone, problem_of, running_now, without_load
from tuner.placing.steps import Stand, costs_for, with_scores
from tuner.placing.windows import PlacingWindows, Window


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Setting:
    """`before`: what runs now; `problem`: all that the plan window says; `notes`: what there is to say of it."""

    request: PlacingRequest
    deployment: Deployment
    source: str
    windows: PlacingWindows
    cluster: Cluster
    costs: CostModel
    before: Placement
    problem: PlacementProblem
    notes: tuple[str, ...]

    @classmethod
    def of(cls, request: PlacingRequest, trace: RoutingTrace, deployment: Deployment) -> Self:
        """Make it ready; `InputError` where the trace is too short, or something does not fit together."""
        scored, of_scores = with_scores(_in_weights(trace, deployment.weights))
        windows = PlacingWindows.of(
            scored,
            phase=deployment.phase,
            ranks=request.ranks - (request.gone is not None),
            tokens_per_rank=deployment.tokens_per_rank,
        )
        loads_LE = windows.plan.trace.loads_LE().astype(np.float64)
        cluster = deployment.cluster(ranks=request.ranks, nodes=request.nodes, gone=request.gone)
        before = running_now(request, loads_LE)
        costs, of_costs = costs_for(windows.choose, deployment, cluster, before)
        return cls(
            request=request,
            deployment=deployment,
            source=trace.source,
            windows=windows,
            cluster=cluster,
            costs=costs,
            before=before,
            problem=_problem(request, deployment, windows, loads_LE, cluster, costs),
            notes=(*of_scores, *about_the_gone(request), *without_load(loads_LE), *of_costs),
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
        return Stand.of(windows, self.deployment, self.cluster, self.costs)

    @property
    def facts(self) -> tuple[str, ...]:
        """What the steps are, for people."""
        windows, deployment = self.windows, self.deployment
        blocks = len(windows.held_out)
        steps = sum(len(window.steps) for window in windows.held_out)
        judging = sum(window.requests for window in windows.held_out)
        sends, replicas = deployment.sends.replace("_", " "), deployment.replica_choice.replace("_", " ")
        step = f"Steps of {windows.tokens_per_rank} tokens a rank, {deployment.phase}"
        judged = f"judged by {steps} steps of the last {judging} in {blocks} window{'s' if blocks > 1 else ''}"
        chosen = f"chosen on the next {windows.choose.requests}"
        whole = "" if self.model.attention else ", its MoE layers alone"
        return (
            f"{self.model.name}{whole} on {self.cluster.name}; {self.source}.",
            f"{step}; dispatch {sends}; replicas: {replicas}.",
            f"Planned on {windows.plan.requests} requests, {chosen}, {judged}.",
            f"Costs: {self.costs.name}; intervals are over requests, the costs' own errors are not in them.",
        )


def _problem(
    request: PlacingRequest,
    deployment: Deployment,
    windows: PlacingWindows,
    loads_LE: NDArray[np.float64],
    cluster: Cluster,
    costs: CostModel,
) -> PlacementProblem:
    return with_steps(
        problem_of(request, loads_LE),
        windows.plan.trace,
        windows.plan.steps,
        costs=costs,
        layout=Layout.on(cluster),
        protocol=deployment.sends,
        replica_choice=deployment.replica_choice,
    )


def _in_weights(trace: RoutingTrace, weights: str | None) -> RoutingTrace:
    """The trace of the same model with weights in another format (None: its own)."""
    if weights is None:
        return trace
    return replace(trace, model=replace(trace.model, weight_bytes=dtype_bytes(weights), weight_dtype=weights))

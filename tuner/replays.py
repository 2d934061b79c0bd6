"""From a scenario to its replays: the trace cut into windows, the cluster and the costs made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from cost_models.cluster import Cluster
from router.history import RoutingHistory, read_output_errors
from router.placement import PLACEMENTS, plan
from router.placement.base import Placement, check_slots
from router.placement.problem import PlacementProblem
from router.placement.residency import keep_resident
from sim.layout import Layout
from sim.lower import Work
from sim.planning import with_steps
from sim.replay import Fidelity, Replay
from sim.report import Report
from sim.timeline import Timeline
from traces.batching import Step, make_steps, split_requests
from traces.completion import complete_windows
from traces.errors import InputError
from traces.presets import preset
from traces.store import read_trace
from traces.synthetic import synthetic_trace
from traces.trace import RoutingTrace
from tuner.clusters import make_cluster
from tuner.config import PlacementChoice
from tuner.costs import make_costs
from tuner.scenario import Config, Scenario, SyntheticTrace
from tuner.served import check_policy, fit_space, placement_lacks
from tuner.weights import in_weights

Window = Literal["tune", "validate"]
_PLANNED_STEPS = 64  # of the plan window, at most: more say little that these do not


class Replayable(Protocol):
    """What a study searches and a validation runs: `Replays`, or those of every part of an elastic model."""

    @property
    def scenario(self) -> Scenario:
        """The scenario, with a search space that can be served."""

    @property
    def trace(self) -> RoutingTrace:
        """The scenario's trace."""

    @property
    def cluster(self) -> Cluster:
        """What it runs on."""

    @property
    def model_id(self) -> tuple[str, ...]:
        """What results depend on beside the scenario, its trace and its files."""

    @property
    def study_loss(self) -> Callable[[Config], float] | None:
        """A config's loss, nats a byte, which a study goes by in place of gate mass; None without a model to ask."""

    def for_config(self, config: Config) -> "Replays":
        """The replays of one config."""

    def run(self, config: Config) -> tuple[Report, list[Timeline], list[tuple[Work, ...]]]:
        """Replay the tune window under one config."""


@dataclass(frozen=True, kw_only=True)  # no slots: placements are planned once and kept
class Replays:
    """A scenario made ready: plan placements on one window, replay another.

    `no_steps`: why there are no `plan_steps`; empty where there are.
    """

    scenario: Scenario
    trace: RoutingTrace
    plan_window: RoutingTrace
    plan_steps: Sequence[Step]
    no_steps: str
    windows: dict[Window, Replay]

    @classmethod
    def of(
        cls, scenario: Scenario, trace: RoutingTrace | None = None, parts: Sequence[RoutingTrace] | None = None
    ) -> Self:
        """Read what the scenario names, but for a `trace` that is given, and its `parts` (see `parts_of`).

        Errors: `InputError` if it does not fit together.
        """
        if scenario.elastic is not None:
            raise InputError(
                "elastic: parts of a model are for moeroute simulate, tune and validate; leave it out here"
            )
        trace = in_weights(trace or load_trace(scenario), scenario.weights)
        cluster = make_cluster(scenario)
        layout = Layout.on(cluster, **scenario.layout.model_dump())
        check_slots(slots_of(scenario.config, trace), layout.expert_groups, trace.model.experts)
        costs = make_costs(scenario, cluster)
        planned, *others = parts or parts_of(scenario, trace)
        check_policy("config", scenario.config.routing_policy(), others[0])
        plan_steps, no_steps = _plan_steps(planned, scenario, cluster)
        if lack := placement_lacks(scenario.config.placement.algorithm, planned, layout, no_steps):
            raise InputError(f"config.placement: {scenario.config.placement.algorithm} {lack}")
        scenario = fit_space(scenario, others[0], layout, no_steps)
        history = _history_of(planned, scenario)
        names: tuple[Window, Window] = ("tune", "validate")
        windows = {
            name: Replay(
                trace=window,
                steps=make_steps(
                    window,
                    phase=scenario.batch.phase,
                    tokens_per_rank=scenario.batch.tokens_per_rank,
                    ranks=cluster.ranks,
                    limit=scenario.batch.steps,
                ),
                cluster=cluster,
                costs=costs,
                phase=scenario.batch.phase,
                layout=layout,
                execution=scenario.execution.execution(),
                disturbance=scenario.disturbance.disturbance(scenario.seed),
                sampled_layers=scenario.sampled_layers,
                protocol=scenario.protocol,
                dispatch_dtype=scenario.dispatch_dtype,
                kv_tokens_per_rank=scenario.batch.kv_tokens_per_rank,
                history=history,
            )
            for name, window in zip(names, others, strict=True)
        }
        return cls(
            scenario=scenario,
            trace=trace,
            plan_window=planned,
            plan_steps=plan_steps,
            no_steps=no_steps,
            windows=windows,
        )

    @property
    def cluster(self) -> Cluster:
        """What it runs on."""
        return self.windows["tune"].cluster

    @property
    def layout(self) -> Layout:
        """How its ranks share the model."""
        return self.windows["tune"].shared

    @property
    def model_id(self) -> tuple[str, ...]:
        """Nothing: the trace is all that is read of the model."""
        return ()

    @property
    def study_loss(self) -> None:
        """None: a trace tells no loss."""
        return None

    def for_config(self, config: Config) -> Self:
        """These: all configs route the same recorded tokens. Errors: `InputError` for a part of a model."""
        if config.subnetwork is not None:
            raise InputError(
                f"{config.describe()}: the scenario names no model that it is a part of; name its folder: elastic"
            )
        return self

    def placement(self, config: Config) -> Placement:
        """Where the config puts the experts and which stay in memory, planned on the first window."""
        choice = config.placement
        asked = choice.model_copy(update={"resident_share": 1.0})
        if asked not in self._planned:
            self._planned[asked] = plan(choice.algorithm, self._problem(choice))
        return keep_resident(self._planned[asked], self.planned_loads_LE, choice.resident_share)

    @cached_property
    def planned_loads_LE(self) -> NDArray[np.int64]:
        """The rows of each expert in the plan window."""
        return self.plan_window.loads_LE()

    @cached_property
    def _planned(self) -> dict[PlacementChoice, Placement]:
        """Placements so far: of the many configs of a study, few differ in that."""
        return {}

    def _problem(self, choice: PlacementChoice) -> PlacementProblem:
        """What the plan window says to the algorithm; of single steps only to one that reads them."""
        problem = PlacementProblem(
            loads_LE=self.planned_loads_LE.astype(np.float64),
            ranks=self.layout.expert_groups,
            slots=self.trace.model.experts + choice.redundant_slots,
            nodes=self.layout.nodes,
            groups=self.trace.model.expert_groups,
            away_share=choice.away_share,
            seed=self.scenario.seed,
        )
        if not PLACEMENTS[choice.algorithm].needs:
            return problem
        window = self.windows["tune"]
        return with_steps(
            problem,
            self.plan_window,
            self.plan_steps,
            costs=window.costs,
            layout=self.layout,
            protocol=window.protocol,
            dispatch_dtype=window.dispatch_dtype,
            replica_choice=choice.replica_choice,
        )

    def run(
        self,
        config: Config,
        *,
        window: Window = "tune",
        fidelity: Fidelity | None = None,
        intervals: bool = False,
        name: str = "",
    ) -> tuple[Report, list[Timeline], list[tuple[Work, ...]]]:
        """Replay one window under one config."""
        return self.windows[window].run(
            config.routing_policy(),
            self.placement(config),
            replica_choice=config.placement.replica_choice,
            fidelity=fidelity or self.scenario.fidelity,
            intervals=intervals,
            name=name or config.describe(),
        )


def _plan_steps(plan_window: RoutingTrace, scenario: Scenario, cluster: Cluster) -> tuple[list[Step], str]:
    """Steps of the plan window, or why there are none."""
    batch = scenario.batch
    try:
        steps = make_steps(
            plan_window,
            phase=batch.phase,
            tokens_per_rank=batch.tokens_per_rank,
            ranks=cluster.ranks,
            limit=_PLANNED_STEPS,
        )
    except InputError as error:
        return [], f"{error}; or give it a larger share with windows.plan"
    return steps, ""


def _history_of(plan: RoutingTrace, scenario: Scenario) -> RoutingHistory | None:
    """What the plan window says, with errors that were measured on the model where the scenario names some."""
    if plan.gates_TLC is None:
        return None
    history = RoutingHistory.of(plan)
    if scenario.output_errors is None:
        return history
    return history.with_output_error(read_output_errors(scenario.output_errors))


def slots_of(config: Config, trace: RoutingTrace) -> int:
    """S: one slot an expert and the redundant ones."""
    return trace.model.experts + config.placement.redundant_slots


def load_trace(scenario: Scenario) -> RoutingTrace:
    """The scenario's trace, read or made."""
    if isinstance(scenario.trace, SyntheticTrace):
        return synthetic_trace(
            preset(scenario.trace.model),
            tokens=scenario.trace.tokens,
            zipf=scenario.trace.zipf,
            candidates=scenario.trace.candidates,
            phase=scenario.batch.phase,
            seed=scenario.seed,
        )
    return read_trace(scenario.trace)


def parts_of(scenario: Scenario, trace: RoutingTrace) -> list[RoutingTrace]:
    """The trace's plan, tune and validate windows, the latter two with as many candidates as the scenario asks for.

    What was not recorded is guessed by a model fitted on the plan window. Errors: `InputError`.
    """
    plan, *others = split_requests(in_weights(trace, scenario.weights), scenario.windows.shares)
    if scenario.candidates is None:
        return [plan, *others]
    try:
        return [plan, *complete_windows(plan, others, scenario.candidates, scenario.seed)]
    except InputError as error:
        raise InputError(f"candidates: {error}") from error

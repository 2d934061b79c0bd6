"""From a scenario to its replays: the trace cut into windows, the cluster and the costs made."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from cost_models.cluster import Cluster
from cost_models.devices import dtype_bytes
from router.history import RoutingHistory, read_output_errors
from router.placement import place
from router.placement.base import Placement, check_slots
from router.placement.residency import keep_resident
from sim.layout import Layout
from sim.lower import Work
from sim.replay import Fidelity, Replay
from sim.report import Report
from sim.timeline import Timeline
from traces.batching import make_steps, split_requests
from traces.completion import complete_windows
from traces.errors import InputError
from traces.presets import preset
from traces.store import read_trace
from traces.synthetic import synthetic_trace
from traces.trace import RoutingTrace
from tuner.clusters import make_cluster
from tuner.costs import make_costs
from tuner.scenario import Config, Scenario, SyntheticTrace
from tuner.served import check_policy, fit_space

Window = Literal["tune", "validate"]


@dataclass(frozen=True, kw_only=True)
class Replays:
    """A scenario made ready: plan placements on one window, replay another."""

    scenario: Scenario
    trace: RoutingTrace
    planned_loads_LE: NDArray[np.int64]
    windows: dict[Window, Replay]

    @classmethod
    def of(
        cls, scenario: Scenario, trace: RoutingTrace | None = None, parts: Sequence[RoutingTrace] | None = None
    ) -> Self:
        """Read what the scenario names, but for a `trace` that is given, and its `parts` (see `parts_of`).

        Errors: `InputError` if it does not fit together.
        """
        trace = _in_weights(trace or load_trace(scenario), scenario.weights)
        cluster = make_cluster(scenario)
        layout = Layout.on(cluster, **scenario.layout.model_dump())
        check_slots(slots_of(scenario.config, trace), layout.expert_groups, trace.model.experts)
        costs = make_costs(scenario, cluster)
        plan, *others = parts or parts_of(scenario, trace)
        check_policy("config", scenario.config.routing_policy(), others[0])
        scenario = fit_space(scenario, others[0], layout.expert_groups)
        history = _history_of(plan, scenario)
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
        return cls(scenario=scenario, trace=trace, planned_loads_LE=plan.loads_LE(), windows=windows)

    @property
    def cluster(self) -> Cluster:
        """What it runs on."""
        return self.windows["tune"].cluster

    @property
    def layout(self) -> Layout:
        """How its ranks share the model."""
        return self.windows["tune"].shared

    def placement(self, config: Config) -> Placement:
        """Where the config puts the experts and which stay in memory, planned on the first window's loads."""
        placement = place(
            config.placement.algorithm,
            self.planned_loads_LE,
            ranks=self.layout.expert_groups,
            slots=slots_of(config, self.trace),
            seed=self.scenario.seed,
        )
        return keep_resident(placement, self.planned_loads_LE, config.placement.resident_share)

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
    plan, *others = split_requests(_in_weights(trace, scenario.weights), scenario.windows.shares)
    if scenario.candidates is None:
        return [plan, *others]
    try:
        return [plan, *complete_windows(plan, others, scenario.candidates, scenario.seed)]
    except InputError as error:
        raise InputError(f"candidates: {error}") from error


def _in_weights(trace: RoutingTrace, weights: str | None) -> RoutingTrace:
    """The trace of the same model with weights in another format (None: its own)."""
    if weights is None:
        return trace
    model = replace(trace.model, weight_bytes=dtype_bytes(weights), weight_dtype=weights)
    return replace(trace, model=model)

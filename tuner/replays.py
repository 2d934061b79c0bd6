"""From a scenario to its replays: the trace cut into windows, the cluster and the costs made."""

from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from cost_models.cluster import Cluster
from cost_models.devices import dtype_bytes
from router.history import RoutingHistory
from router.placement import place
from router.placement.base import Placement, check_slots
from sim.layout import Layout
from sim.lower import Work
from sim.replay import Fidelity, Replay
from sim.report import Report
from sim.timeline import Timeline
from traces.batching import make_steps, split_requests
from traces.errors import InputError
from traces.presets import preset
from traces.store import read_trace
from traces.synthetic import synthetic_trace
from traces.trace import RoutingTrace
from tuner.clusters import make_cluster
from tuner.costs import make_costs
from tuner.scenario import Config, Scenario, SyntheticTrace

Window = Literal["tune", "validate"]


@dataclass(frozen=True, kw_only=True)
class Replays:
    """A scenario made ready: plan placements on one window, replay another."""

    scenario: Scenario
    trace: RoutingTrace
    planned_loads_LE: NDArray[np.int64]
    windows: dict[Window, Replay]

    @classmethod
    def of(cls, scenario: Scenario, trace: RoutingTrace | None = None) -> Self:
        """Read what the scenario names (but for a `trace` that is given); `InputError` if it does not fit together."""
        trace = _in_weights(trace or load_trace(scenario), scenario.weights)
        check_width("config", scenario.config.routing_policy().selection.reads, trace)
        cluster = make_cluster(scenario)
        layout = Layout.on(cluster, **scenario.layout.model_dump())
        check_slots(slots_of(scenario.config, trace), layout.expert_groups, trace.model.experts)
        scenario = fit_space(scenario, trace, layout.expert_groups)
        costs = make_costs(scenario, cluster)
        plan, *others = split_requests(trace, scenario.windows.shares)
        history = None if plan.gates_TLC is None else RoutingHistory.of(plan)
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
        """Where the config puts the experts, planned on the first window's loads."""
        return place(
            config.placement.algorithm,
            self.planned_loads_LE,
            ranks=self.layout.expert_groups,
            slots=slots_of(config, self.trace),
            seed=self.scenario.seed,
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


def check_width(field: str, width: int, trace: RoutingTrace) -> None:
    """Raise `InputError` if `field` of a scenario wants more experts a token than the model has or the trace holds."""
    if width > trace.model.experts:
        raise InputError(f"{field}: {width} experts a token, but the model has {trace.model.experts}; use fewer")
    if width > trace.candidates:
        raise InputError(
            f"{field}: the policy needs {width} candidates per token; the trace recorded {trace.candidates}"
        )


def fit_space(scenario: Scenario, trace: RoutingTrace, expert_groups: int) -> Scenario:
    """The scenario with a search space that the trace and cluster can serve.

    The default range of k is cut to the candidates that the trace has, the default slots are the config's. What the
    user wrote is not touched: `InputError` if it asks for more experts than there are candidates, or for redundant
    slots that do not divide over the `expert_groups` (ranks, where each has experts of its own).
    """
    space = scenario.study.space
    low, high = space.k
    fitting = {"k": (low, min(high, trace.candidates)), "redundant_slots": [scenario.config.placement.redundant_slots]}
    space = space.model_copy(update={name: v for name, v in fitting.items() if name not in space.model_fields_set})
    check_width("study.space.k", space.k[1], trace)
    for redundant in space.redundant_slots:
        check_slots(trace.model.experts + redundant, expert_groups, trace.model.experts)
    return scenario.model_copy(update={"study": scenario.study.model_copy(update={"space": space})})


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


def _in_weights(trace: RoutingTrace, weights: str | None) -> RoutingTrace:
    """The trace of the same model with weights in another format (None: its own)."""
    if weights is None:
        return trace
    model = replace(trace.model, weight_bytes=dtype_bytes(weights), weight_dtype=weights)
    return replace(trace, model=model)

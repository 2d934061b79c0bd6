"""Replay: the steps of a trace on a cluster, under one policy and placement after another."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cost_models.cluster import Cluster
from cost_models.ops import CostModel, HostToDevice
from router.assignment import Assignment
from router.backends import rank_within_group
from router.candidates import Candidates
from router.context import RouteContext, State
from router.history import RoutingHistory
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.prices import RoutePrices
from router.quality import RoutingQuality, routing_quality
from router.replicas import ReplicaChoice
from sim.analytic import simulate_analytic
from sim.blocks import blocks_of
from sim.engine import simulate_events
from sim.execution import Execution
from sim.faults import Disturbance, Schedule
from sim.layout import Layout
from sim.lower import Protocol, Work, lower
from sim.memory import MemoryUse, memory_use
from sim.network import Network
from sim.prices import prices_of
from sim.program import Program
from sim.report import Report, summarize
from sim.stages import Blocks, at_interval_ends
from sim.timeline import Timeline
from traces.batching import Phase, Step
from traces.context import Context
from traces.errors import InputError
from traces.trace import RoutingTrace

Fidelity = Literal["analytic", "event"]


@dataclass(frozen=True, kw_only=True)  # no slots: the candidates are made once and kept
class Replay:
    """Everything about a replay that does not change with policy and placement.

    `steps` of `phase` index into `trace`; `dispatch_dtype` is that of dispatched tokens (None: as the activations);
    `kv_tokens_per_rank` are cached tokens of a rank's own requests (0: what the recorded positions say). `layout` None:
    every rank has its own tokens and whole experts. `sampled_layers`: simulate so many, each for its neighbours too
    (None: all). `disturbance`: what the event fidelity adds. `history`: earlier traffic of the model, for policies that
    are set by it.
    """

    trace: RoutingTrace
    steps: Sequence[Step]
    cluster: Cluster
    costs: CostModel
    phase: Phase = "prefill"
    protocol: Protocol = "per_expert"
    dispatch_dtype: str | None = None
    kv_tokens_per_rank: int = 0
    layout: Layout | None = None
    execution: Execution = field(default_factory=Execution)
    sampled_layers: int | None = None
    disturbance: Disturbance = field(default_factory=Disturbance)
    history: RoutingHistory | None = None

    def __post_init__(self) -> None:
        if not self.steps:
            raise InputError("a replay needs a step; make some from the trace")
        last_rank = max(int(step.source_rank_T.max(initial=0)) for step in self.steps)
        if last_rank >= self.cluster.ranks:
            raise InputError(
                f"steps hold tokens of rank {last_rank}, but the cluster has {self.cluster.ranks} ranks; "
                "make the steps for as many"
            )
        if self.sampled_layers is not None and not 1 <= self.sampled_layers <= self.trace.model.layers:
            raise InputError(
                f"sampled_layers is {self.sampled_layers}; use 1 to {self.trace.model.layers}, the model's MoE layers"
            )
        if not np.array_equal(self.shared.node_of_G, self.cluster.node_of_G):
            raise InputError(
                f"the layout has {self.shared.ranks} ranks on {self.shared.nodes} nodes, the cluster "
                f"{self.cluster.ranks} on {self.cluster.nodes}; make it with Layout.on(cluster)"
            )
        Schedule.of(self.disturbance.faults, self.cluster)  # tells now what the cluster has not
        fewest = min(np.bincount(step.source_rank_T, minlength=self.cluster.ranks).min() for step in self.steps)
        if self.execution.overlap == "two_batch" and fewest < 2:
            raise InputError("two-batch overlap halves each rank's tokens, and some rank has fewer than 2; use more")

    @cached_property
    def shared(self) -> Layout:
        """How ranks share the model."""
        return self.layout or Layout.on(self.cluster)

    @cached_property
    def layers(self) -> NDArray[np.int64]:
        """The layers that are simulated, ascending."""
        every = self.trace.model.layers
        sampled = self.sampled_layers or every
        return ((np.arange(sampled) + 0.5) * every / sampled).astype(np.int64)

    @cached_property
    def row_of_layer(self) -> NDArray[np.int64]:
        """For each of the model's layers, the nearest of the simulated ones, as its place among them."""
        away = np.abs(np.arange(self.trace.model.layers)[:, None] - self.layers)
        return np.asarray(away.argmin(axis=1))

    @cached_property
    def candidates(self) -> list[list[Candidates]]:
        """The candidates of every layer, step by step."""
        trace = self.trace
        if trace.gates_TLC is None:
            raise InputError(f"trace {trace.source} has no gates; policies need the scores of the candidates")
        if trace.score_kind == "logits":
            raise InputError(f"trace {trace.source} holds logits; record or import it with softmax scores")
        return [
            [
                Candidates(
                    ids_TC=trace.expert_ids_TLC[step.tokens_T, layer].astype(np.int32),
                    probs_TC=trace.gates_TLC[step.tokens_T, layer].astype(np.float32),
                    source_rank_T=step.source_rank_T,
                    experts=trace.model.experts,
                    score_kind=trace.score_kind,
                    null_experts=trace.model.null_experts,
                )
                for layer in self.layers
            ]
            for step in self.steps
        ]

    def prices(self, policy: RoutingPolicy, placement: Placement) -> RoutePrices | None:
        """What choices cost, for a policy that asks; None for one that does not."""
        if not policy.needs("placement and prices"):
            return None
        return prices_of(
            self.trace.model,
            placement,
            self.costs,
            layout=self.shared,
            protocol=self.protocol,
            dispatch_dtype=self.dispatch_dtype or self.trace.model.activation_dtype,
            tokens_per_rank=self.steps[0].tokens_T.size // self.cluster.ranks,
            width=policy.width,
        )

    def route(
        self, policy: RoutingPolicy, prices: RoutePrices | None = None
    ) -> tuple[list[list[Assignment]], RoutingQuality]:
        """The assignments of every layer, step by step, and what they keep."""
        states: list[State] = [{} for _ in self.layers]
        assignments = []
        for layers in self.candidates:
            of_step = []
            for row, (layer, candidates) in enumerate(zip(self.layers.tolist(), layers, strict=True)):
                context = RouteContext(
                    layer=layer,
                    ranks=self.cluster.ranks,
                    renormalise=self.trace.model.renormalise,
                    top_k=self.trace.model.top_k,
                    history=self.history,
                    prices=prices,
                )
                assignment, states[row] = policy.route(candidates, context, states[row])
                of_step.append(assignment)
            assignments.append(of_step)
        quality = routing_quality(
            [c for layers in self.candidates for c in layers],
            [a for layers in assignments for a in layers],
            top_k=self.trace.model.top_k,
        )
        return assignments, quality

    def lower(
        self,
        policy: RoutingPolicy,
        placement: Placement,
        step: Step,
        assignments: Iterable[Assignment],
        replica_choice: ReplicaChoice = "even",
    ) -> tuple[Work, ...]:
        """The work of one step: of one microbatch, or of each of two halves of every rank's tokens."""
        context = self._context(step)
        rows = placement if self.sampled_layers is None else placement.take(self.layers)

        def work_of(source_rank_T: NDArray[np.int64], parts: Iterable[Assignment], context: Context) -> Work:
            return lower(
                self.trace.model,
                parts,
                rows,
                policy=policy,
                source_rank_T=source_rank_T,
                layout=self.shared,
                context=context,
                protocol=self.protocol,
                dispatch_dtype=self.dispatch_dtype,
                replica_choice=replica_choice,
                row_of_layer=self.row_of_layer,
            )

        if self.execution.overlap != "two_batch":
            return (work_of(step.source_rank_T, assignments, context),)
        layers = list(assignments)
        place_T = rank_within_group(step.source_rank_T, self.cluster.ranks)
        first_T = place_T < (np.bincount(step.source_rank_T)[step.source_rank_T] + 1) // 2
        return tuple(
            work_of(step.source_rank_T[half_T], [assignment.take(half_T) for assignment in layers], context.halved())
            for half_T in (first_T, ~first_T)
        )

    def price(self, works: Sequence[Work], placement: Placement) -> tuple[Blocks, ...]:
        """The blocks of each microbatch of a step; the host's gap comes once."""
        resident_LS = None if placement.resident_LS is None else placement.resident_LS[self.layers]
        lanes = [
            blocks_of(
                work,
                self.costs,
                self.execution if last else replace(self.execution, host_gap_s=0.0),
                device=self.cluster.device,
                resident_LS=resident_LS,
            )
            for work, last in zip(works, [False] * (len(works) - 1) + [True], strict=True)
        ]
        return tuple(lanes)

    def simulate(self, lanes: Sequence[Blocks], fidelity: Fidelity, *, step: int = 0) -> Timeline:
        """Run one step; jitter differs from step to step."""
        program = Program.of(lanes, self.cluster.speed_G)
        if fidelity == "analytic":
            return simulate_analytic(program)
        return simulate_events(program, Network(cluster=self.cluster, costs=self.costs), self.disturbance, step=step)

    def memory(self, policy: RoutingPolicy, placement: Placement) -> MemoryUse:
        """What the fullest rank must hold."""
        layout = self.shared
        step = self.steps[0]
        context = self._context(step).shared(layout.attention_tensor)
        device = self.cluster.device
        model = self.trace.model
        return memory_use(
            model,
            placement,
            layout,
            tokens_per_rank=int(np.bincount(step.source_rank_T).max()),
            width=policy.width,
            kv_tokens_per_rank=float((context.requests_G * (context.cached_tokens_G + context.new_tokens_G)).max()),
            protocol=self.protocol,
            dispatch_dtype=self.dispatch_dtype or model.activation_dtype,
            kv_dtype=self.execution.kv_dtype,
            capacity_bytes=None if device is None else device.memory_bytes,
        )

    def run(
        self,
        policy: RoutingPolicy,
        placement: Placement,
        *,
        replica_choice: ReplicaChoice = "even",
        fidelity: Fidelity = "analytic",
        intervals: bool = False,
        name: str = "",
    ) -> tuple[Report, list[Timeline], list[tuple[Work, ...]]]:
        """Simulate all steps: the report, and each step's timeline and the work of its microbatches.

        With `intervals` each step is simulated twice more, with all costs at the one and the other end of their
        intervals: as sure as the cost model is if all its errors went the same way.

        Errors: `InputError` where the placement is of another model or another number of ranks, or has experts loaded
        that the cost model cannot price.
        """
        model = self.trace.model
        layout = self.shared
        if (placement.layers, placement.experts, placement.ranks) != (
            model.layers,
            model.experts,
            layout.expert_groups,
        ):
            raise InputError(
                f"the placement is for {placement.layers} layers of {placement.experts} experts on {placement.ranks} "
                f"ranks, the replay has {model.layers} of {model.experts} on {layout.expert_groups}; place for these"
            )
        if placement.resident_LS is not None and not placement.resident_LS.all():
            self._check_loading()
        assignments, quality = self.route(policy, self.prices(policy, placement))
        works = [
            self.lower(policy, placement, step, of_step, replica_choice)
            for step, of_step in zip(self.steps, assignments, strict=True)
        ]
        priced = [self.price(of_step, placement) for of_step in works]
        timelines = [self.simulate(lanes, fidelity, step=step) for step, lanes in enumerate(priced)]
        ends = [self._ends_s(lanes, fidelity, step) for step, lanes in enumerate(priced)] if intervals else None
        report = summarize(
            name=name or policy.describe(),
            costs=self.costs.name,
            fidelity=fidelity,
            works=works,
            timelines=timelines,
            interval_s=None if ends is None else tuple(np.mean(ends, axis=0).tolist()),
            quality=quality,
            memory=self.memory(policy, placement),
            flops_per_token=model.flops_per_token(quality.experts_per_token),
            completed=self.trace.completed,
        )
        return report, timelines, works

    def _check_loading(self) -> None:
        try:
            self.costs.predict(HostToDevice(bytes_X=np.ones(1)))
        except InputError as error:
            raise InputError(
                f"resident_share: {self.costs.name} costs know no link to the host; price it on the datasheet or "
                "measured kernels, or keep all experts in memory with 1"
            ) from error

    def _context(self, step: Step) -> Context:
        return Context.of_step(
            self.trace, step, phase=self.phase, ranks=self.cluster.ranks, kv_tokens_per_rank=self.kv_tokens_per_rank
        )

    def _ends_s(self, lanes: Sequence[Blocks], fidelity: Fidelity, step: int) -> list[float]:
        low, high = zip(*(at_interval_ends(blocks) for blocks in lanes), strict=True)
        return [self.simulate(end, fidelity, step=step).step_s for end in (low, high)]


def rows_by_rank(works: Sequence[Sequence[Work]]) -> NDArray[np.int64]:
    """Rows that each rank computes, by simulated layer [L, G], over all steps."""
    total_LG: NDArray[np.int64] = sum(work.rows_LGS.sum(axis=2) for of_step in works for work in of_step)
    return total_LG

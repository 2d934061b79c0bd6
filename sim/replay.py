"""Replay: the steps of a trace on a cluster, under one policy and placement after another."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cost_models.cluster import Cluster
from cost_models.ops import CostModel
from router.assignment import Assignment
from router.candidates import Candidates
from router.context import RouteContext, State
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.quality import RoutingQuality, routing_quality
from router.replicas import ReplicaChoice
from sim.analytic import simulate_analytic
from sim.engine import simulate_events
from sim.lower import Protocol, Work, lower
from sim.memory import memory_use
from sim.report import Report, summarize
from sim.stages import at_interval_ends, stages_of
from sim.timeline import Timeline
from traces.batching import Step
from traces.errors import InputError
from traces.trace import RoutingTrace

Fidelity = Literal["analytic", "event"]
SIMULATORS = {"analytic": simulate_analytic, "event": simulate_events}


@dataclass(frozen=True, kw_only=True)  # no slots: the candidates are made once and kept
class Replay:
    """Everything about a replay that does not change with policy and placement.

    `steps` index into `trace`; `dispatch_dtype` is that of dispatched tokens (None: as the activations);
    `kv_tokens_per_rank` are cached tokens that a rank holds.
    """

    trace: RoutingTrace
    steps: Sequence[Step]
    cluster: Cluster
    costs: CostModel
    protocol: Protocol = "per_expert"
    dispatch_dtype: str | None = None
    kv_tokens_per_rank: int = 0

    def __post_init__(self) -> None:
        last_rank = max((int(step.source_rank_T.max(initial=0)) for step in self.steps), default=0)
        if last_rank >= self.cluster.ranks:
            raise InputError(
                f"steps hold tokens of rank {last_rank}, but the cluster has {self.cluster.ranks} ranks; "
                "make the steps for as many"
            )

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
                    ids_TC=trace.expert_ids_TLC[step.tokens_T, layer].astype(np.int64),
                    probs_TC=trace.gates_TLC[step.tokens_T, layer].astype(np.float32),
                    source_rank_T=step.source_rank_T,
                    experts=trace.model.experts,
                    score_kind=trace.score_kind,
                )
                for layer in range(trace.model.layers)
            ]
            for step in self.steps
        ]

    def route(self, policy: RoutingPolicy) -> tuple[list[list[Assignment]], RoutingQuality]:
        """The assignments of every layer, step by step, and what they keep."""
        states: list[State] = [{} for _ in range(self.trace.model.layers)]
        assignments = []
        for layers in self.candidates:
            of_step = []
            for layer, candidates in enumerate(layers):
                context = RouteContext(layer=layer, ranks=self.cluster.ranks, renormalise=self.trace.model.renormalise)
                assignment, states[layer] = policy.route(candidates, context, states[layer])
                of_step.append(assignment)
            assignments.append(of_step)
        quality = routing_quality(
            [c for layers in self.candidates for c in layers],
            [a for layers in assignments for a in layers],
            top_k=self.trace.model.top_k,
        )
        return assignments, quality

    def run(
        self,
        policy: RoutingPolicy,
        placement: Placement,
        *,
        replica_choice: ReplicaChoice = "even",
        fidelity: Fidelity = "analytic",
        intervals: bool = False,
        name: str = "",
    ) -> tuple[Report, list[Timeline], list[Work]]:
        """Simulate all steps: the report, and each step's timeline and work.

        With `intervals` each step is simulated twice more, with all costs at the one and the other end of their
        intervals: as sure as the cost model is if all its errors went the same way.

        Errors: `InputError` where the placement is of another model or another number of ranks.
        """
        model = self.trace.model
        if (placement.layers, placement.experts, placement.ranks) != (model.layers, model.experts, self.cluster.ranks):
            raise InputError(
                f"the placement is for {placement.layers} layers of {placement.experts} experts on {placement.ranks} "
                f"ranks, the replay has {model.layers} of {model.experts} on {self.cluster.ranks}; place for these"
            )
        assignments, quality = self.route(policy)
        works = [
            lower(
                model,
                of_step,
                placement,
                policy=policy,
                source_rank_T=step.source_rank_T,
                protocol=self.protocol,
                dispatch_dtype=self.dispatch_dtype,
                replica_choice=replica_choice,
            )
            for step, of_step in zip(self.steps, assignments, strict=True)
        ]
        stages = [stages_of(work, model, self.costs, nodes=self.cluster.nodes) for work in works]
        simulate = SIMULATORS[fidelity]
        timelines = [simulate(of_step) for of_step in stages]
        ends = (
            [[simulate(end).step_s for end in at_interval_ends(of_step)] for of_step in stages] if intervals else None
        )
        device = self.cluster.device
        memory = memory_use(
            model,
            placement,
            tokens_per_rank=int(works[0].tokens_G.max()),
            width=policy.selection.width,
            kv_tokens_per_rank=self.kv_tokens_per_rank,
            capacity_bytes=None if device is None else device.memory_bytes,
        )
        report = summarize(
            name=name or policy.describe(),
            costs=self.costs.name,
            fidelity=fidelity,
            works=works,
            stages=stages,
            timelines=timelines,
            interval_s=None if ends is None else tuple(np.mean(ends, axis=0).tolist()),
            quality=quality,
            memory=memory,
            flops_per_token=model.flops_per_token(quality.experts_per_token),
        )
        return report, timelines, works


def rows_by_rank(works: Sequence[Work]) -> NDArray[np.int64]:
    """Rows that each rank computes, by layer [L, G], over all steps."""
    rows_LG: NDArray[np.int64] = works[0].rows_LGS.sum(axis=2)
    for work in works[1:]:
        rows_LG += work.rows_LGS.sum(axis=2)
    return rows_LG

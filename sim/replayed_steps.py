"""Replayed steps: a replay's steps one by one, each under the placement that it meets, while experts move."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from router.assignment import Assignment
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.rebalance import Rebalancer, StepSeconds, predicted_by
from router.replicas import ReplicaChoice
from sim.rank_seconds import rank_seconds_of
from sim.rebalancing import RebalancingRun, migration_s, rebalance_over_time
from sim.replay import Replay
from traces.errors import InputError


@dataclass(frozen=True, kw_only=True)  # no slots: what is routed is kept
class ReplayedSteps:
    """The steps of a replay, routed once, and simulated under one placement after another.

    Errors: `InputError` where the replay samples layers or the policy reads the placement: what it routes would change.
    """

    replay: Replay
    policy: RoutingPolicy
    replica_choice: ReplicaChoice = "even"

    def __post_init__(self) -> None:
        if self.replay.sampled_layers is not None:
            raise InputError("sampled_layers: rebalancing needs the loads of all layers; simulate all of them")
        if self.policy.needs("placement and prices"):
            raise InputError(f"policy {self.policy.describe()} routes by the placement; rebalance under another policy")

    @cached_property
    def assignments(self) -> list[list[Assignment]]:
        """What each step routes, layer by layer."""
        return self.replay.route(self.policy)[0]

    @cached_property
    def loads_WLE(self) -> NDArray[np.int64]:
        """Rows of each expert in each step."""
        experts = self.replay.trace.model.experts
        return np.array(
            [
                [np.bincount(layer.ids_TK[layer.kept_TK], minlength=experts)[:experts] for layer in of_step]
                for of_step in self.assignments
            ],
            dtype=np.int64,
        )

    def step_s(self, step: int, placement: Placement) -> float:
        """Seconds of one step under a placement, by the analytic simulator."""
        works = self.replay.lower(
            self.policy, placement, self.replay.steps[step], self.assignments[step], self.replica_choice
        )
        return self.replay.simulate(self.replay.price(works, placement), "analytic", step=step).step_s

    def move_s(self, before: Placement, after: Placement) -> float:
        """Seconds to get from one placement to another, see `sim.rebalancing.migration_s`."""
        replay = self.replay
        return migration_s(before, after, replay.trace.model, replay.costs, replay.shared)

    def predicted_s(self, slots: int) -> StepSeconds:
        """What the cost model predicts for steps of such loads on so many slots, without simulating them."""
        replay = self.replay
        model, layout = replay.trace.model, replay.shared
        return predicted_by(
            rank_seconds_of(
                model,
                replay.costs,
                layout=layout,
                protocol=replay.protocol,
                dispatch_dtype=replay.dispatch_dtype or model.activation_dtype,
                slots_per_rank=slots // layout.expert_groups,
                tokens_per_rank=replay.steps[0].tokens_T.size // layout.ranks,
                width=model.top_k,
            )
        )

    def serve(self, rebalancer: Rebalancer, start: Placement, *, layers_per_step: int | None = None) -> RebalancingRun:
        """All steps in order from placement `start` on, see `sim.rebalancing.rebalance_over_time`."""
        return rebalance_over_time(
            rebalancer,
            start,
            self.loads_WLE,
            step_s=self.step_s,
            move_s=self.move_s,
            layers_per_step=layers_per_step,
        )

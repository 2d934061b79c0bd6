"""Replayed steps: a replay's steps one by one, each under the placement that it meets."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from router.assignment import Assignment
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.replicas import ReplicaChoice
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

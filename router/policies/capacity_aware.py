"""Capacity-aware inference: bound the busiest expert, and let its neighbours take what it cannot."""

from dataclasses import dataclass, field
from typing import ClassVar

from router.assignment import Assignment
from router.candidates import Candidates
from router.capacity import Capacity, Limit, Reroute, Scope
from router.context import RouteContext
from router.parameters import choice, number
from router.part import Need
from router.queues import Drop


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityAware(Limit):
    """Each expert keeps the `gamma` * T * K / E pairs of largest gates; the others are dropped, or move next door.

    Helps where one busy expert makes all ranks wait and the model bears the loss of its smallest gates. `expanded`:
    a pair without a place goes to its token's next best candidate on a rank that holds the expert it came from, so
    that no row travels that would not have; it needs more candidates than K and a placement. `scope`: over which
    tokens T is counted.

    It is `capacity` with rule megatron and drop probs, so C is rounded up; the paper leaves rounding open. The paper's
    expanded drop widens every token's choice by local experts before the limit, so that even tokens whose pairs all fit
    can get more experts; here only pairs that do not fit move, and no token gets more experts than it chose.
    """

    name: ClassVar[str] = "capacity_aware"
    source: ClassVar[str] = "He et al., arXiv 2503.05066"
    gamma: float = field(metadata=number(0.75, 2.0, "places over an even share of the pairs", step=0.05))
    expanded: bool = field(
        default=False, metadata=choice((False, True), "whether pairs may move to other experts of their rank")
    )
    scope: Scope = field(
        default="source_rank", metadata=choice(("source_rank", "global"), "over which tokens places are counted")
    )

    @property
    def drop(self) -> Drop:
        """The smallest gates go first."""
        return "probs"

    @property
    def pad(self) -> bool:
        """Experts compute no empty places."""
        return False

    @property
    def capacity(self) -> Capacity:
        """The capacity that does it."""
        reroute: Reroute = "same_rank" if self.expanded else "none"
        return Capacity(factor=self.gamma, drop=self.drop, scope=self.scope, reroute=reroute)

    @property
    def asks(self) -> tuple[Need, ...]:
        """What expanding needs."""
        return self.capacity.asks

    @property
    def work(self) -> tuple[str, ...]:
        """The work of that capacity."""
        return self.capacity.work

    def describe(self) -> str:
        """In a few words."""
        expanded = " expanded" if self.expanded else ""
        scope = "" if self.scope == "source_rank" else f" {self.scope}"
        return f"{self.name} gamma={self.gamma:.4g}{expanded}{scope}"

    def limit(self, assignment: Assignment, candidates: Candidates, context: RouteContext) -> Assignment:
        """Keep the largest gates of each expert, and move or drop the others."""
        self.check(candidates, int(assignment.ids_TK.shape[1]), context)
        return self.capacity.limit(assignment, candidates, context)

    def places_of(self, assignment: Assignment, candidates: Candidates, context: RouteContext) -> tuple[int, ...]:
        """As every limit."""
        return self.capacity.places_of(assignment, candidates, context)

"""Request: what is asked of `moeroute place`."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.placement import PLACEMENTS
from traces.errors import InputError

BEST = "best"
MOVES = "incremental"  # what a plan under a budget of moves is called
# vLLM rebalances every so many steps by default: what has not paid by then never does.
HORIZON_STEPS = 3000


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class PlacingRequest:
    """What to place on: `slots` expert slots (None: one an expert, rounded up) on `ranks` ranks on `nodes` nodes.

    `algorithm`: a name of `PLACEMENTS`, or the best of those that what is known can serve. `groups` as in
    `PlacementProblem`; the best keeps those that are given on nodes. None: the model's, which it may keep there, where
    the model is known. `away_share` as in `PlacementProblem` (None: no slot leaves groups that are given). `seed`.
    `current_LS`: the experts of the slots that run now (None: contiguous). `budget_share`: of all slots, so many may
    take an expert that is not on their rank yet (None: all). `gone`: a rank that is lost. `horizon_steps`: in so many,
    moving weights must pay.
    """

    ranks: int
    nodes: int = 1
    slots: int | None = None
    algorithm: str = BEST
    groups: int | None = None
    away_share: float | None = None
    current_LS: NDArray[np.int64] | None = None
    budget_share: float | None = None
    gone: int | None = None
    horizon_steps: int = HORIZON_STEPS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise InputError(f"{self.ranks} ranks; use at least 1")
        if self.nodes < 1 or self.ranks % self.nodes:
            raise InputError(f"{self.ranks} ranks do not divide over {self.nodes} nodes; use a divisor of the ranks")
        if self.algorithm not in (BEST, *PLACEMENTS):
            raise InputError(
                f"unknown placement {self.algorithm!r}; known are {', '.join((BEST, *sorted(PLACEMENTS)))}"
            )
        if self.gone is not None and not 0 <= self.gone < self.ranks:
            raise InputError(f"rank {self.gone} is gone, but the ranks are 0 to {self.ranks - 1}; name one of them")
        if self.gone is not None and self.asks_for_groups:
            raise InputError(
                f"without rank {self.gone} nodes are uneven, and groups cannot be packed; leave out groups"
            )
        if self.budget_share is not None and not 0 < self.budget_share <= 1:
            raise InputError(f"a budget of {self.budget_share:g} of the slots; it must be above 0 and at most 1")
        if self.budget_share is not None and self.algorithm != BEST:
            raise InputError(
                f"a budget moves slots of the placement that runs now, and {self.algorithm} plans a new one; "
                "leave out one of the two"
            )
        if self.budget_share is not None and self.asks_for_groups:
            raise InputError(
                f"a budget of {self.budget_share:g} moves experts off the nodes of their groups too; "
                "leave out groups or the budget"
            )
        if self.horizon_steps < 1:
            raise InputError(f"a horizon of {self.horizon_steps} steps; use at least 1")

    @property
    def asks_for_groups(self) -> bool:
        """Whether experts shall stay with their group, whatever the model is."""
        return self.groups is not None and self.groups > 1

    def slots_for(self, experts: int) -> int:
        """S, as asked for, or as it runs now, or the fewest that hold the experts and divide over the ranks."""
        if self.slots is not None:
            return self.slots
        if self.current_LS is not None:
            return int(self.current_LS.shape[1])
        return -(-experts // self.ranks) * self.ranks

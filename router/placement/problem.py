"""The placement problem: what a placement is planned from, all of it from earlier traffic."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.placement.base import check_slots
from router.rank_seconds import RankSeconds
from router.splits import SPLITS
from traces.errors import InputError


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class PlacementProblem:
    """E experts of L layers for `slots` slots on `ranks` ranks, which lie on `nodes` nodes, neighbours together.

    `loads_LE` float64: rows of each expert in earlier traffic, in any unit; a layer without load counts as an even one.
    `groups`: neighbouring experts that a model routes to together (1: it has none). `away_share`: of the redundant
    slots, so many may hold experts of other nodes' groups. `seed` of what is random.

    What only some algorithms read: `steps_WLE` the rows of each expert in each of W earlier steps; `ids_TLK` the
    experts that each of T earlier tokens used; `seconds` what a rank's rows and active experts take. None where not
    known. `split`: the name of the split (`router.splits`) by which rows will choose replicas; None: they take turns.

    Errors: `InputError` if slots do not hold the experts or divide over ranks, ranks over nodes, experts over groups,
    if a rank has more slots than there are experts, or if a load is negative or not finite.
    """

    loads_LE: NDArray[np.float64]
    ranks: int
    slots: int
    nodes: int = 1
    groups: int = 1
    away_share: float = 1.0
    seed: int = 0
    steps_WLE: NDArray[np.integer] | None = None
    ids_TLK: NDArray[np.integer] | None = None
    seconds: RankSeconds | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        check_slots(self.slots, self.ranks, self.experts)
        if self.slots_per_rank > self.experts:
            raise InputError(
                f"{self.slots} slots are more than every expert on every rank takes; a second copy there relieves "
                f"nothing: use at most {self.experts * self.ranks}"
            )
        check_loads(self.loads_LE)
        if self.nodes < 1 or self.ranks % self.nodes:
            raise InputError(f"{self.ranks} ranks do not divide over {self.nodes} nodes; use a divisor of the ranks")
        if self.groups < 1 or self.experts % self.groups:
            raise InputError(
                f"{self.experts} experts do not divide into {self.groups} groups; use a divisor of the experts"
            )
        if not 0 <= self.away_share <= 1:
            raise InputError(f"away_share is {self.away_share:g}; it must be 0 to 1")
        if self.split is not None and self.split not in SPLITS:
            raise InputError(f"unknown split {self.split!r}; known are {', '.join(SPLITS)}")
        for name, traffic in (("steps", self.steps_WLE), ("ids", self.ids_TLK)):
            if traffic is not None and (traffic.ndim != 3 or traffic.shape[1] != self.layers):
                raise InputError(f"{name} of shape {traffic.shape} for loads of {self.layers} layers; give as many")

    @property
    def layers(self) -> int:
        """L."""
        return int(self.loads_LE.shape[0])

    @property
    def experts(self) -> int:
        """E."""
        return int(self.loads_LE.shape[1])

    @property
    def even_where_none_LE(self) -> NDArray[np.float64]:
        """The loads, with 1 for each expert of a layer that has none."""
        return np.where(self.loads_LE.any(axis=1, keepdims=True), self.loads_LE, 1.0)

    @property
    def slots_per_rank(self) -> int:
        """S / G."""
        return self.slots // self.ranks

    @property
    def ranks_per_node(self) -> int:
        """G / N."""
        return self.ranks // self.nodes


def check_loads(loads_LE: NDArray[np.float64]) -> None:
    """Raise `InputError` unless loads are [L, E], finite and not negative; it names the first that is not."""
    if loads_LE.ndim != 2 or 0 in loads_LE.shape:
        raise InputError(f"loads of shape {loads_LE.shape}; give one a layer and expert")
    for what, bad_LE in (("not a finite number", ~np.isfinite(loads_LE)), ("negative", loads_LE < 0)):
        if bad_LE.any():
            layer, expert = np.argwhere(bad_LE)[0]
            raise InputError(
                f"loads: layer {layer}, expert {expert} has {loads_LE[layer, expert]:g}, which is {what}; "
                "give counts of 0 or more"
            )

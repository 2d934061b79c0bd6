"""The placement problem: what a placement is planned from, all of it from earlier traffic."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from router.placement.base import check_slots, slots_in
from router.rank_seconds import RankSeconds
from router.splits import SPLITS
from traces.errors import InputError

Need = Literal["steps", "tokens", "seconds"]  # what only some algorithms read


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
    if a rank has more slots than there are experts, if a load is negative or not finite, or if steps or tokens are none
    or not of these layers and experts.
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
        if self.steps_WLE is not None:
            _check_steps(self.steps_WLE, self.layers, self.experts)
        if self.ids_TLK is not None:
            _check_ids(self.ids_TLK, self.layers)

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
        even_LE = np.where(self.loads_LE.any(axis=1, keepdims=True), self.loads_LE, 1.0)
        return np.ascontiguousarray(even_LE)  # one layout: one compilation

    @property
    def away_slots(self) -> int:
        """How many slots of a layer may hold experts of other nodes' groups."""
        return slots_in(self.away_share, self.slots - self.experts)

    def knows(self, need: Need) -> bool:
        """Whether it has what only some algorithms read."""
        has: dict[Need, object] = {"steps": self.steps_WLE, "tokens": self.ids_TLK, "seconds": self.seconds}
        return has[need] is not None

    @property
    def slots_per_rank(self) -> int:
        """S / G."""
        return self.slots // self.ranks

    @property
    def ranks_per_node(self) -> int:
        """G / N."""
        return self.ranks // self.nodes


def check_loads(loads_LE: NDArray[np.float64]) -> None:
    """Raise `InputError` unless loads are [L, E], not negative and finite, layers' sums too; it names the first."""
    if loads_LE.ndim != 2 or 0 in loads_LE.shape:
        raise InputError(f"loads of shape {loads_LE.shape}; give one a layer and expert")
    for what, bad_LE in (("not a finite number", ~np.isfinite(loads_LE)), ("negative", loads_LE < 0)):
        if bad_LE.any():
            layer, expert = np.argwhere(bad_LE)[0]
            raise InputError(
                f"loads: layer {layer}, expert {expert} has {loads_LE[layer, expert]:g}, which is {what}; "
                "give counts of 0 or more"
            )
    with np.errstate(over="ignore"):
        total_L = loads_LE.sum(axis=1)
    if not np.isfinite(total_L).all():
        layer = int(np.argmin(np.isfinite(total_L)))
        raise InputError(f"loads: layer {layer} sums up to more than a float holds; scale the loads down")


def _check_steps(steps_WLE: NDArray[np.integer], layers: int, experts: int) -> None:
    if steps_WLE.ndim != 3 or steps_WLE.shape[1:] != (layers, experts) or not len(steps_WLE) or steps_WLE.min() < 0:
        raise InputError(
            f"steps of shape {steps_WLE.shape} for loads of {layers} layers of {experts} experts; "
            "give one step or more, with 0 or more rows a layer and expert"
        )


def _check_ids(ids_TLK: NDArray[np.integer], layers: int) -> None:
    if ids_TLK.ndim != 3 or ids_TLK.shape[1] != layers or 0 in ids_TLK.shape:
        raise InputError(
            f"ids of shape {ids_TLK.shape} for loads of {layers} layers; "
            "give one token or more, with one expert or more a layer"
        )

"""Placement: which rank holds which expert, replicas included."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from traces.errors import InputError

_ROUNDING = 1e-9  # slots


@dataclass(frozen=True, kw_only=True)  # no slots: the replica tables are computed once and kept
class Placement:
    """For each of L layers and S physical slots, the expert that the slot holds.

    `slot_to_expert_LS` int64; rank r holds the slots r*S/G .. (r+1)*S/G - 1. An expert in more than one slot has
    replicas. `resident_LS`: the slots whose experts stay in the rank's memory, the others lie in the host's and are
    loaded when they are used; None: all stay. Errors: `InputError` if the slots do not divide over the ranks or an
    expert has no slot, or if residency is not of the same slots.
    """

    slot_to_expert_LS: NDArray[np.int64]
    experts: int
    ranks: int
    resident_LS: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        check_slots(self.slots, self.ranks, self.experts)
        if self.slot_to_expert_LS.min() < 0 or self.slot_to_expert_LS.max() >= self.experts:
            raise InputError(f"placement: a slot holds an expert that is none of 0 to {self.experts - 1}")
        if not self.replicas_LE.all():
            layer, expert = np.argwhere(self.replicas_LE == 0)[0]
            raise InputError(f"placement: layer {layer} has no slot for expert {expert}; every expert needs one")
        if self.resident_LS is not None and self.resident_LS.shape != self.slot_to_expert_LS.shape:
            raise InputError(
                f"placement: residency of shape {self.resident_LS.shape} for slots of shape "
                f"{self.slot_to_expert_LS.shape}; give one truth value a layer and slot"
            )

    @property
    def layers(self) -> int:
        """L."""
        return int(self.slot_to_expert_LS.shape[0])

    @property
    def slots(self) -> int:
        """S, over all ranks."""
        return int(self.slot_to_expert_LS.shape[1])

    @property
    def slots_per_rank(self) -> int:
        """S / G."""
        return self.slots // self.ranks

    def take(self, layers: NDArray[np.int64]) -> "Placement":
        """The placement of some of the layers."""
        return Placement(
            slot_to_expert_LS=self.slot_to_expert_LS[layers],
            experts=self.experts,
            ranks=self.ranks,
            resident_LS=None if self.resident_LS is None else self.resident_LS[layers],
        )

    @cached_property
    def replicas_LE(self) -> NDArray[np.int64]:
        """How many slots hold each expert."""
        key_LS = self.slot_to_expert_LS + np.arange(self.layers)[:, None] * self.experts
        return np.bincount(key_LS.ravel(), minlength=self.layers * self.experts).reshape(self.layers, -1)

    @cached_property
    def resident_LE(self) -> NDArray[np.bool_]:
        """The experts that stay in the memory of some rank: [L, E]."""
        resident_LE = np.ones((self.layers, self.experts), dtype=np.bool_)
        if self.resident_LS is not None:
            for layer, (expert_S, resident_S) in enumerate(zip(self.slot_to_expert_LS, self.resident_LS, strict=True)):
                resident_LE[layer] = np.bincount(expert_S, weights=resident_S, minlength=self.experts) > 0
        return resident_LE

    @property
    def resident_slots_of_rank(self) -> int:
        """Slots of all layers whose experts stay in memory, on the rank where they are most."""
        if self.resident_LS is None:
            return self.layers * self.slots_per_rank
        return int(self.resident_LS.reshape(self.layers, self.ranks, -1).sum(axis=(0, 2)).max())

    @cached_property
    def share_LEG(self) -> NDArray[np.float32]:
        """The share of each expert's rows that each rank computes where replicas share evenly: [L, E, G]."""
        share_LEG = np.zeros((self.layers, self.experts, self.ranks), dtype=np.float32)
        rank_S = np.arange(self.slots) // self.slots_per_rank
        for layer, expert_S in enumerate(self.slot_to_expert_LS):
            np.add.at(share_LEG[layer], (expert_S, rank_S), 1 / self.replicas_LE[layer][expert_S])
        return share_LEG

    @cached_property
    def expert_slots_LEX(self) -> NDArray[np.int64]:
        """The slots of each expert, ascending, padded with -1: X is the largest number of replicas."""
        table = np.full((self.layers, self.experts, int(self.replicas_LE.max())), -1, dtype=np.int64)
        for layer, expert_S in enumerate(self.slot_to_expert_LS):
            seen = np.zeros(self.experts, dtype=np.int64)
            for slot, expert in enumerate(expert_S):
                table[layer, expert, seen[expert]] = slot
                seen[expert] += 1
        return table


def slots_in(share: float, slots: int) -> int:
    """So many whole slots are in `share` of them: 0.29 of 100 are 29, though floats say a little less.

    >>> slots_in(0.29, 100), int(0.29 * 100)
    (29, 28)
    """
    return int(share * slots + _ROUNDING)


def check_slots(slots: int, ranks: int, experts: int) -> None:
    """Raise `InputError`, with the numbers and the mend, unless `slots` can hold `experts` on `ranks` ranks."""
    if ranks < 1:
        raise InputError(f"{ranks} ranks; use at least 1")
    if slots < experts:
        raise InputError(f"{slots} slots cannot hold {experts} experts; give at least {experts}")
    if ranks > slots:
        raise InputError(
            f"{ranks} ranks but only {slots} expert slots; use at most {slots} ranks or add redundant slots"
        )
    if slots % ranks:
        more = -slots % ranks
        raise InputError(f"{slots} expert slots do not divide over {ranks} ranks; add {more} redundant slots")

"""Placement algorithms by name. A placement is planned from earlier loads, never from the step it serves."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from router.placement.base import Placement, check_slots
from router.placement.contiguous import contiguous
from router.placement.lpt import lpt
from router.placement.permuted import permuted
from traces.errors import InputError

PLACEMENTS: dict[str, Callable[[NDArray[np.float64], int, int, int], NDArray[np.int64]]] = {
    "contiguous": contiguous,
    "random": permuted,
    "lpt": lpt,
}


def place(
    algorithm: str, loads_LE: NDArray[np.integer | np.floating], *, ranks: int, slots: int, seed: int = 0
) -> Placement:
    """Place the experts of each layer by their earlier loads `loads_LE` (any unit) into `slots` slots on `ranks` ranks.

    Errors: `InputError` for an unknown algorithm, or slots that do not hold the experts or divide over the ranks.
    """
    if algorithm not in PLACEMENTS:
        raise InputError(f"unknown placement {algorithm!r}; known are {', '.join(sorted(PLACEMENTS))}")
    experts = loads_LE.shape[1]
    check_slots(slots, ranks, experts)
    slot_to_expert_LS = PLACEMENTS[algorithm](np.asarray(loads_LE, dtype=np.float64), ranks, slots, seed)
    return Placement(slot_to_expert_LS=slot_to_expert_LS, experts=experts, ranks=ranks)

"""Splits: how many of each expert's rows of a whole step its replicas compute. One a file, all compiled.

A split is a function of whole numbers that all ranks know, so that all of them find the same one: `counts_E`, the rows
of each expert in the step, `slots_EX` and `replicas_E`, a placement's tables of the layer, `slots_per_rank` and
`ranks`. It returns `rows_EX`, the rows that each of `slots_EX` computes, which add up to `counts_E`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from router.splits.fewest_active import fewest_active
from router.splits.least_loaded import least_loaded
from router.splits.water_filling import water_filling

if TYPE_CHECKING:  # placements are planned for a split, and import this
    from router.placement.base import Placement

Split = Callable[[Any, Any, Any, int, int], NDArray[np.int64]]

SPLITS: dict[str, Split] = {
    "least_loaded": least_loaded,
    "water_filling": water_filling,
    "fewest_active": fewest_active,
}


def split(name: str, counts_E: NDArray[np.int64], placement: "Placement", layer: int) -> NDArray[np.int64]:
    """The rows of each replica, [E, X] as in the placement's `expert_slots_LEX`; 0 where there is none."""
    return SPLITS[name](
        counts_E,
        placement.expert_slots_LEX[layer],
        placement.replicas_LE[layer],
        placement.slots_per_rank,
        placement.ranks,
    )


def rank_loads_G(rows_EX: NDArray[Any], placement: "Placement", layer: int) -> NDArray[Any]:
    """The rows that each rank computes: [G]."""
    slots_EX = placement.expert_slots_LEX[layer]
    rows_S = np.zeros(placement.slots, dtype=rows_EX.dtype)
    rows_S[slots_EX[slots_EX >= 0]] = rows_EX[slots_EX >= 0]
    return np.asarray(rows_S.reshape(placement.ranks, -1).sum(axis=1))

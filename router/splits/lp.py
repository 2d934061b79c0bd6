"""The yardstick of splits: the linear program of the least largest rank load, by HiGHS. Too slow to run in a step."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from router.placement.base import Placement


def lp_split(
    counts_E: NDArray[np.int64 | np.float64], placement: Placement, layer: int
) -> tuple[NDArray[np.float64], float]:
    """The rows of each replica, [E, X], parts of rows allowed, and the largest load of a rank, which is the least.

    Variables: the rows of each slot, and the largest load, which is minimised. Each expert's rows add up to its count,
    no rank's to more than the largest load.
    """
    expert_S = placement.slot_to_expert_LS[layer]
    slots, ranks, slot_S = placement.slots, placement.ranks, np.arange(placement.slots)
    of_expert_EX = np.zeros((placement.experts, slots + 1))
    of_expert_EX[expert_S, slot_S] = 1
    of_rank_GX = np.zeros((ranks, slots + 1))
    of_rank_GX[slot_S // placement.slots_per_rank, slot_S] = 1
    of_rank_GX[:, slots] = -1
    solved = linprog(
        np.append(np.zeros(slots), 1.0),
        A_ub=of_rank_GX,
        b_ub=np.zeros(ranks),
        A_eq=of_expert_EX,
        b_eq=np.asarray(counts_E, dtype=np.float64),
        method="highs",
    )
    assert solved.x is not None, solved.message
    assert solved.fun is not None, solved.message
    slots_EX = placement.expert_slots_LEX[layer]
    rows_EX = np.where(slots_EX >= 0, solved.x[slots_EX], 0.0)
    return rows_EX, float(solved.fun)

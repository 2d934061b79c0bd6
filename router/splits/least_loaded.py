"""Least loaded: row by row to the replica whose rank has the fewest rows so far, expert after expert."""

from typing import Any

import numba
import numpy as np

from router.splits.choices import fixed_rows, pour


@numba.njit(cache=True)
def least_loaded(counts_E: Any, slots_EX: Any, replicas_E: Any, slots_per_rank: int, ranks: int) -> Any:
    """Rows of each replica [E, X], of a greedy choice that never looks back.

    1. Rows of experts with one replica go there.
    2. Experts with several follow, those with the fewest replicas first and among these those with the most rows: each
       row goes to the replica on the least loaded rank. Whoever has most choice makes up for the others; the other way
       round the largest load is up to 26% larger (measured).
    """
    rows_EX, load_G, rank_EX, spread_P = fixed_rows(counts_E, slots_EX, replicas_E, slots_per_rank, ranks)
    order_X = np.empty(slots_EX.shape[1], dtype=np.int64)
    spread_P = spread_P[np.argsort(-counts_E[spread_P], kind="mergesort")]
    for place in np.argsort(replicas_E[spread_P], kind="mergesort"):
        expert = spread_P[place]
        pour(counts_E[expert], rank_EX[expert], load_G, rows_EX[expert], order_X)
    return rows_EX

"""Where rows have a choice: the experts of several replicas, and the ranks that these lie on."""

from typing import Any

import numba
import numpy as np


@numba.njit(cache=True)
def fixed_rows(counts_E: Any, slots_EX: Any, replicas_E: Any, slots_per_rank: int, ranks: int) -> Any:
    """What is given before anything is chosen: (rows_EX, load_G, rank_EX, spread_P).

    `rows_EX`: the rows of experts of one replica, 0 for all others; `load_G` the rows of each rank by these alone.
    `spread_P`: the experts that have rows and several replicas, ascending. `rank_EX`, for these alone: the rank of each
    replica, -1 where there is none or the one before it lies on the same rank, which it could not relieve.
    """
    rows_EX = np.zeros(slots_EX.shape, dtype=np.int64)
    load_G = np.zeros(ranks, dtype=np.int64)
    rank_EX = np.full(slots_EX.shape, -1, dtype=np.int64)
    spread_P = np.empty(replicas_E.size, dtype=np.int64)
    spread = 0
    for expert in range(replicas_E.size):
        if counts_E[expert] == 0:
            continue
        if replicas_E[expert] == 1:
            rows_EX[expert, 0] = counts_E[expert]
            load_G[slots_EX[expert, 0] // slots_per_rank] += counts_E[expert]
            continue
        spread_P[spread] = expert
        spread += 1
        last = -1
        for replica in range(replicas_E[expert]):
            rank = slots_EX[expert, replica] // slots_per_rank
            if rank != last:
                rank_EX[expert, replica] = rank
            last = rank
    return rows_EX, load_G, rank_EX, spread_P[:spread]


@numba.njit(cache=True)
def pour(count: int, rank_X: Any, load_G: Any, rows_X: Any, order_X: Any) -> None:
    """Give `count` rows to the replicas on ranks `rank_X` (-1: none) as one would row by row, each to the least loaded.

    Writes `rows_X` and adds them to `load_G`; between equal ranks the first replica goes first. `order_X` is room to
    work in.

    1. Sort the replicas by the load of their rank.
    2. Fill the least loaded up to the next one's level, while rows last.
    3. What the level leaves over goes to the first ones, a row each.
    """
    several = 0
    for replica in range(rank_X.size):
        if rank_X[replica] < 0:
            continue
        place = several
        while place > 0 and load_G[rank_X[order_X[place - 1]]] > load_G[rank_X[replica]]:
            order_X[place] = order_X[place - 1]
            place -= 1
        order_X[place] = replica
        several += 1

    filled = 1
    total = count + load_G[rank_X[order_X[0]]]
    while filled < several:
        load = load_G[rank_X[order_X[filled]]]
        if load * filled >= total:
            break
        total += load
        filled += 1
    level = total // filled
    over = total - level * filled

    for place in range(several):
        replica = order_X[place]
        rank = rank_X[replica]
        rows_X[replica] = 0
        if place < filled:
            rows_X[replica] = level + (place < over) - load_G[rank]
            load_G[rank] += rows_X[replica]


@numba.njit(cache=True)
def pour_anew(count: int, rank_X: Any, load_G: Any, rows_X: Any, order_X: Any) -> None:
    """Take an expert's rows back from the loads, and `pour` them again."""
    for replica in range(rank_X.size):
        if rank_X[replica] >= 0:
            load_G[rank_X[replica]] -= rows_X[replica]
    pour(count, rank_X, load_G, rows_X, order_X)

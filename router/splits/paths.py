"""Paths: lower the largest load of a rank, exactly, by moving rows from replica to replica along chains of ranks."""

from typing import Any

import numba
import numpy as np


@numba.njit(cache=True)
def lower_largest(rows_EX: Any, rank_EX: Any, spread_P: Any, load_G: Any) -> None:
    """Move whole rows of the experts `spread_P` between their replicas until the largest load is as low as can be.

    Changes `rows_EX` and `load_G`; `rank_EX`: the rank of each replica, -1 for none.

    1. Search, breadth first, from the busiest rank: from a rank to those of the other replicas of an expert with rows
       there, until one has at least two rows fewer than the busiest.
    2. Along that path move as many rows, of one expert from each rank to the next, as each has and as bring both ends
       level. Only the ends' loads change.
    3. Without such a path all ranks in reach have the largest load or one row less, and what lies on them cannot leave
       them: no split has a lower largest load (cost-reducing paths of semi-matchings, Harvey et al. 2006).
    """
    ranks, replicas = load_G.size, rank_EX.shape[1]
    first_G, expert_X, column_X = _replicas_by_rank(rank_EX, spread_P, ranks)
    queue_G = np.empty(ranks, dtype=np.int64)
    before_G = np.empty(ranks, dtype=np.int64)  # the rank from which a path comes, -1: not reached
    expert_G = np.empty(ranks, dtype=np.int64)  # the expert that moves, from its replica `out_G` to `in_G`
    out_G = np.empty(ranks, dtype=np.int64)
    in_G = np.empty(ranks, dtype=np.int64)
    while True:
        busiest = np.argmax(load_G)
        before_G[:] = -1
        before_G[busiest] = busiest
        queue_G[0] = busiest
        head, tail, end = 0, 1, -1
        while head < tail and end < 0:
            rank = queue_G[head]
            head += 1
            for item in range(first_G[rank], first_G[rank + 1]):
                expert, column = expert_X[item], column_X[item]
                if rows_EX[expert, column] == 0:
                    continue
                for other in range(replicas):
                    there = rank_EX[expert, other]
                    if there < 0 or before_G[there] >= 0:
                        continue
                    before_G[there] = rank
                    expert_G[there], out_G[there], in_G[there] = expert, column, other
                    queue_G[tail] = there
                    tail += 1
                    if end < 0 and load_G[there] <= load_G[busiest] - 2:
                        end = there
        if end < 0:
            return
        rows = (load_G[busiest] - load_G[end]) // 2
        rank = end
        while rank != busiest:
            rows = min(rows, rows_EX[expert_G[rank], out_G[rank]])
            rank = before_G[rank]
        rank = end
        while rank != busiest:
            rows_EX[expert_G[rank], out_G[rank]] -= rows
            rows_EX[expert_G[rank], in_G[rank]] += rows
            rank = before_G[rank]
        load_G[busiest] -= rows
        load_G[end] += rows


@numba.njit(cache=True)
def _replicas_by_rank(rank_EX: Any, spread_P: Any, ranks: int) -> Any:
    """The replicas that rows can go to, rank by rank: those of rank g are the items first_G[g] to first_G[g + 1] - 1.

    Returns (first_G, expert_X, column_X): whose they are, and where in the expert's row of the table.
    """
    first_G = np.zeros(ranks + 2, dtype=np.int64)
    for expert in spread_P:
        for rank in rank_EX[expert]:
            if rank >= 0:
                first_G[rank + 2] += 1
    for rank in range(ranks):
        first_G[rank + 2] += first_G[rank + 1]
    # first_G[g + 1] counts up while rank g is filled, and ends as the first item of rank g + 1.
    expert_X = np.empty(first_G[ranks + 1], dtype=np.int64)
    column_X = np.empty(first_G[ranks + 1], dtype=np.int64)
    for expert in spread_P:
        for column in range(rank_EX.shape[1]):
            rank = rank_EX[expert, column]
            if rank >= 0:
                expert_X[first_G[rank + 1]] = expert
                column_X[first_G[rank + 1]] = column
                first_G[rank + 1] += 1
    return first_G[:-1], expert_X, column_X

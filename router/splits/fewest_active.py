"""Fewest active: no rank has more active experts than it must, and then no more rows.

At decode a rank pays for the experts whose weights it reads, hardly for rows (METRO, arXiv 2512.09277).
"""

from typing import Any

import numba
import numpy as np

from router.splits.choices import fixed_rows, pour_anew
from router.splits.paths import lower_largest


@numba.njit(cache=True)
def fewest_active(counts_E: Any, slots_EX: Any, replicas_E: Any, slots_per_rank: int, ranks: int) -> Any:
    """Rows of each replica [E, X], so that the largest number of active experts on a rank is least.

    1. Experts with several replicas, most rows first, go to the rank with the fewest active experts, then rows.
    2. Paths lower the largest number of active experts to the least that one replica an expert allows, exactly.
    3. As long as that number stays, experts leave the rank with the most rows for one that will have fewer.
    4. Ranks that read fewer experts than the most wait for those that read most, so that one more costs them nothing:
       replicas there take rows from the rank that has the most.

    Differs from the paper, where no expert is on two ranks: there the hottest one's rows all meet on one.
    """
    rows_EX, load_G, rank_EX, spread_P = fixed_rows(counts_E, slots_EX, replicas_E, slots_per_rank, ranks)
    active_G = np.zeros(ranks, dtype=np.int64)
    for expert in range(replicas_E.size):
        if replicas_E[expert] == 1 and counts_E[expert] > 0:
            active_G[slots_EX[expert, 0] // slots_per_rank] += 1

    used_EX = np.zeros(slots_EX.shape, dtype=np.int64)
    _use_one_each(counts_E, used_EX, rank_EX, spread_P, active_G, load_G.copy())
    lower_largest(used_EX, rank_EX, spread_P, active_G)
    for expert in spread_P:
        load_G[rank_EX[expert, np.argmax(used_EX[expert])]] += counts_E[expert]
    most_active = active_G.max()
    while _relieve(counts_E, used_EX, rank_EX, spread_P, active_G, load_G, most_active):
        pass

    open_EX = np.where(used_EX > 0, rank_EX, -1)
    for expert in spread_P:
        rows_EX[expert] = used_EX[expert] * counts_E[expert]
    order_X = np.empty(slots_EX.shape[1], dtype=np.int64)
    opened = True
    while opened:
        opened = False
        while _open_another(counts_E, rows_EX, rank_EX, open_EX, spread_P, active_G, load_G, most_active, order_X):
            opened = True
        lower_largest(rows_EX, open_EX, spread_P, load_G)
    return rows_EX


@numba.njit(cache=True)
def _use_one_each(counts_E: Any, used_EX: Any, rank_EX: Any, spread_P: Any, active_G: Any, load_G: Any) -> None:
    """Step 1: 1 in `used_EX` for the replica that each expert uses."""
    for place in np.argsort(-counts_E[spread_P], kind="mergesort"):
        expert = spread_P[place]
        best = 0  # the first replica of an expert always has a rank
        for replica in range(1, rank_EX.shape[1]):
            rank, least = rank_EX[expert, replica], rank_EX[expert, best]
            if rank >= 0 and (active_G[rank], load_G[rank]) < (active_G[least], load_G[least]):
                best = replica
        used_EX[expert, best] = 1
        active_G[rank_EX[expert, best]] += 1
        load_G[rank_EX[expert, best]] += counts_E[expert]


@numba.njit(cache=True)
def _relieve(
    counts_E: Any, used_EX: Any, rank_EX: Any, spread_P: Any, active_G: Any, load_G: Any, most_active: int
) -> bool:
    """Step 3: move the expert that leaves the busiest rank and its new one with the fewest rows; whether any did."""
    busiest = np.argmax(load_G)
    least, moved, to_replica = load_G[busiest], -1, -1
    for expert in spread_P:
        if rank_EX[expert, np.argmax(used_EX[expert])] != busiest:
            continue
        for replica in range(rank_EX.shape[1]):
            rank = rank_EX[expert, replica]
            if rank < 0 or rank == busiest or active_G[rank] == most_active:
                continue
            larger = max(load_G[rank] + counts_E[expert], load_G[busiest] - counts_E[expert])
            if larger < least:
                least, moved, to_replica = larger, expert, replica
    if moved < 0:
        return False
    rank = rank_EX[moved, to_replica]
    used_EX[moved] = 0
    used_EX[moved, to_replica] = 1
    active_G[busiest] -= 1
    active_G[rank] += 1
    load_G[busiest] -= counts_E[moved]
    load_G[rank] += counts_E[moved]
    return True


@numba.njit(cache=True)
def _open_another(
    counts_E: Any,
    rows_EX: Any,
    rank_EX: Any,
    open_EX: Any,
    spread_P: Any,
    active_G: Any,
    load_G: Any,
    most_active: int,
    order_X: Any,
) -> bool:
    """Step 4: open a replica for rows of the busiest rank, on the least loaded one that may; whether there was any.

    `open_EX`: as `rank_EX`, -1 also for replicas that are not open.
    """
    busiest = np.argmax(load_G)
    least, opened, at_replica = load_G[busiest] - 1, -1, -1
    for expert in spread_P:
        is_there = False
        for replica in range(rank_EX.shape[1]):
            is_there |= open_EX[expert, replica] == busiest and rows_EX[expert, replica] > 0
        if not is_there:
            continue
        for replica in range(rank_EX.shape[1]):
            rank = rank_EX[expert, replica]
            may_open = rank >= 0 and open_EX[expert, replica] < 0 and active_G[rank] < most_active
            if may_open and load_G[rank] < least:
                least, opened, at_replica = load_G[rank], expert, replica
    if opened < 0:
        return False
    open_EX[opened, at_replica] = rank_EX[opened, at_replica]
    active_G[rank_EX[opened, at_replica]] += 1
    pour_anew(counts_E[opened], open_EX[opened], load_G, rows_EX[opened], order_X)
    return True

"""Dealing: which source's rows each replica computes, once it is split how many. All ranks find the same."""

from typing import Any

import numba
import numpy as np


@numba.njit(cache=True)
def deal(rows_GE: Any, rows_EX: Any, slots_EX: Any, replicas_E: Any, slots_per_rank: int, node_of_G: Any) -> Any:
    """Rows by source rank and slot, [G, S], so that each replica computes `rows_EX` of `rows_GE`, near ones if it can.

    Expert by expert; replicas in the order of their slots, sources in that of their ranks:

    1. A replica takes rows of its own rank. No other one competes for them, so as many as can be stay at home.
    2. What is left of both goes inside nodes, as much as each has.
    3. What is left then goes to any replica with room.
    """
    sources, experts = rows_GE.shape
    rows_GS = np.zeros((sources, sources * slots_per_rank), dtype=np.int64)
    for source in range(sources):
        for expert in range(experts):
            if replicas_E[expert] == 1:
                rows_GS[source, slots_EX[expert, 0]] = rows_GE[source, expert]
    source_left_G = np.empty(sources, dtype=np.int64)
    for expert in range(experts):
        if replicas_E[expert] == 1:
            continue
        source_left_G[:] = rows_GE[:, expert]
        left_X = rows_EX[expert].copy()
        for nearness in range(3):
            for replica in range(replicas_E[expert]):
                slot = slots_EX[expert, replica]
                rank = slot // slots_per_rank
                for source in range(sources):
                    if left_X[replica] == 0:
                        break
                    if (nearness == 0 and source != rank) or (nearness == 1 and node_of_G[source] != node_of_G[rank]):
                        continue
                    rows = min(source_left_G[source], left_X[replica])
                    rows_GS[source, slot] += rows
                    source_left_G[source] -= rows
                    left_X[replica] -= rows
    return rows_GS

"""Replication by water-filling: how many slots each expert gets, so that the largest load per replica is least."""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray


def replicate(load_E: NDArray[np.float64], slots: int, ranks: int | None = None) -> NDArray[np.int64]:
    """How many of `slots` each expert gets: one, and each further one to the largest load per replica.

    No expert gets more than one a rank while another could use the slot: a second replica on a rank relieves nothing.

    >>> replicate(np.array([6.0, 1.0, 3.0]), 5).tolist(), replicate(np.array([6.0, 1.0, 3.0]), 5, ranks=2).tolist()
    ([3, 1, 1], [2, 1, 2])
    """
    order_E = np.argsort(-load_E, kind="stable")
    replicas_E = np.empty(load_E.size, dtype=np.int64)
    sorted_E = np.empty_like(replicas_E)
    water_fill(load_E[order_E].astype(np.float64), slots, ranks or slots, sorted_E)
    replicas_E[order_E] = sorted_E
    return replicas_E


@numba.njit(cache=True)
def water_fill(load_E: Any, slots: int, ranks: int, replicas_E: Any) -> float:
    """`replicate` for loads that fall; fills `replicas_E` and returns the largest load per replica.

    The next replica goes to one of those that have some already or to the first that has none, so that only these are
    looked at.
    """
    experts = load_E.size
    replicas_E[:] = 1
    level_E = load_E.copy()
    most = ranks  # replicas that an expert may have
    begun = 1  # experts that are looked at
    for _ in range(slots - experts):
        chosen = -1
        while chosen < 0:
            highest = -1.0
            for expert in range(begun):
                if level_E[expert] > highest and replicas_E[expert] < most:
                    highest, chosen = level_E[expert], expert
            if chosen < 0:
                if begun < experts:
                    begun += 1
                else:
                    most += ranks  # all experts are on every rank already
        replicas_E[chosen] += 1
        level_E[chosen] = load_E[chosen] / replicas_E[chosen]
        if chosen == begun - 1 and begun < experts:
            begun += 1
    return float(level_E[:begun].max())

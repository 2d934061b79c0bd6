"""Replication: how many slots each expert gets."""

import heapq

import numpy as np
from numpy.typing import NDArray


def replicate(load_E: NDArray[np.float64], slots: int, ranks: int | None = None) -> NDArray[np.int64]:
    """How many of `slots` each expert gets: one, and each further one to the largest load per replica.

    No expert gets more than one a rank while another could use the slot: a second replica on a rank relieves nothing.

    >>> replicate(np.array([6.0, 1.0, 3.0]), 5).tolist(), replicate(np.array([6.0, 1.0, 3.0]), 5, ranks=2).tolist()
    ([3, 1, 1], [2, 1, 2])
    """
    replicas_E = np.ones(load_E.size, dtype=np.int64)
    heaviest = [(-float(load), expert) for expert, load in enumerate(load_E)]
    heapq.heapify(heaviest)
    everywhere: list[tuple[float, int]] = []
    for _ in range(slots - load_E.size):
        while heaviest and replicas_E[heaviest[0][1]] == ranks:
            everywhere.append(heapq.heappop(heaviest))
        if not heaviest:  # every expert is on every rank already
            heaviest, everywhere, ranks = everywhere, [], None
            heapq.heapify(heaviest)
        _, expert = heaviest[0]
        replicas_E[expert] += 1
        heapq.heapreplace(heaviest, (-float(load_E[expert]) / int(replicas_E[expert]), expert))
    return replicas_E

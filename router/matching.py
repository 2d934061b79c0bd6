"""Matching: which numbers to give ranks and nodes, so that most of what is there stays where it is."""

import numpy as np
from numpy.typing import NDArray


def matched_ranks(kept_GG: NDArray[np.floating], nodes: int, node_bonus: float = 0.0) -> NDArray[np.int64]:
    """Which of the ranks after each rank before is to be, so that most is kept: [G].

    `kept_GG`: what a rank before keeps if it becomes a rank after; `node_bonus`: what each unit of that is worth if
    both are on the same one of `nodes` nodes only. Nodes stay whole: the ranks of every pair of nodes are matched, and
    then nodes by what that keeps. Both are assignment problems, solved exactly.

    >>> matched_ranks(np.array([[0, 0, 1, 5], [0, 0, 5, 1], [5, 1, 0, 0], [1, 5, 0, 0]]), nodes=2).tolist()
    [3, 2, 0, 1]
    """
    from scipy.optimize import linear_sum_assignment  # takes 0.2 s to load

    size = kept_GG.shape[0] // nodes
    kept_NGNG = kept_GG.reshape(nodes, size, nodes, size)
    from_NNG = np.empty((nodes, nodes, size), dtype=np.int64)
    kept_NN = node_bonus * kept_NGNG.sum(axis=(1, 3))
    for before in range(nodes):
        for after in range(nodes):
            pairs_GG = kept_NGNG[before, :, after]
            rows_G, from_NNG[before, after] = linear_sum_assignment(pairs_GG, maximize=True)
            kept_NN[before, after] += pairs_GG[rows_G, from_NNG[before, after]].sum()
    from_N = linear_sum_assignment(kept_NN, maximize=True)[1]
    return np.concatenate([after * size + from_NNG[before, after] for before, after in enumerate(from_N)])

"""Turns: which replica a token finds when tokens take an expert's replicas one after another."""

import numpy as np
from numpy.typing import NDArray

from router.backends import rank_within_group


def replicas_in_turn(ids_TK: NDArray[np.integer], replicas_E: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which of its expert's replicas each pair of a layer takes, where they take it in turn: [T, K], -1 for none.

    >>> replicas_in_turn(np.array([[0, 1], [0, 1], [0, 9]]), np.array([2, 1])).tolist()
    [[0, 0], [1, 0], [0, -1]]
    """
    experts = replicas_E.size
    known_TK = (ids_TK >= 0) & (ids_TK < experts)
    expert_TK = np.where(known_TK, ids_TK, experts).astype(np.int64)
    turn_TK = rank_within_group(expert_TK.reshape(-1), experts + 1).reshape(expert_TK.shape)
    return np.where(known_TK, turn_TK % np.append(replicas_E, 1)[expert_TK], -1)

"""Moves: a placement made better for new loads by filling few slots anew.

A fresh plan moves nearly every slot. Most of its balance comes of a few moves off the fullest ranks, and how many slots
each fills is known beforehand, so that a budget buys the best of them, in whichever layers they are.
"""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from router.placement.base import Placement
from router.placement.problem import check_loads
from router.relief import Path, relieve, start
from traces.errors import InputError

# How far above the mean the fullest rank may stay. Measured on five load shapes after a drift of sigma = 0.3: levels of
# 0.02 and 0.005 leave balancedness lower by up to 0.005 once 10% of slots are moved, and so do more levels than two,
# for what is moved to one level is often moved again to the next.
_LEVELS = (0.01, 0.002)


def improve(current: Placement, loads_LE: NDArray[np.integer | np.floating], *, fills: int) -> Placement:
    """`current` made better for `loads_LE`, where replicas share evenly and at most `fills` slots are filled anew.

    A slot is filled anew if its expert was nowhere on its rank in `current` (`router.balance.moved_LS`). `fills` are
    those of all layers together: they go where they raise the mean balancedness most. No layer's largest rank load
    rises, every expert keeps a slot, and no rank gets a second replica of an expert.

    1. Each layer goes down to a level a little above its mean: the fullest rank is relieved by the move that takes
       most load above the level off all ranks for each slot filled, until no rank is above it. A move gives a slot of
       a replica to an expert of the fullest rank (fills 1 slot), or swaps two slots of different ranks (fills 2).
    2. Where the budget allows more than that, the same again for a lower level.
    3. Of each layer's moves, taken from the first on, so many are kept as pay best: the steps of the concave hulls of
       balancedness over slots filled, steepest first, while the budget lasts.

    Errors: `InputError` for a negative budget, or for loads that are not of the placement's layers and experts.
    """
    if fills < 0:
        raise InputError(f"a budget of {fills} slots; give 0 or more")
    load_LE = np.ascontiguousarray(loads_LE, dtype=np.float64)  # one layout: one compilation
    check_loads(load_LE)
    if load_LE.shape != (current.layers, current.experts):
        raise InputError(
            f"loads of shape {load_LE.shape} for a placement of {current.layers} layers of {current.experts} experts; "
            "give one a layer and expert"
        )
    slot_to_expert_LS = current.slot_to_expert_LS.astype(np.int64, order="C")
    mean_L = load_LE.sum(axis=1) / current.ranks
    state = start(slot_to_expert_LS.copy(), load_LE, current.ranks)
    path = Path.begin(state.load_LG.max(axis=1), longest=2 * current.slots)
    for level in _LEVELS:
        if relieve(state, path, mean_L * (1 + level), fills) >= fills:
            break
    _take(slot_to_expert_LS, path, _choose(path, mean_L, fills))
    return Placement(slot_to_expert_LS=slot_to_expert_LS, experts=current.experts, ranks=current.ranks)


@numba.njit(cache=True)
def _choose(path: Any, mean_L: Any, budget: int) -> Any:
    """How many moves of each layer to keep: [L]."""
    layers = mean_L.size
    kept_L = np.zeros(layers, dtype=np.int64)
    next_L = np.zeros(layers, dtype=np.int64)
    rate_L = np.zeros(layers)
    left = budget
    for layer in range(layers):
        rate_L[layer], next_L[layer] = _steepest(path, layer, 0, mean_L[layer], left)
    while True:
        layer = int(np.argmax(rate_L))
        if rate_L[layer] <= 0:
            break
        cost = path.filled_LX[layer, next_L[layer]] - path.filled_LX[layer, kept_L[layer]]
        if cost <= left:
            left -= cost
            kept_L[layer] = next_L[layer]
        rate_L[layer], next_L[layer] = _steepest(path, layer, kept_L[layer], mean_L[layer], left)
    return kept_L


@numba.njit(cache=True)
def _steepest(path: Any, layer: int, now: int, mean: float, left: int) -> Any:
    """The later entry to which balancedness rises most for each of at most `left` slots filled: the rate, the entry."""
    best = (0.0, now)
    for entry in range(now + 1, path.length_L[layer]):
        cost = path.filled_LX[layer, entry] - path.filled_LX[layer, now]
        rise = mean / path.most_LX[layer, entry] - mean / path.most_LX[layer, now]
        if cost <= left and rise > best[0] * max(cost, 1):
            best = (rise / max(cost, 1), entry)
    return best


@numba.njit(cache=True)
def _take(expert_LS: Any, path: Any, kept_L: Any) -> None:
    """Fill the slots of the first moves of each layer, so many as are kept."""
    for layer in range(kept_L.size):
        for entry in range(1, kept_L[layer] + 1):
            for one in range(2):
                expert_LS[layer, path.slot_LX2[layer, entry, one]] = path.expert_LX2[layer, entry, one]

"""Balanced placement: water-filled replicas, dealt to ranks in rounds, evened out by swaps. All layers at once."""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from router.placement.pack import box_bound, search_box
from router.placement.problem import PlacementProblem

_PLACES = np.uint64(0xFFFF)  # the low bits of a sort key, which hold the expert


def balanced(problem: PlacementProblem) -> NDArray[np.int64]:
    """Slots [L, S] whose rank loads are as even as the heaviest replica lets them be, to a ten-thousandth.

    1. Experts are sorted by load.
    2. Replicas by water-filling (`replicate`): the largest load per replica is least.
    3. Replicas by falling load in rounds of one a rank, the heaviest of a round to the lightest rank (`pack`).
    4. Swaps of the heaviest rank with others, while they make it lighter.
    5. Where that is not as even as it could be, other numbers of replicas of the hottest experts (`pack.search_box`).
    """
    loads_LE = problem.even_where_none_LE
    slot_to_expert_LS = np.empty((problem.layers, problem.slots), dtype=np.int64)
    _fill_layers(loads_LE, by_falling_load_LE(loads_LE), problem.ranks, slot_to_expert_LS)
    return slot_to_expert_LS


def by_falling_load_LE(loads_LE: NDArray[np.float64]) -> NDArray[np.int64]:
    """Experts of each layer by falling load, to 36 bits of it; ties to the lower one.

    Whole numbers sort several times faster than floats with their places: those of loads that are not negative
    have the order of their bits, and the last bits make room for the expert.
    """
    experts = loads_LE.shape[1]
    if experts > int(_PLACES):
        return np.argsort(-loads_LE, axis=1, kind="stable")
    keys_LE = (loads_LE + 0.0).view(np.uint64) | _PLACES
    keys_LE -= np.arange(experts, dtype=np.uint64)
    keys_LE.sort(axis=1)
    return np.asarray(_PLACES - (keys_LE[:, ::-1] & _PLACES), dtype=np.int64)


@numba.njit(cache=True)
def _fill_layers(loads_LE: Any, order_LE: Any, ranks: int, slot_to_expert_LS: Any) -> None:
    experts, slots = loads_LE.shape[1], slot_to_expert_LS.shape[1]
    held_GP = np.empty((ranks, slots // ranks), dtype=np.int64)
    load_G = np.empty(ranks)
    load_E = np.empty(experts)
    for layer in range(loads_LE.shape[0]):
        order_E = order_LE[layer]
        for place in range(experts):
            load_E[place] = loads_LE[layer, order_E[place]]
        search_box(load_E, box_bound(load_E, ranks, slots), held_GP, load_G)
        held_S = held_GP.reshape(-1)
        for slot in range(slots):
            slot_to_expert_LS[layer, slot] = order_E[held_S[slot]]

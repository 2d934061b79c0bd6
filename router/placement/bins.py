"""Bins: the packing by longest processing time that several placements share. Compiled."""

from typing import Any

import numba
import numpy as np


@numba.njit(cache=True)
def lpt_bins(load_I: Any, bins: int) -> Any:
    """Heaviest first, each item to the lightest bin with room: the items of each bin [bins, items / bins].

    Ties go to the lower item and the lower bin. Source: Graham 1969, here for bins of equally many items.
    """
    room = load_I.size // bins
    packed_BX = np.empty((bins, room), dtype=np.int64)
    held_B = np.zeros(bins, dtype=np.int64)
    load_B = np.zeros(bins)
    for item in np.argsort(-load_I, kind="mergesort"):  # stable
        lightest = -1
        for candidate in range(bins):
            if held_B[candidate] < room and (lightest < 0 or load_B[candidate] < load_B[lightest]):
                lightest = candidate
        packed_BX[lightest, held_B[lightest]] = item
        held_B[lightest] += 1
        load_B[lightest] += load_I[item]
    return packed_BX

"""The few array primitives that routing policies stand on, for numpy, torch and cupy.

Policies are written once against the array API; what the standard lacks is here. numpy arrays go to
compiled loops, torch and cupy arrays to sorts on their own device. Both give equal results: orders are
stable, so ties go to the lower expert id or the earlier pair.

Arrays are typed `Array = Any`: the array API has no common static type.
"""

from typing import Any

import numba
import numpy as np
from array_api_compat import array_namespace, is_numpy_array

Array = Any

namespace = array_namespace


def topk(scores_TE: Array, k: int) -> tuple[Array, Array]:
    """The `k` largest scores of each row, best first, ties to the lower id: (values [T, k], ids [T, k]).

    >>> topk(np.array([[0.1, 0.4, 0.4]]), 2)[1].tolist()
    [[1, 2]]
    """
    xp = namespace(scores_TE)
    ids_TK = xp.argsort(scores_TE, axis=-1, descending=True, stable=True)[:, :k]
    return xp.take_along_axis(scores_TE, ids_TK, axis=-1), ids_TK


def bincount(keys_N: Array, groups: int) -> Array:
    """How often each group 0..groups-1 occurs in `keys_N`: [groups], integer."""
    return namespace(keys_N).bincount(keys_N, minlength=groups)


def rank_within_group(keys_N: Array, groups: int, order_N: Array | None = None) -> Array:
    """For each item, how many items of its group come before it: [N], integer.

    `order_N` lists the items in the order they queue (as they stand, if it is None).

    >>> rank_within_group(np.array([7, 3, 7, 7]), 8).tolist()
    [0, 0, 1, 2]
    >>> rank_within_group(np.array([7, 3, 7, 7]), 8, order_N=np.array([3, 2, 1, 0])).tolist()
    [2, 0, 1, 0]
    """
    xp = namespace(keys_N)
    if order_N is None:
        order_N = xp.arange(keys_N.shape[0], device=keys_N.device)
    if is_numpy_array(keys_N):
        return _rank_within_group(keys_N, groups, order_N)
    queue_N = keys_N[order_N]
    by_group_N = xp.argsort(queue_N, stable=True)
    counts = xp.bincount(queue_N, minlength=groups)
    first_of_group = xp.cumulative_sum(counts) - counts
    rank_by_group_N = xp.arange(keys_N.shape[0], device=keys_N.device) - first_of_group[queue_N[by_group_N]]
    rank_N = xp.empty_like(rank_by_group_N)
    rank_N[order_N[by_group_N]] = rank_by_group_N
    return rank_N


@numba.njit(cache=True)
def _rank_within_group(keys_N: Array, groups: int, order_N: Array) -> Array:
    seen = np.zeros(groups, dtype=np.int64)
    rank_N = np.empty(keys_N.shape[0], dtype=np.int64)
    for item in order_N:
        rank_N[item] = seen[keys_N[item]]
        seen[keys_N[item]] += 1
    return rank_N

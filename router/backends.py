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
    if is_numpy_array(scores_TE):
        ids_TK = np.empty((scores_TE.shape[0], min(k, scores_TE.shape[1])), dtype=np.int64)
        values_TK = np.empty(ids_TK.shape, dtype=scores_TE.dtype)
        _topk(scores_TE, values_TK, ids_TK)
        return values_TK, ids_TK
    ids_TK = xp.argsort(scores_TE, axis=-1, descending=True, stable=True)[:, :k]
    return xp.take_along_axis(scores_TE, ids_TK, axis=-1), ids_TK


def on_host(array: Array) -> bool:
    """Whether its values can be looked at without waiting for a device."""
    return is_numpy_array(array) or str(array.device) == "cpu"


def first_columns(used_TC: Array, k: int) -> tuple[Array, Array]:
    """The columns of the first `k` true entries of each row, and whether there are so many: ([T, k], bool [T, k]).

    Columns are 0 where a row has fewer.

    >>> first_columns(np.array([[False, True, True, True], [False, False, True, False]]), 2)[0].tolist()
    [[1, 2], [2, 0]]
    """
    xp = namespace(used_TC)
    if is_numpy_array(used_TC):
        columns_TK = np.zeros((used_TC.shape[0], k), dtype=np.int64)
        found_TK = np.zeros(columns_TK.shape, dtype=np.bool_)
        _first_columns(used_TC, columns_TK, found_TK)
        return columns_TK, found_TK
    columns_TC = xp.argsort(xp.astype(used_TC, xp.int8), axis=1, descending=True, stable=True)
    missing = k - used_TC.shape[1]
    if missing > 0:
        columns_TC = xp.concat([columns_TC, xp.zeros_like(columns_TC[:, :1]).repeat(1, missing)], axis=1)
    columns_TK = columns_TC[:, :k]
    place_K = xp.arange(k, device=used_TC.device)
    found_TK = place_K < xp.sum(xp.astype(used_TC, xp.int64), axis=1)[:, None]
    return xp.where(found_TK, columns_TK, xp.zeros_like(columns_TK)), found_TK


def segment_sum(values_N: Array, keys_N: Array, groups: int) -> Array:
    """The sum of the values of each group 0..groups-1: [groups] float64, added in order.

    >>> segment_sum(np.array([1.0, 2.0, 4.0]), np.array([1, 0, 1]), 3).tolist()
    [2.0, 5.0, 0.0]
    """
    xp = namespace(values_N)
    return xp.bincount(keys_N, weights=xp.astype(values_N, xp.float64), minlength=groups)


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


@numba.njit(cache=True)
def _topk(scores_TE: Array, values_TK: Array, ids_TK: Array) -> None:
    """By insertion: a later score goes before an earlier one only if it is larger."""
    width = ids_TK.shape[1]
    if not width:
        return
    for token in range(scores_TE.shape[0]):
        scores_E, values_K, ids_K = scores_TE[token], values_TK[token], ids_TK[token]
        found = 0
        for expert in range(scores_E.shape[0]):
            score = scores_E[expert]
            if found == width and not score > values_K[width - 1]:
                continue
            place = found if found < width else width - 1
            while place > 0 and score > values_K[place - 1]:
                values_K[place], ids_K[place] = values_K[place - 1], ids_K[place - 1]
                place -= 1
            values_K[place], ids_K[place] = score, expert
            found = min(found + 1, width)


@numba.njit(cache=True)
def _first_columns(used_TC: Array, columns_TK: Array, found_TK: Array) -> None:
    width = columns_TK.shape[1]
    for token in range(used_TC.shape[0]):
        found = 0
        for column in range(used_TC.shape[1]):
            if found == width:
                break
            if used_TC[token, column]:
                columns_TK[token, found], found_TK[token, found] = column, True
                found += 1

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


def first_true(used_TC: Array, k: int) -> Array:
    """The mask with only the first `k` true entries of each row: bool [T, C].

    >>> first_true(np.array([[False, True, True, True]]), 2).tolist()
    [[False, True, True, False]]
    """
    xp = namespace(used_TC)
    if is_numpy_array(used_TC):
        first_TC = np.zeros_like(used_TC)
        _first_true(used_TC, k, first_TC)
        return first_TC
    return used_TC & (xp.cumulative_sum(xp.astype(used_TC, xp.int64), axis=1) <= k)


def marked(columns_TK: Array, count: int) -> Array:
    """A mask of `count` columns, true at those that each row lists: bool [T, count].

    >>> marked(np.array([[2, 0]]), 4).tolist()
    [[True, False, True, False]]
    """
    xp = namespace(columns_TK)
    used_TC = xp.zeros((columns_TK.shape[0], count), dtype=xp.bool, device=columns_TK.device)
    used_TC[xp.arange(columns_TK.shape[0], device=columns_TK.device)[:, None], columns_TK] = True
    return used_TC


def best_of_row(values_TC: Array, limits_T: Array) -> Array:
    """The largest `limits_T` values of each row, ties to the earlier column: bool [T, C].

    >>> best_of_row(np.array([[0.1, 0.4, 0.4], [0.3, 0.2, 0.1]]), np.array([1, 2])).tolist()
    [[False, True, False], [True, True, False]]
    """
    xp = namespace(values_TC)
    best_TC = xp.zeros(values_TC.shape, dtype=xp.bool, device=values_TC.device)
    if not values_TC.shape[0]:
        return best_TC
    _, columns_TK = topk(values_TC, int(xp.max(limits_T)))
    place_K = xp.arange(columns_TK.shape[1], device=values_TC.device)
    rows_T1 = xp.arange(values_TC.shape[0], device=values_TC.device)[:, None]
    best_TC[rows_T1, columns_TK] = place_K < limits_T[:, None]
    return best_TC


def nth_largest(values_TC: Array, ids_TC: Array, experts: int, n: int) -> Array:
    """The n-th largest value of each expert over T tokens, of which each names all E in `ids_TC`: [E], 1 <= n <= T.

    >>> nth_largest(np.array([[0.5, 0.3], [0.6, 0.4]]), np.array([[1, 0], [0, 1]]), 2, 1).tolist()
    [0.6, 0.5]
    """
    xp = namespace(values_TC)
    tokens = values_TC.shape[0]
    values_ET = xp.empty((experts, tokens), dtype=values_TC.dtype, device=values_TC.device)
    if is_numpy_array(values_TC):
        _by_expert(values_TC, ids_TC, values_ET)
        values_ET.partition(tokens - n, axis=1)
        return values_ET[:, tokens - n]
    values_ET[ids_TC, xp.arange(tokens, device=values_TC.device)[:, None]] = values_TC
    return xp.sort(values_ET, axis=1)[:, tokens - n]


def best_in_groups(scores_TC: Array, group_TC: Array, groups: int, count: int) -> Array:
    """The sum of the first `count` scores of each group in each row, added in order: float64 [T, groups].

    >>> best_in_groups(np.array([[4.0, 2.0, 1.0, 0.5]]), np.array([[1, 1, 0, 1]]), 2, 2).tolist()
    [[1.0, 6.0]]
    """
    xp = namespace(scores_TC)
    tokens = scores_TC.shape[0]
    if is_numpy_array(scores_TC):
        total_TX = np.zeros((tokens, groups))
        _best_in_groups(scores_TC, group_TC, np.zeros(total_TX.shape, dtype=np.int64), count, total_TX)
        return total_TX
    key_N = xp.reshape(xp.arange(tokens, device=scores_TC.device)[:, None] * groups + group_TC, (-1,))
    first_N = rank_within_group(key_N, tokens * groups) < count
    scores_N = xp.reshape(scores_TC, (-1,))
    total_N = segment_sum(xp.where(first_N, scores_N, xp.zeros_like(scores_N)), key_N, tokens * groups)
    return xp.reshape(total_N, (tokens, groups))


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


def first_fitting(keys_N: Array, places_X: Array, order_N: Array | None = None) -> Array:
    """Which items are among the first `places_X[group]` of their group: bool [N].

    `keys_N` is the group of each item; `order_N` lists the items in the order they queue (as they stand, if None).

    >>> first_fitting(np.array([1, 1, 0, 1]), np.array([0, 2])).tolist()
    [True, True, False, False]
    """
    if is_numpy_array(keys_N):
        fits_N = np.empty(keys_N.shape[0], dtype=np.bool_)
        if order_N is None:
            _first_fitting(keys_N, places_X, fits_N)
        else:
            _first_fitting_in(keys_N, places_X, order_N, fits_N)
        return fits_N
    return rank_within_group(keys_N, places_X.shape[0], order_N) < places_X[keys_N]


def largest_fitting(keys_N: Array, places_X: Array, values_N: Array) -> Array:
    """Which items have one of the `places_X[group]` largest values of their group, ties to the earlier: bool [N].

    >>> largest_fitting(np.array([0, 0, 0, 0]), np.array([2]), np.array([0.1, 0.3, 0.1, 0.0])).tolist()
    [True, True, False, False]
    """
    if is_numpy_array(keys_N):
        fits_N = np.empty(keys_N.shape[0], dtype=np.bool_)
        mark_largest(keys_N, places_X, values_N, fits_N)
        return fits_N
    order_N = namespace(values_N).argsort(values_N, descending=True, stable=True)
    return first_fitting(keys_N, places_X, order_N)


@numba.njit(cache=True)
def _first_fitting(keys_N: Array, places_X: Array, fits_N: Array) -> None:
    left_X = places_X.copy()
    for item in range(keys_N.shape[0]):
        left = left_X[np.uintp(keys_N[item])]
        fits_N[item] = left > 0
        left_X[np.uintp(keys_N[item])] = left - 1


@numba.njit(cache=True)
def _first_fitting_in(keys_N: Array, places_X: Array, order_N: Array, fits_N: Array) -> None:
    left_X = places_X.copy()
    for item in order_N:
        left = left_X[np.uintp(keys_N[item])]
        fits_N[item] = left > 0
        left_X[np.uintp(keys_N[item])] = left - 1


@numba.njit(cache=True)
def mark_largest(keys_N: Array, places_X: Array, values_N: Array, fits_N: Array) -> None:
    """`largest_fitting` for compiled loops over numpy arrays, written to `fits_N`.

    Only overfull groups are looked into: the last value that fits is selected, then items pass it or not. Loops over
    items take no branch that depends on their group, which no processor foresees.
    """
    groups = places_X.shape[0]
    count_X = np.zeros(groups, dtype=np.int64)
    for item in range(keys_N.shape[0]):
        count_X[np.uintp(keys_N[item])] += 1
    over_X = (count_X > places_X).astype(np.int64)
    gathered = (over_X * count_X).sum()
    next_X = np.cumsum(over_X * count_X) - over_X * count_X
    next_X[over_X == 0] = gathered  # one place behind the values, which nobody reads
    value_M = np.empty(gathered + 1, dtype=values_N.dtype)
    for item in range(keys_N.shape[0]):
        key: Any = np.uintp(keys_N[item])
        value_M[np.uintp(next_X[key])] = values_N[item]
        next_X[key] += over_X[key]
    last_X = np.full(groups, -np.inf, dtype=values_N.dtype)
    ties_X = count_X.copy()
    for group in range(groups):
        places = max(places_X[group], 0)
        if not over_X[group]:
            continue
        if not places:
            last_X[group], ties_X[group] = np.inf, 0
            continue
        mine_M = value_M[next_X[group] - count_X[group] : next_X[group]]
        last = np.partition(mine_M, mine_M.shape[0] - places)[mine_M.shape[0] - places]
        larger = 0
        for value in mine_M:
            larger += value > last
        last_X[group], ties_X[group] = last, places - larger
    for item in range(keys_N.shape[0]):
        key = np.uintp(keys_N[item])
        last = last_X[key]
        fits_N[item] = values_N[item] > last
        if values_N[item] == last and ties_X[key] > 0:
            fits_N[item] = True
            ties_X[key] -= 1


@numba.njit(cache=True)
def _first_true(used_TC: Array, k: int, first_TC: Array) -> None:
    for token in range(used_TC.shape[0]):
        found = 0
        for column in range(used_TC.shape[1]):
            if found == k:
                break
            if used_TC[token, column]:
                first_TC[token, column] = True
                found += 1


@numba.njit(cache=True)
def _by_expert(values_TC: Array, ids_TC: Array, values_ET: Array) -> None:
    for token in range(values_TC.shape[0]):
        for column in range(values_TC.shape[1]):
            values_ET[ids_TC[token, column], token] = values_TC[token, column]


@numba.njit(cache=True)
def _best_in_groups(scores_TC: Array, group_TC: Array, seen_TX: Array, count: int, total_TX: Array) -> None:
    for token in range(scores_TC.shape[0]):
        for column in range(scores_TC.shape[1]):
            group = group_TC[token, column]
            if seen_TX[token, group] < count:
                seen_TX[token, group] += 1
                total_TX[token, group] += scores_TC[token, column]

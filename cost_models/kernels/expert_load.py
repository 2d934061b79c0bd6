"""What a rank's experts have to do: reduced from the rows of its slots, or expected from how a table drew them.

Axes: X any leading shape, N table rows or operations, S slots of a rank, E experts of all ranks, D draws, L the entries
of a load in the order of `ExpertLoad`.

The measured tables name a distribution, not the rows of each expert. The sampler below follows what the tables' authors
describe (NVIDIA AIConfigurator, collector/helper.py): `balanced` gives token i the experts i + j·stride for j < top-k,
stride = ⌈experts / top-k⌉ (spread out where there are fewer tokens than that); `power_law_<alpha>` draws a number for
every expert by inverse CDF from x^-alpha on [1, 0.8·tokens] (on [0.01, 2] where pairs are no more than experts), scales
them to the pairs, rounds, caps each at one pair a token, makes the sum right, and times the busiest rank.

Which experts make the sum right has changed twice. It decides the load where most experts round to no row: one token's
eight pairs then all lie on one rank, or on eight. See `LeftOver`.
"""

from dataclasses import dataclass, fields
from functools import cache
from typing import Literal

import numba
import numpy as np
from numpy.typing import NDArray

from cost_models.ops import Array

# Who gets the pairs that rounding and the cap left over, one each, from the first collectors to the latest: the largest
# experts (which had no cap); the smallest, of equal ones the last, so that they are neighbours on the last rank; the
# smallest of each rank in turn. Where placement is planned it has always been the smallest.
LeftOver = Literal["largest", "smallest", "ranks"]

DRAWS = 16  # of each distribution; the tables average one or five of their own, so that an expectation is what is known


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad:
    """The work of one rank's experts; arrays of shape X, real numbers where they are expectations.

    `rows`: in all; `active`: experts with rows; `tiles_64`, `tiles_128`: tiles of so many rows that cover each
    expert's; `busiest`: the largest expert's rows. Where widths differ between slots, all but `busiest` are in
    units of `width`, the mean width weighted by rows. `tokens`: distinct tokens with rows here, as far as known.
    """

    rows: Array
    active: Array
    tiles_64: Array
    tiles_128: Array
    busiest: Array
    tokens: Array
    width: Array | float


_NAMES = tuple(field.name for field in fields(ExpertLoad) if field.name != "width")
_ENTRIES = len(_NAMES)


def load_of_rows(rows_XS: Array, widths_S: Array | float) -> ExpertLoad:
    """Reduce `rows_XS` rows for each of S slots, each `widths_S` wide (or all of one width)."""
    rows_XS = np.asarray(rows_XS)
    shape, slots = rows_XS.shape[:-1], rows_XS.shape[-1]
    even = np.ndim(widths_S) == 0
    relative_S = np.ones(slots) if even else np.asarray(widths_S, dtype=np.float64)
    load_LN = np.empty((_ENTRIES + 1, int(np.prod(shape))))
    _reduce(np.ascontiguousarray(rows_XS).reshape(-1, slots), relative_S, even, load_LN)
    loads = {name: load_LN[i].reshape(shape) for i, name in enumerate(_NAMES)}
    return ExpertLoad(**loads, width=float(widths_S) if even else load_LN[-1].reshape(shape))


@numba.njit(cache=True)
def _reduce(rows_NS: Array, widths_S: Array, even: bool, load_LN: Array) -> None:
    for n in range(rows_NS.shape[0]):
        total = busiest = np.int64(0)
        rows = active = tiles_64 = tiles_128 = 0.0
        for s in range(rows_NS.shape[1]):
            count = np.int64(rows_NS[n, s])
            if count > 0:
                width = widths_S[s]
                total += count
                busiest = max(busiest, count)
                rows += count * width
                active += width
                tiles_64 += ((count + 63) >> 6) * width
                tiles_128 += ((count + 127) >> 7) * width
        width = 1.0 if even else rows / total if total > 0 else widths_S.mean()
        load_LN[0, n] = total
        load_LN[1, n] = active / width
        load_LN[2, n] = tiles_64 / width
        load_LN[3, n] = tiles_128 / width
        load_LN[4, n] = busiest
        load_LN[5, n] = total
        load_LN[6, n] = width


def expected_load(
    *,
    tokens_N: Array,
    topk_N: Array,
    experts_N: Array,
    slots_N: Array,
    ranks_N: Array,
    distribution_N: Array,
    width_N: Array,
    near_tokens_N: Array | None = None,
    left_over: LeftOver = "ranks",
) -> ExpertLoad:
    """The expected load of the timed rank of each table row.

    `tokens_N` of all ranks together; `slots_N` more than `experts_N` where hot experts have replicas.
    `near_tokens_N`: the timed rank's distinct tokens where a table says them: the draws that come closest count.
    `left_over`: the collector's rule for what rounding left over.
    """
    names, code_N = np.unique(np.asarray(distribution_N), return_inverse=True)
    near_N = np.full(len(code_N), -1) if near_tokens_N is None else near_tokens_N
    keys, which_N = np.unique(
        np.stack([tokens_N, topk_N, experts_N, slots_N, ranks_N, code_N, near_N], axis=1), axis=0, return_inverse=True
    )
    loads = []
    for tokens, topk, experts, slots, ranks, code, near in keys.tolist():
        drawn_DL = _drawn(tokens, topk, experts, slots, ranks, str(names[code]), left_over)
        if near >= 0:
            away_D = np.abs(drawn_DL[:, 5] - near)
            drawn_DL = drawn_DL[away_D == away_D.min()]
        loads.append(drawn_DL.mean(axis=0))
    load_LN = np.array(loads)[which_N.ravel()].T
    return ExpertLoad(**{name: load_LN[i] for i, name in enumerate(_NAMES)}, width=width_N)


@cache
def _drawn(
    tokens: int, topk: int, experts: int, slots: int, ranks: int, distribution: str, left_over: LeftOver
) -> NDArray[np.float64]:
    """The timed rank's load in each of D draws, shape [D, L]."""
    if distribution == "balanced":
        return np.asarray(_balanced(tokens, topk, experts, ranks)[None])
    if distribution == "uniform":
        return _uniform(tokens, topk, experts, ranks)
    alpha = float(distribution.removeprefix("power_law_").removesuffix("_eplb"))
    load_DL = np.empty((DRAWS, _ENTRIES))
    chance_DE = np.random.default_rng(0).random((DRAWS, experts))
    planned = distribution.endswith("_eplb")
    rule = "smallest" if planned else left_over
    _power_law(chance_DE, (tokens, topk, slots, ranks, alpha, planned), rule, load_DL)
    return load_DL


def _uniform(tokens: int, topk: int, experts: int, ranks: int) -> NDArray[np.float64]:
    """Every expert the same whole number of rows, one for some where that is none; the same in every draw."""
    here = experts // ranks
    each = tokens * topk // experts
    counts_S = np.full(here, each) if each else (np.arange(here) < tokens * topk // ranks).astype(np.int64)
    load_DL = np.empty((1, _ENTRIES))
    _summarise(counts_S, min(tokens, int(counts_S.sum())), load_DL[0])
    return load_DL


@numba.njit(cache=True)
def _summarise(counts_S: Array, tokens: int, load_L: Array) -> None:
    load_L[:] = 0
    for count in counts_S:
        if count > 0:
            load_L[0] += count
            load_L[1] += 1
            load_L[2] += (count + 63) // 64
            load_L[3] += (count + 127) // 128
            load_L[4] = max(load_L[4], count)
    load_L[5] = tokens


@numba.njit(cache=True)
def _balanced(tokens: int, topk: int, experts: int, ranks: int) -> Array:
    here = experts // ranks
    stride = -(-experts // topk)
    counts_S = np.zeros(here, dtype=np.int64)
    distinct = 0
    for i in range(tokens):
        start = float(i) if tokens >= stride else i * stride / tokens
        local = False
        for j in range(topk):
            expert = int((start + j * stride) % experts)
            if expert < here:
                counts_S[expert] += 1
                local = True
        distinct += local
    load_L = np.empty(6)
    _summarise(counts_S, distinct, load_L)
    return load_L


@numba.njit(cache=True)
def _power_law(chance_DE: Array, setting: tuple[int, int, int, int, float, bool], rule: str, load_DL: Array) -> None:
    tokens, topk, slots, ranks, alpha, planned = setting
    draws, experts = chance_DE.shape
    pairs = tokens * topk
    low, high = (1.0, 0.8 * tokens) if pairs > experts else (0.01, 2.0)
    power = 1 - alpha if alpha != 1 else 1e-9
    for d in range(draws):
        x_E = ((high**power - low**power) * chance_DE[d] + low**power) ** (1 / power)
        counts_E = np.rint(x_E / x_E.sum() * pairs).astype(np.int64)
        if rule == "smallest":
            _fill_smallest(counts_E, tokens)
            _correct(counts_E, pairs - counts_E.sum(), False, tokens)
        elif rule == "largest":
            _correct(counts_E, pairs - counts_E.sum(), True, pairs)
        counts_E = np.minimum(counts_E, tokens)
        _spread(counts_E.reshape((1 if planned else ranks), -1), pairs - counts_E.sum(), tokens)
        if planned:
            counts_E = _planned(counts_E, slots, ranks)
        counts_RS = counts_E.reshape(ranks, -1)
        timed = int(np.argmax(counts_RS.sum(axis=1)))
        _summarise(counts_RS[timed], _distinct(counts_RS, timed, tokens), load_DL[d])


@numba.njit(cache=True)
def _fill_smallest(counts_E: Array, bound: int) -> None:
    """Move what is beyond `bound` to the smallest expert until that is full, then to the next."""
    beyond = np.maximum(counts_E - bound, 0).sum()
    counts_E[:] = np.minimum(counts_E, bound)
    for e in np.argsort(-counts_E, kind="mergesort")[::-1]:
        give = min(bound - counts_E[e], beyond)
        counts_E[e] += give
        beyond -= give


@numba.njit(cache=True)
def _correct(counts_E: Array, short: int, largest_first: bool, bound: int) -> None:
    """Add `short` rows, one each up to `bound`, to the largest experts or the smallest; or take them from these."""
    descending = np.argsort(-counts_E, kind="mergesort")
    ascending = descending[::-1].copy()
    order = descending if largest_first else ascending
    while short > 0 and counts_E.min() < bound:
        for e in order:
            if short > 0 and counts_E[e] < bound:
                counts_E[e] += 1
                short -= 1
    for i in range(-short):
        e = ascending[i % len(ascending)]
        counts_E[e if counts_E[e] > 0 else np.argmax(counts_E)] -= 1


@numba.njit(cache=True)
def _spread(counts_RS: Array, short: int, bound: int) -> None:
    """Add `short` rows, one a rank in turn, to each rank's least loaded expert; or take them from its most loaded."""
    ranks, step, left = len(counts_RS), 1 if short > 0 else -1, abs(short)
    while left > 0:
        open_R = np.zeros(ranks, dtype=np.bool_)
        for r in range(ranks):
            open_R[r] = (counts_RS[r].min() < bound) if step > 0 else (counts_RS[r].max() > 0)
        count = open_R.sum()
        if count == 0:
            return
        share, extra = left // count, left % count
        for r in range(ranks):
            if open_R[r]:
                give = share + (1 if extra > 0 else 0)
                extra -= 1
                left -= give - _level(counts_RS[r], give, step, bound)


@numba.njit(cache=True)
def _level(counts_S: Array, give: int, step: int, bound: int) -> int:
    """Raise the lowest (or lower the highest) of `counts_S` until `give` are given; what could not be is returned."""
    while give > 0:
        edge = counts_S.min() if step > 0 else counts_S.max()
        stop = bound if step > 0 else 0
        if edge == stop:
            return give
        at = 0
        for count in counts_S:
            if count == edge:
                at += 1
            elif step * (count - edge) > 0 and step * (stop - count) > 0:
                stop = count
        height = min(abs(stop - edge), give // at)
        some = at if height > 0 else give
        height = max(height, 1)
        for s in range(len(counts_S)):
            if counts_S[s] == edge and some > 0:
                counts_S[s] += step * height
                some -= 1
                give -= height
    return 0


@numba.njit(cache=True)
def _planned(counts_E: Array, slots: int, ranks: int) -> Array:
    """Rows of slots after replicas went to the hottest experts and slots, largest first, to the least loaded ranks."""
    experts, owner = len(counts_E), np.arange(slots)
    copies_E = np.ones(experts, dtype=np.int64)
    for s in range(experts, slots):
        owner[s] = np.argmax(counts_E / copies_E)
        copies_E[owner[s]] += 1
    rows = counts_E[owner] / copies_E[owner]
    here = slots // ranks
    placed_RS, load_R = np.zeros((ranks, here)), np.zeros(ranks)
    filled_R = np.zeros(ranks, dtype=np.int64)
    for s in np.argsort(-rows, kind="mergesort"):
        r = np.argmin(load_R)
        placed_RS[r, filled_R[r]] = rows[s]
        filled_R[r] += 1
        load_R[r] = load_R[r] + rows[s] if filled_R[r] < here else np.inf
    flat = placed_RS.ravel()
    whole = np.floor(flat).astype(np.int64)
    whole[np.argsort(whole - flat, kind="mergesort")[: counts_E.sum() - whole.sum()]] += 1
    return whole


@numba.njit(cache=True)
def _distinct(counts_RS: Array, timed: int, tokens: int) -> int:
    """Tokens with a pair on rank `timed` where experts, largest first, take tokens in turn, round and round."""
    here = counts_RS.shape[1]
    flat = counts_RS.ravel()
    change, start = np.zeros(tokens + 1, dtype=np.int64), 0
    for e in np.argsort(-flat, kind="mergesort"):
        count = flat[e]
        if count == 0:
            break
        if e // here == timed:
            end = start % tokens + count
            change[start % tokens] += 1
            change[min(end, tokens)] -= 1
            if end > tokens:
                change[0] += 1
                change[end - tokens] -= 1
        start += count
    distinct, covering = 0, 0
    for t in range(tokens):
        covering += change[t]
        distinct += covering > 0
    return distinct

"""Who serves a step when some experts are closed or each asks a price, and what opening or closing one changes.

One pass over the candidates of a step each. Scores and prices are whole numbers, in units of `UNIT` of gate mass, so
that sums are exact and the same on every backend and device, whatever the order in which they are added.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from array_api_compat import is_numpy_array, to_device
from numpy.typing import NDArray

from router.backends import Array, namespace

UNIT = 2.0**-24  # float32 scores under one lose little: their last bit is this or less


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Served:
    """What tokens use.

    `used_TC` bool, on the backend of the candidates. On the host `mass`, the scores of what is used, in units of
    `UNIT`, and `rows_XE` rows by source rank and expert.
    """

    used_TC: Array
    mass: float
    rows_XE: NDArray[np.int64]


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Openings:
    """What each of E experts means to tokens that use their best open ones; on the host, in units of `UNIT`.

    `regret_E`: the mass that is lost if an open expert closes alone. `gain_E`: what is won if a closed one opens alone,
    and `want_E` how many tokens would then use it. `lone_E`: it is the only open candidate of some token.
    """

    regret_E: NDArray[np.float64]
    gain_E: NDArray[np.float64]
    want_E: NDArray[np.int64]
    lone_E: NDArray[np.bool_]


def to_host(array: Array) -> NDArray[Any]:
    """The same array in numpy."""
    return np.asarray(to_device(array, "cpu"))


def in_units(scores_TC: Array) -> Array:
    """Scores as whole numbers of `UNIT`, float64."""
    xp = namespace(scores_TC)
    return xp.round(xp.astype(scores_TC, xp.float64) / UNIT)


def served(used_TC: Array, scores_TC: Array, ids_TC: Array, source_T: Array, *, sources: int, experts: int) -> Served:
    """What a mask makes of a step."""
    xp = namespace(scores_TC)
    key_TC = source_T[:, None] * experts + xp.astype(ids_TC, xp.int64)
    rows_N = xp.bincount(key_TC[used_TC], minlength=sources * experts)
    return Served(
        used_TC=used_TC,
        mass=float(xp.sum(xp.where(used_TC, scores_TC, xp.zeros_like(scores_TC)))),
        rows_XE=to_host(rows_N).reshape(sources, experts),
    )


def serve_open(
    scores_TC: Array, ids_TC: Array, limits_T: Array, source_T: Array, *, open_E: NDArray[np.bool_], sources: int
) -> tuple[Served, Openings]:
    """Each token uses its first `limits_T` open candidates; where none is open, its first one all the same.

    Scores are whole numbers of `UNIT`, descending along C.
    """
    experts = open_E.size
    if is_numpy_array(scores_TC):
        used_TC = np.zeros(ids_TC.shape, dtype=np.bool_)
        rows_XE = np.zeros((sources, experts), dtype=np.int64)
        regret_E, gain_E = np.zeros((2, experts))
        want_E, lone_E = np.zeros(experts, dtype=np.int64), np.zeros(experts, dtype=np.bool_)
        about_E = (regret_E, gain_E, want_E, lone_E)
        mass = _serve_open(scores_TC, ids_TC, limits_T, source_T, open_E, used_TC, rows_XE, *about_E)
        openings = Openings(regret_E=regret_E, gain_E=gain_E, want_E=want_E, lone_E=lone_E)
        return Served(used_TC=used_TC, mass=mass, rows_XE=rows_XE), openings
    xp = namespace(scores_TC)
    ids_TC = xp.astype(ids_TC, xp.int64)
    zero_TC = xp.zeros_like(scores_TC)
    open_TC = xp.asarray(open_E, device=scores_TC.device)[ids_TC]
    before_TC = xp.cumulative_sum(xp.astype(open_TC, xp.int64), axis=1) - xp.astype(open_TC, xp.int64)
    opens_T = xp.sum(xp.astype(open_TC, xp.int64), axis=1)
    found_TC = open_TC & (before_TC < limits_T[:, None])
    next_T = xp.sum(xp.where(open_TC & (before_TC == limits_T[:, None]), scores_TC, zero_TC), axis=1)
    last_T = xp.sum(xp.where(found_TC & (before_TC == limits_T[:, None] - 1), scores_TC, zero_TC), axis=1)
    wants_TC = ~open_TC & (scores_TC > last_T[:, None]) & (limits_T[:, None] > 0)
    stranded_T = (opens_T == 0) & (limits_T > 0)
    used_TC = xp.concat([found_TC[:, :1] | stranded_T[:, None], found_TC[:, 1:]], axis=1)

    def by_expert(chosen_TC: Array, values_TC: Array) -> NDArray[np.float64]:
        return to_host(xp.bincount(ids_TC[chosen_TC], weights=values_TC[chosen_TC], minlength=experts))

    def count(chosen_TC: Array) -> NDArray[np.int64]:
        return to_host(xp.bincount(ids_TC[chosen_TC], minlength=experts))

    return served(used_TC, scores_TC, ids_TC, source_T, sources=sources, experts=experts), Openings(
        regret_E=by_expert(found_TC, scores_TC - next_T[:, None]),
        gain_E=by_expert(wants_TC, scores_TC - last_T[:, None]),
        want_E=count(wants_TC),
        lone_E=count(found_TC & (opens_T == 1)[:, None]) > 0,
    )


def serve_priced(
    scores_TC: Array,
    ids_TC: Array,
    limits_T: Array,
    source_T: Array,
    *,
    open_E: NDArray[np.bool_],
    price_XE: NDArray[np.float64],
    may_skip: bool,
) -> Served:
    """Each token uses its `limits_T` open candidates of most worth: the score less what its source pays the expert.

    Scores and prices are whole numbers of `UNIT`. With `may_skip` a token uses only those worth more than nothing, and
    the best one in any case; where none is open, its first. Ties go to the earlier candidate. Takes time in C * C:
    give it no more candidates than tokens may want.
    """
    sources, experts = price_XE.shape
    cost_XE = np.where(open_E, price_XE, np.inf)
    if is_numpy_array(scores_TC):
        used_TC = np.zeros(ids_TC.shape, dtype=np.bool_)
        rows_XE = np.zeros(price_XE.shape, dtype=np.int64)
        mass = _serve_priced(scores_TC, ids_TC, limits_T, source_T, cost_XE, may_skip, used_TC, rows_XE)
        return Served(used_TC=used_TC, mass=mass, rows_XE=rows_XE)
    xp = namespace(scores_TC)
    ids_TC = xp.astype(ids_TC, xp.int64)
    key_TC = source_T[:, None] * experts + ids_TC
    worth_TC = scores_TC - xp.reshape(xp.asarray(cost_XE, device=scores_TC.device), (-1,))[key_TC]
    # Twice stable: the order of candidates, then the place of each in it.
    place_TC = xp.argsort(xp.argsort(worth_TC, axis=1, descending=True, stable=True), axis=1, stable=True)
    open_TC = worth_TC > -xp.inf
    used_TC = open_TC & (place_TC < limits_T[:, None])
    if may_skip:
        used_TC = used_TC & ((worth_TC > 0) | (place_TC == 0))
    stranded_T = ~xp.any(open_TC, axis=1) & (limits_T > 0)
    used_TC = xp.concat([used_TC[:, :1] | stranded_T[:, None], used_TC[:, 1:]], axis=1)
    return served(used_TC, scores_TC, ids_TC, source_T, sources=sources, experts=experts)


@numba.njit(cache=True)
def _serve_open(
    scores_TC: Any,
    ids_TC: Any,
    limits_T: Any,
    source_T: Any,
    open_E: Any,
    used_TC: Any,
    rows_XE: Any,
    regret_E: Any,
    gain_E: Any,
    want_E: Any,
    lone_E: Any,
) -> float:
    """A scan a token, as far as the first open candidate that it does not use."""
    tokens, count = ids_TC.shape
    column_of = np.empty(count, dtype=np.int64)
    mass = 0.0
    for token in range(tokens):
        limit = limits_T[token]
        if limit == 0:
            continue
        score_C, ids_C, used_C = scores_TC[token], ids_TC[token], used_TC[token]
        rows_E = rows_XE[np.uintp(source_T[token])]
        found, seen, opens = 0, 0, 0
        following = 0.0
        for column in range(count):
            seen = column + 1
            if open_E[np.uintp(ids_C[column])]:
                opens += 1
                if found == limit:
                    following = score_C[column]
                    break
                column_of[found] = column
                found += 1
        if found == 0:
            used_C[0] = True
            mass += score_C[0]
            rows_E[np.uintp(ids_C[0])] += 1
        for place in range(found):
            column = column_of[place]
            expert = np.uintp(ids_C[column])
            used_C[column] = True
            mass += score_C[column]
            rows_E[expert] += 1
            regret_E[expert] += score_C[column] - following
            if opens == 1:
                lone_E[expert] = True
        if seen == opens:
            continue
        last = score_C[column_of[found - 1]] if found == limit else 0.0
        for column in range(seen):
            expert = np.uintp(ids_C[column])
            if not open_E[expert] and score_C[column] > last:
                gain_E[expert] += score_C[column] - last
                want_E[expert] += 1
    return mass


@numba.njit(cache=True)
def _serve_priced(
    scores_TC: Any,
    ids_TC: Any,
    limits_T: Any,
    source_T: Any,
    cost_XE: Any,
    may_skip: bool,
    used_TC: Any,
    rows_XE: Any,
) -> float:
    """Each candidate's place is how many are better: C * C comparisons without a branch, a third of what sorting takes.

    Unsigned indices spare a check for negative ones.
    """
    tokens, count = ids_TC.shape
    order_C = np.empty(count)
    least = 0.0 if may_skip else -np.inf
    mass = 0.0
    for token in range(tokens):
        limit = limits_T[token]
        if limit == 0:
            continue
        source = np.uintp(source_T[token])
        cost_E, rows_E = cost_XE[source], rows_XE[source]
        score_C, ids_C, used_C = scores_TC[token], ids_TC[token], used_TC[token]
        for column in range(count):  # whole numbers: the earlier of equals comes first, and all stay above `least`
            order_C[column] = (score_C[column] - cost_E[np.uintp(ids_C[column])]) * count - column
        opens = 0
        for column in range(count):
            order, place = order_C[column], 0
            for other in range(count):
                place += 1 if order_C[other] > order else 0
            used = (place < limit) & ((order > least) | ((place == 0) & (order > -np.inf)))
            opens += used
            used_C[column] = used
            mass += score_C[column] * used
            rows_E[np.uintp(ids_C[column])] += used
        if opens == 0:
            used_C[0] = True
            mass += score_C[0]
            rows_E[np.uintp(ids_C[0])] += 1
    return mass

"""Packing: replicas to ranks in rounds of one a rank, and swaps that even out what the rounds leave.

Both are compiled and work on one box of `ranks` ranks, whose experts come by falling load. A box is a layer, or what
one node holds of it. Replicas share their expert's load evenly.
"""

from typing import Any

import numba
import numpy as np

from router.placement.bins import lpt_bins
from router.placement.replicate import water_fill

TOLERANCE = 3e-4  # of the best that could be: what is nearer is not worth another swap
_CLOSE = 1e-3  # of the best that could be: what is nearer is not worth other replicas
_SEARCHED_SLOTS = 2400  # slots that are packed anew in a search: 33 packings of a node of 72
_SWAPS_PER_SLOT = 4  # at most so many, which is far more than evening out takes


@numba.njit(cache=True)
def box_bound(load_E: Any, ranks: int, slots: int) -> float:
    """No placement in a box has a largest rank load below: the mean, or the largest replica of water-filling."""
    return max(float(load_E.sum()) / ranks, water_fill(load_E, slots, ranks, np.empty(load_E.size, dtype=np.int64)))


@numba.njit(cache=True)
def search_box(load_E: Any, bound: float, held_GP: Any, load_G: Any) -> float:
    """Water-filled replicas, packed and evened out: fills the experts that each rank holds, and the rank loads.

    Returns the largest rank load. Where that is not the `bound`, other numbers of replicas are tried: those that are
    as equal as can be need not pack well, where two large ones together are too much for a rank. So the two hottest
    experts get more or fewer, the nearest numbers first, and the others what water-filling gives them of the rest.
    """
    ranks, slots = held_GP.shape[0], held_GP.size
    replicas_E = np.empty(load_E.size, dtype=np.int64)
    water_fill(load_E, slots, ranks, replicas_E)
    least = pack_box(load_E, replicas_E, bound, held_GP, load_G)
    spare = slots - load_E.size
    tried_GP, tried_G = np.empty_like(held_GP), np.empty_like(load_G)
    if spare == 0 and least > bound * (1 + TOLERANCE):
        largest = _pack_by_lpt(load_E, bound, tried_GP, tried_G)
        if largest < least:
            least = largest
            _copy(tried_GP, tried_G, held_GP, load_G)
    if spare == 0 or load_E.size < 3:
        return least
    first, second = replicas_E[0], replicas_E[1]
    left = _SEARCHED_SLOTS // slots
    for away in range(1, 2 * ranks):
        for more in range(-away, away + 1):
            for turn in range(2 if abs(more) < away else 1):
                if least <= bound * (1 + _CLOSE) or left == 0:
                    return least
                one, two = first + more, second + (1 - 2 * turn) * (away - abs(more))
                if not (1 <= two <= one <= ranks and one + two - 2 <= spare):
                    continue
                left -= 1
                replicas_E[0], replicas_E[1] = one, two
                water_fill(load_E[2:], slots - one - two, ranks, replicas_E[2:])
                largest = pack_box(load_E, replicas_E, bound, tried_GP, tried_G)
                if largest < least:
                    least = largest
                    _copy(tried_GP, tried_G, held_GP, load_G)
    return least


@numba.njit(cache=True)
def _copy(from_GP: Any, from_G: Any, held_GP: Any, load_G: Any) -> None:
    """What `held_GP[:] = from_GP` is, which numba takes two seconds to compile each time."""
    for rank in range(from_G.size):
        load_G[rank] = from_G[rank]
        for place in range(from_GP.shape[1]):
            held_GP[rank, place] = from_GP[rank, place]


@numba.njit(cache=True)
def pack_box(load_E: Any, replicas_E: Any, bound: float, held_GP: Any, load_G: Any) -> float:
    """Pack and even out given numbers of replicas; `bound`: a largest rank load that is even enough."""
    level_E = load_E / replicas_E
    _deal(level_E, replicas_E, held_GP, load_G)
    separate(held_GP, level_E, load_G)
    even_out(level_E, replicas_E, bound, held_GP, load_G)
    return float(load_G.max())


@numba.njit(cache=True)
def _pack_by_lpt(load_E: Any, bound: float, held_GP: Any, load_G: Any) -> float:
    """Pack experts of one replica each by longest processing time, and even out.

    Without redundant slots a heavy rank wants the lightest experts, which rounds deal out evenly.
    """
    binned_GP = lpt_bins(load_E, load_G.size)
    for rank in range(load_G.size):
        load_G[rank] = 0.0
        for place in range(held_GP.shape[1]):
            held_GP[rank, place] = binned_GP[rank, place]
            load_G[rank] += load_E[binned_GP[rank, place]]
    even_out(load_E, np.ones(load_E.size, dtype=np.int64), bound, held_GP, load_G)
    return float(load_G.max())


@numba.njit(cache=True)
def _deal(level_E: Any, replicas_E: Any, held_GP: Any, load_G: Any) -> None:
    """Replicas by falling load in rounds of one a rank, the heaviest to the rank with the least so far.

    Ranks get equally many slots that way, and each round evens out the one before.
    """
    ranks, slots_per_rank = held_GP.shape
    items_S = _by_level(level_E, replicas_E, held_GP.size)
    order_G = np.arange(ranks)
    load_G[:] = 0.0
    held_GP[:] = -1
    for place in range(slots_per_rank):
        for j in range(1, ranks):  # by insertion: lightest first, ties as they were
            rank = order_G[j]
            i = j - 1
            while i >= 0 and load_G[order_G[i]] > load_G[rank]:
                order_G[i + 1] = order_G[i]
                i -= 1
            order_G[i + 1] = rank
        for j in range(ranks):
            expert = items_S[place * ranks + j]
            if replicas_E[expert] > 1:
                i = j
                while i < ranks and _holds(held_GP, order_G[i], expert):
                    i += 1
                if i < ranks:
                    order_G[i], order_G[j] = order_G[j], order_G[i]
            rank = order_G[j]
            held_GP[rank, place] = expert
            load_G[rank] += level_E[expert]


@numba.njit(cache=True)
def _by_level(level_E: Any, replicas_E: Any, slots: int) -> Any:
    """The expert of each replica, by falling load per replica. Experts with several are sorted in; they are few."""
    several_X = np.flatnonzero(replicas_E > 1)
    for j in range(1, several_X.size):
        expert = several_X[j]
        i = j - 1
        while i >= 0 and level_E[several_X[i]] < level_E[expert]:
            several_X[i + 1] = several_X[i]
            i -= 1
        several_X[i + 1] = expert
    items_S = np.empty(slots, dtype=np.int64)
    filled = several = 0
    for single in range(level_E.size + 1):
        if single < level_E.size and replicas_E[single] > 1:
            continue
        while several < several_X.size and (single == level_E.size or level_E[several_X[several]] >= level_E[single]):
            for _ in range(replicas_E[several_X[several]]):
                items_S[filled] = several_X[several]
                filled += 1
            several += 1
        if single < level_E.size:
            items_S[filled] = single
            filled += 1
    return items_S


@numba.njit(cache=True)
def even_out(level_E: Any, replicas_E: Any, bound: float, held_GP: Any, load_G: Any) -> None:
    """Swap replicas of the heaviest rank until it is within `TOLERANCE` of `bound`, or no swap makes it lighter.

    Of all swaps with one other rank that swap is made after which the heavier of the two is lightest.
    """
    ranks = load_G.size
    enough = bound * (1 + TOLERANCE)
    level_GP = np.empty(held_GP.shape)
    for rank in range(ranks):
        for place in range(held_GP.shape[1]):
            level_GP[rank, place] = level_E[held_GP[rank, place]]
    for _ in range(_SWAPS_PER_SLOT * held_GP.size):
        heavy = np.argmax(load_G)
        least = load_G[heavy]
        if least <= enough:
            return
        light = np.argmin(load_G)
        good = max(enough, (least + load_G[light]) / 2 + bound * TOLERANCE)
        swap = (-1, -1, -1)
        for turn in range(ranks):  # the lightest first: what it offers spares looking at most others
            other = light if turn == 0 else (turn - 1 if turn <= light else turn)
            if other == heavy or (load_G[heavy] + load_G[other]) / 2 >= least:
                continue
            least, swap = _best_swap(level_GP, replicas_E, held_GP, load_G, (heavy, other), (least, good), swap)
            if least <= good:
                break
        other, i, j = swap
        if other < 0:
            return
        given, taken = held_GP[heavy, i], held_GP[other, j]
        held_GP[heavy, i], held_GP[other, j] = taken, given
        level_GP[heavy, i], level_GP[other, j] = level_E[taken], level_E[given]
        load_G[heavy] += level_E[taken] - level_E[given]
        load_G[other] += level_E[given] - level_E[taken]


@numba.njit(cache=True)
def _best_swap(
    level_GP: Any, replicas_E: Any, held_GP: Any, load_G: Any, pair: Any, limits: Any, swap: Any
) -> tuple[float, Any]:
    """A swap of a heavy rank with another after which the heavier of them is lighter than the first of the `limits`.

    It is the best, or one that comes below the second limit.
    """
    heavy, other = pair
    least, good = limits
    level_P, others_P = level_GP[heavy], level_GP[other]
    heavy_load, other_load = load_G[heavy], load_G[other]
    for i in range(level_P.size):
        for j in range(others_P.size):
            less = level_P[i] - others_P[j]
            heavier = max(heavy_load - less, other_load + less)
            if heavier >= least:
                continue
            given, taken = held_GP[heavy, i], held_GP[other, j]
            if replicas_E[given] > 1 and _holds(held_GP, other, given):
                continue
            if replicas_E[taken] > 1 and _holds(held_GP, heavy, taken):
                continue
            least, swap = heavier, (other, i, j)
            if least <= good:
                return least, swap
    return least, swap


@numba.njit(cache=True)
def separate(held_GP: Any, level_E: Any, load_G: Any) -> None:
    """Swap replicas until no rank holds an expert twice that another rank does not hold at all.

    The last replicas to be dealt may have found room only beside their own kind. Each swap leaves fewer such pairs: the
    other rank has an expert that this one lacks, or it has one twice itself.
    """
    ranks, slots_per_rank = held_GP.shape
    for rank in range(ranks):
        for i in range(slots_per_rank):
            other = _rank_without(held_GP, rank, i)
            while other >= 0:  # what comes instead may be there twice as well
                at = _to_give(held_GP, other, rank)
                expert, given = held_GP[rank, i], held_GP[other, at]
                held_GP[rank, i], held_GP[other, at] = given, expert
                load_G[rank] += level_E[given] - level_E[expert]
                load_G[other] += level_E[expert] - level_E[given]
                other = _rank_without(held_GP, rank, i)


@numba.njit(cache=True)
def keep_apart(held_LGP: Any, experts: int) -> None:
    """`separate` in every layer, in place, whatever the loads."""
    for held_GP in held_LGP:
        separate(held_GP, np.zeros(experts), np.zeros(held_GP.shape[0]))


@numba.njit(cache=True)
def _rank_without(held_GP: Any, rank: int, at: int) -> int:
    """A rank without the expert that is at a place, if it is at an earlier place of its rank too; -1: none."""
    expert = held_GP[rank, at]
    for before in range(at):
        if held_GP[rank, before] == expert:
            for other in range(held_GP.shape[0]):
                if not _holds(held_GP, other, expert):
                    return other
            return -1
    return -1


@numba.njit(cache=True)
def _to_give(held_GP: Any, giver: int, taker: int) -> int:
    """A place of the giver whose expert the taker lacks; else one whose expert the giver has twice."""
    twice = -1
    for at in range(held_GP.shape[1]):
        if not _holds(held_GP, taker, held_GP[giver, at]):
            return at
        for before in range(at):
            if held_GP[giver, before] == held_GP[giver, at]:
                twice = at
    return twice


@numba.njit(cache=True)
def _holds(held_GP: Any, rank: int, expert: int) -> bool:
    for place in range(held_GP.shape[1]):  # noqa: SIM110  # numba compiles no generator expressions
        if held_GP[rank, place] == expert:
            return True
    return False

"""The local search of the affinity-aware placement: swaps of two replicas that spare tokens a node or a rank.

Letters of this file: S replicas (of all experts, one a slot), G ranks, N nodes, X groups of a level (ranks or nodes),
P the pairs of all tokens, by replica. One layer at a time.

What a swap changes is known without going through the tokens, from three tables a level. Replica a leaves its group:
the tokens for which it was `alone` there visit one group fewer. It comes to another: those to which that one is `fresh`
visit one more. A token that has both replicas visits as many as before, and was counted wrongly where one of them
was alone: `together` puts that right. Only a swap that is made goes through the tokens of its two replicas.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

_LEAST_GAIN = 1e-6  # below it two costs are equal: sums of rounded numbers
_SWAPS_OF_A_KICK = 4


class Level(NamedTuple):
    """How replicas lie in the groups of one level, and how tokens visit these.

    `visit_cost`: of one more visit of one token; `spread_cost`: of two replicas of an expert in a group, instead of in
    two (infinite: never). Tables: see above; `held_EX` replicas of each expert, `visits_TX` pairs of each token.
    """

    visit_cost: float
    spread_cost: float
    group_S: NDArray[np.int64]
    held_EX: NDArray[np.int32]
    visits_TX: NDArray[np.int32]
    alone_S: NDArray[np.int32]
    fresh_SX: NDArray[np.int32]
    together_SS: NDArray[np.int32]


class Layer(NamedTuple):
    """What does not change in a search.

    `replica_TK` of each token (-1: none); the tokens of replica s are `token_P[first_S[s]:first_S[s + 1]]`;
    `load_S` rows; `kept_SG` what a replica on a rank spares beside visits.
    """

    replica_TK: NDArray[np.int64]
    first_S: NDArray[np.int64]
    token_P: NDArray[np.int64]
    expert_S: NDArray[np.int64]
    load_S: NDArray[np.float64]
    kept_SG: NDArray[np.float64]


class Rows(NamedTuple):
    """The rows of each rank, and how uneven they may be.

    `most` that one rank may have; `room` [1] by how much the sum of their squares may still grow. While it restarts,
    the search may pass through what is too uneven, at `cost` a row beyond, but it does not end there.
    """

    load_G: NDArray[np.float64]
    most: float
    room: NDArray[np.float64]
    cost: float


def level_of(
    group_S: NDArray[np.int64],
    groups: int,
    replica_TK: NDArray[np.int64],
    expert_S: NDArray[np.int64],
    *,
    visit_cost: float,
    spread_cost: float,
) -> Level:
    """The tables of one level, counted."""
    replicas = group_S.size
    level = Level(
        visit_cost=visit_cost,
        spread_cost=spread_cost,
        group_S=group_S.copy(),
        held_EX=np.zeros((int(expert_S.max()) + 1, groups), dtype=np.int32),
        visits_TX=np.zeros((replica_TK.shape[0], groups), dtype=np.int32),
        alone_S=np.zeros(replicas, dtype=np.int32),
        fresh_SX=np.zeros((replicas, groups), dtype=np.int32),
        together_SS=np.zeros((replicas, replicas), dtype=np.int32),
    )
    np.add.at(level.held_EX, (expert_S, group_S), 1)
    token_P, column_P = np.nonzero(replica_TK >= 0)
    np.add.at(level.visits_TX, (token_P, group_S[replica_TK[token_P, column_P]]), 1)
    _count_all(level, replica_TK)
    return level


def tokens_by_replica(replica_TK: NDArray[np.int64], replicas: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`first_S` [S + 1] and `token_P`: the tokens of each replica, one replica after another."""
    token_P, column_P = np.nonzero(replica_TK >= 0)
    replica_P = replica_TK[token_P, column_P]
    first_S = np.concatenate([[0], np.cumsum(np.bincount(replica_P, minlength=replicas))])
    return first_S.astype(np.int64), token_P[np.argsort(replica_P, kind="stable")].astype(np.int64)


@numba.njit(cache=True)
def search(layer: Layer, ranks: Level, nodes: Level, rows: Rows, kicks: int, seed: int) -> Any:
    """The rank of each replica after a descent, and after `kicks` of random swaps and a descent each: [S].

    A kick that does not end better, or with rows too uneven, is taken back. Random numbers are drawn from `seed`.
    """
    levels = (ranks, nodes)
    np.random.seed(seed)
    swaps: Any = [(np.int64(0), np.int64(0)) for _ in range(0)]
    _descend(layer, levels, rows, np.inf, swaps)
    replicas = layer.expert_S.size
    for _ in range(kicks):
        swaps.clear()
        cost = 0.0
        for _ in range(_SWAPS_OF_A_KICK):
            one, other = np.random.randint(0, replicas), np.random.randint(0, replicas)
            change = _cost_of_swap(one, other, layer, levels, rows, rows.cost)
            if change < np.inf:
                _swap(one, other, layer, levels, rows)
                swaps.append((one, other))
                cost += change
        cost += _descend(layer, levels, rows, rows.cost, swaps)
        if cost > -_LEAST_GAIN or rows.load_G.max() > rows.most or rows.room[0] < 0:
            for step in range(len(swaps) - 1, -1, -1):
                _swap(swaps[step][0], swaps[step][1], layer, levels, rows)
    return ranks.group_S


@numba.njit(cache=True)
def _descend(layer: Any, levels: Any, rows: Any, row_cost: Any, swaps: Any) -> Any:
    """Swap each replica in turn with the one that spares most, until none spares any; what that changed in all."""
    total = 0.0
    improved = True
    while improved:
        improved = False
        for one in range(layer.expert_S.size):
            least = -_LEAST_GAIN
            best: Any = np.int64(-1)  # for a bare -1 `_swap` would be compiled once more
            for other in range(layer.expert_S.size):
                change = _cost_of_swap(one, other, layer, levels, rows, row_cost)
                if change < least:
                    least, best = change, other
            if best >= 0:
                _swap(one, best, layer, levels, rows)
                swaps.append((one, best))
                total += least
                improved = True
    return total


@numba.njit(cache=True)
def _cost_of_swap(one: Any, other: Any, layer: Any, levels: Any, rows: Any, row_cost: Any) -> Any:
    """What a swap of two replicas adds to the cost; infinite where it must not be."""
    here, there = levels[0].group_S[one], levels[0].group_S[other]
    mine, theirs = layer.expert_S[one], layer.expert_S[other]
    if here == there or mine == theirs:
        return np.inf
    change = 0.0
    beyond = _more_beyond(rows, here, there, layer.load_S[other] - layer.load_S[one])
    if beyond != 0:
        change += row_cost * beyond
    for level in levels:
        a, b = level.group_S[one], level.group_S[other]
        if a == b:
            continue
        held_EX, fresh_SX, alone_S, together_SS = level.held_EX, level.fresh_SX, level.alone_S, level.together_SS
        # Half of what the sum of squares of held_EX grows by: least where replicas are spread evenly.
        crowding = (held_EX[mine, b] - held_EX[mine, a] + 1) + (held_EX[theirs, a] - held_EX[theirs, b] + 1)
        if crowding > 0 or (crowding < 0 and level.spread_cost < np.inf):
            change += level.spread_cost * crowding
        more = fresh_SX[one, b] + fresh_SX[other, a] + together_SS[one, other] + together_SS[other, one]
        change += level.visit_cost * (more - alone_S[one] - alone_S[other])
    kept_SG = layer.kept_SG
    return change + kept_SG[one, here] + kept_SG[other, there] - kept_SG[one, there] - kept_SG[other, here]


@numba.njit(cache=True)
def _more_beyond(rows: Any, here: Any, there: Any, moved: Any) -> Any:
    """By how many rows ranks are more uneven than they may be if some move from there to here, less what they are."""
    load_here, load_there = rows.load_G[here], rows.load_G[there]
    before = max(load_here - rows.most, 0.0) + max(load_there - rows.most, 0.0)
    after = max(load_here + moved - rows.most, 0.0) + max(load_there - moved - rows.most, 0.0)
    room = rows.room[0]
    squares = max(_squares(moved, load_here, load_there) - room, 0.0) - max(-room, 0.0)
    return after - before + squares / rows.most


@numba.njit(cache=True)
def _squares(moved: Any, here: Any, there: Any) -> Any:
    """What the sum of squares of two ranks' rows grows by when rows move from there to here."""
    return 2 * moved * (here - there + moved)


@numba.njit(cache=True)
def _swap(one: Any, other: Any, layer: Any, levels: Any, rows: Any) -> None:
    """Make a swap, and bring all tables up to date."""
    here, there = levels[0].group_S[one], levels[0].group_S[other]
    more_here = layer.load_S[other] - layer.load_S[one]
    rows.room[0] -= _squares(more_here, rows.load_G[here], rows.load_G[there])
    rows.load_G[here] += more_here
    rows.load_G[there] -= more_here
    for level in levels:
        a, b = level.group_S[one], level.group_S[other]
        if a == b:
            continue
        _count_swapped(one, other, layer, level, a, b, -1)
        level.group_S[one], level.group_S[other] = b, a
        for replica, left, entered in ((one, a, b), (other, b, a)):
            level.held_EX[layer.expert_S[replica], left] -= 1
            level.held_EX[layer.expert_S[replica], entered] += 1
            for place in range(layer.first_S[replica], layer.first_S[replica + 1]):
                level.visits_TX[layer.token_P[place], left] -= 1
                level.visits_TX[layer.token_P[place], entered] += 1
        _count_swapped(one, other, layer, level, a, b, 1)


@numba.njit(cache=True)
def _count_swapped(one: Any, other: Any, layer: Any, level: Any, a: Any, b: Any, sign: int) -> None:
    """Add (or take away) what each token of either replica counts in two groups."""
    replica_TK, first_S, token_P = layer.replica_TK, layer.first_S, layer.token_P
    for place in range(first_S[one], first_S[one + 1]):
        _count_token(token_P[place], replica_TK, level, a, b, sign)
    for place in range(first_S[other], first_S[other + 1]):
        token = token_P[place]
        has_one = False
        for column in range(replica_TK.shape[1]):
            has_one |= replica_TK[token, column] == one
        if not has_one:  # else it has been counted above
            _count_token(token, replica_TK, level, a, b, sign)


@numba.njit(cache=True)
def _count_token(token: Any, replica_TK: Any, level: Any, a: Any, b: Any, sign: int) -> None:
    """Add (or take away) what one token counts in groups a and b."""
    group_S, visits_TX, alone_S, fresh_SX = level.group_S, level.visits_TX, level.alone_S, level.fresh_SX
    visits_a, visits_b = visits_TX[token, a], visits_TX[token, b]
    for column in range(replica_TK.shape[1]):
        replica = replica_TK[token, column]
        if replica < 0:
            continue
        group = group_S[replica]
        if (group == a and visits_a == 1) or (group == b and visits_b == 1):
            alone_S[replica] += sign
            for beside in range(replica_TK.shape[1]):
                if beside != column and replica_TK[token, beside] >= 0:
                    level.together_SS[replica, replica_TK[token, beside]] += sign
        if visits_a == 0:
            fresh_SX[replica, a] += sign
        if visits_b == 0 and b != a:
            fresh_SX[replica, b] += sign


@numba.njit(cache=True)
def _count_all(level: Any, replica_TK: Any) -> None:
    """Count every token in every group."""
    for token in range(replica_TK.shape[0]):
        for group in range(level.visits_TX.shape[1]):
            _count_token(token, replica_TK, level, group, group, 1)

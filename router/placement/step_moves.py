"""Step moves: swaps and other replicas in one layer, while they lower what earlier steps are penalised with. Compiled.

Of all moves the best few are told by the slopes of penalties and then tried for real. Axes: P the slots of a rank, X
kinds of replicas (see `_Layer`) or a move's own numbers, C candidates, A and R active experts and points of rows.
"""

from typing import Any, NamedTuple

import numba
import numpy as np

# Of an expert's deviation in single steps so much is taken for chance (measured on held-out windows: 0.5 is as good as
# or better than 0 and 0.8 on most).
_CHANCE = 0.5
_TRIED = 8  # candidates whose true gain is looked at
_MOVES_PER_SLOT = 2  # at most so many of each kind
_LEAST_GAIN = 1e-6  # of all penalties


class _Layer(NamedTuple):
    """A layer in search: what its ranks hold, and what its experts' replicas expect in each step.

    `held_GP` experts; `copies_GE` of each on each rank; `replicas_E`. `active_XEW` and `rows_XEW`: of one replica of an
    expert that has one replica fewer (X = 0), as many as now (1), one more (2). `active_GW`, `rows_GW`: of ranks.
    `cost_G`: penalties; `by_active_GW` and `by_row_GW`: what one more active expert and one more row would add to a
    rank's, `slope_XGE`: a replica of each kind.
    """

    held_GP: Any
    copies_GE: Any
    replicas_E: Any
    steps_EW: Any
    active_XEW: Any
    rows_XEW: Any
    active_GW: Any
    rows_GW: Any
    cost_G: Any
    by_active_GW: Any
    by_row_GW: Any
    slope_XGE: Any


@numba.njit(cache=True)
def search_layer(held_GP: Any, steps_EW: Any, penalty_AR: Any, points_a_row: float, weight_W: Any) -> None:
    """Change what ranks hold, `held_GP`, until no move is found that lowers the sum of all penalties.

    `steps_EW`: rows of each expert in each step; `penalty_AR`: by active experts 0, 1, 2, … and by rows, at
    `points_a_row` points a row from 0; `weight_W`: of steps.
    """
    table = (penalty_AR, points_a_row, weight_W)
    ranks, experts, steps = held_GP.shape[0], steps_EW.shape[0], steps_EW.shape[1]
    layer = _Layer(
        held_GP,
        np.zeros((ranks, experts), dtype=np.int64),
        np.zeros(experts, dtype=np.int64),
        steps_EW,
        np.zeros((3, experts, steps)),
        np.zeros((3, experts, steps)),
        np.zeros((ranks, steps)),
        np.zeros((ranks, steps)),
        np.zeros(ranks),
        np.zeros((ranks, steps)),
        np.zeros((ranks, steps)),
        np.zeros((3, ranks, experts)),
    )
    for rank in range(ranks):
        for expert in held_GP[rank]:
            layer.copies_GE[rank, expert] += 1
            layer.replicas_E[expert] += 1
    for expert in range(experts):
        _share(layer, expert)
    for rank in range(ranks):
        _add_up(layer, table, rank)
    if held_GP.size > experts:
        for _ in range(_MOVES_PER_SLOT * (held_GP.size - experts)):
            if not _reassign(layer, table):
                break
    _swap_all(layer, table)


@numba.njit(cache=True)
def _share(layer: _Layer, expert: int) -> None:
    """What one replica of the expert expects, with one fewer, as many and one more of them."""
    steps_W = layer.steps_EW[expert]
    for kind in range(3):
        replicas = max(layer.replicas_E[expert] + kind - 1, 1)
        mean_active, mean_rows = 0.0, 0.0
        for step in range(steps_W.size):
            idle = (1 - 1 / replicas) ** steps_W[step]  # of one replica: 0 ** rows, which is 1 without rows
            layer.active_XEW[kind, expert, step] = 1 - idle
            layer.rows_XEW[kind, expert, step] = steps_W[step] / replicas
            mean_active += (1 - idle) / steps_W.size
            mean_rows += steps_W[step] / replicas / steps_W.size
        for step in range(steps_W.size):
            layer.active_XEW[kind, expert, step] += _CHANCE * (mean_active - layer.active_XEW[kind, expert, step])
            layer.rows_XEW[kind, expert, step] += _CHANCE * (mean_rows - layer.rows_XEW[kind, expert, step])


@numba.njit(cache=True)
def _add_up(layer: _Layer, table: Any, rank: int) -> None:
    """A rank's load, penalty and slopes anew from what it holds."""
    active_W, rows_W = layer.active_GW[rank], layer.rows_GW[rank]
    active_W.fill(0.0)
    rows_W.fill(0.0)
    for expert in layer.held_GP[rank]:
        for step in range(active_W.size):
            active_W[step] += layer.active_XEW[1, expert, step]
            rows_W[step] += layer.rows_XEW[1, expert, step]
    layer.cost_G[rank] = _cost(table, active_W, rows_W)
    for step in range(active_W.size):
        by_active, by_row = _slopes(table, step, active_W[step], rows_W[step])
        layer.by_active_GW[rank, step], layer.by_row_GW[rank, step] = by_active, by_row
    by_active_W, by_row_W = layer.by_active_GW[rank], layer.by_row_GW[rank]
    every = (0, layer.replicas_E.size)
    for kind in range(3):
        _find_slopes(
            layer.active_XEW[kind], layer.rows_XEW[kind], by_active_W, by_row_W, every, layer.slope_XGE[kind, rank]
        )


@numba.njit(cache=True)
def _find_slopes(
    active_EW: Any, rows_EW: Any, by_active_W: Any, by_row_W: Any, span: tuple[int, int], slope_E: Any
) -> None:
    """What a replica of each expert of a span adds to a rank's penalty. Two sums, since each waits for itself."""
    for expert in range(span[0], span[1]):
        by_active, by_rows = 0.0, 0.0
        for step in range(by_active_W.size):
            by_active += active_EW[expert, step] * by_active_W[step]
            by_rows += rows_EW[expert, step] * by_row_W[step]
        slope_E[expert] = by_active + by_rows


@numba.njit(cache=True)
def _cost(table: Any, active_W: Any, rows_W: Any) -> float:
    """The penalty of a rank with these loads, over all steps."""
    penalty_AR, points_a_row, weight_W = table
    cost = 0.0
    for step in range(active_W.size):
        cost += weight_W[step] * _look_up(penalty_AR, points_a_row, active_W[step], rows_W[step])
    return cost


@numba.njit(cache=True)
def _look_up(penalty_AR: Any, points_a_row: float, active: float, rows: float) -> float:
    """Straight lines between whole active experts and points of rows, and beyond the last of each."""
    point = max(rows, 0.0) * points_a_row
    a = min(int(max(active, 0.0)), penalty_AR.shape[0] - 2)
    r = min(int(point), penalty_AR.shape[1] - 2)
    part, share = max(active, 0.0) - a, point - r
    fewer = (1 - share) * penalty_AR[a, r] + share * penalty_AR[a, r + 1]
    more = (1 - share) * penalty_AR[a + 1, r] + share * penalty_AR[a + 1, r + 1]
    return float((1 - part) * fewer + part * more)


@numba.njit(cache=True)
def _slopes(table: Any, step: int, active: float, rows: float) -> tuple[float, float]:
    """What one more active expert and one more row add to a step's penalty, over one expert and one point of rows."""
    penalty_AR, points_a_row, weight_W = table
    half = 0.5 / points_a_row
    by_active = _look_up(penalty_AR, points_a_row, active + 0.5, rows) - _look_up(
        penalty_AR, points_a_row, active - 0.5, rows
    )
    by_point = _look_up(penalty_AR, points_a_row, active, rows + half) - _look_up(
        penalty_AR, points_a_row, active, rows - half
    )
    return weight_W[step] * by_active, weight_W[step] * by_point * points_a_row


@numba.njit(cache=True)
def _with(layer: _Layer, table: Any, rank: int, lost: int, got: int) -> float:
    """A rank's penalty where it exchanges one replica for another."""
    penalty_AR, points_a_row, weight_W = table
    cost = 0.0
    for step in range(weight_W.size):
        active = layer.active_GW[rank, step] - layer.active_XEW[1, lost, step] + layer.active_XEW[1, got, step]
        rows = layer.rows_GW[rank, step] - layer.rows_XEW[1, lost, step] + layer.rows_XEW[1, got, step]
        cost += weight_W[step] * _look_up(penalty_AR, points_a_row, active, rows)
    return cost


@numba.njit(cache=True)
def _guess(cost: float, slope: float) -> float:
    """The change of a penalty whose exponent the same change shifts in every step, to second order."""
    return slope + slope * slope / (2 * cost)


@numba.njit(cache=True)
def _keep(gain_C: Any, move_CX: Any, gain: float, move: tuple[int, int, int]) -> None:
    """Put a candidate, better than the last of the best so far, in its place; of equal ones the first stays first."""
    place = gain_C.size - 1
    while place > 0 and gain > gain_C[place - 1]:
        gain_C[place] = gain_C[place - 1]
        for x in range(3):  # one by one: a copy of a slice takes numba seconds to compile
            move_CX[place, x] = move_CX[place - 1, x]
        place -= 1
    gain_C[place] = gain
    for x in range(3):
        move_CX[place, x] = move[x]


@numba.njit(cache=True)
def _swap_all(layer: _Layer, table: Any) -> None:
    """Swap slots of the rank with the largest penalty; one without a gain is passed over until it is swapped with."""
    ranks = layer.cost_G.size
    passed_G = np.zeros(ranks, dtype=np.bool_)
    for _ in range(_MOVES_PER_SLOT * layer.held_GP.size):
        rank: Any = np.int64(-1)  # for a bare -1 `_swap` would be compiled once more
        for other in range(ranks):
            if not passed_G[other] and (rank < 0 or layer.cost_G[other] > layer.cost_G[rank]):
                rank = other
        if rank < 0:
            return
        other = _swap(layer, table, rank)
        if other >= 0:
            passed_G[other] = False
        else:
            passed_G[rank] = True


@numba.njit(cache=True)
def _swap(layer: _Layer, table: Any, rank: int) -> int:
    """Make the best swap of one of the rank's slots; the other rank, -1 where none is a gain."""
    ranks, slots_per_rank = layer.held_GP.shape
    gain_C = np.full(_TRIED, -np.inf)
    move_CX = np.zeros((_TRIED, 3), dtype=np.int64)
    held_GP, copies_GE, cost_G, slope_GE = layer.held_GP, layer.copies_GE, layer.cost_G, layer.slope_XGE[1]
    for other in range(ranks):
        if other == rank:
            continue
        for place in range(slots_per_rank):
            given = held_GP[rank, place]
            if copies_GE[other, given]:
                continue
            for others_place in range(slots_per_rank):
                taken = held_GP[other, others_place]
                if copies_GE[rank, taken]:
                    continue
                gain = -_guess(cost_G[rank], slope_GE[rank, taken] - slope_GE[rank, given])
                gain -= _guess(cost_G[other], slope_GE[other, given] - slope_GE[other, taken])
                if gain > gain_C[-1]:
                    _keep(gain_C, move_CX, gain, (other, place, others_place))
    best, best_gain = -1, _LEAST_GAIN * layer.cost_G.sum()
    for c in range(_TRIED):
        if gain_C[c] == -np.inf:
            break
        other = move_CX[c, 0]
        given = layer.held_GP[rank, move_CX[c, 1]]
        taken = layer.held_GP[other, move_CX[c, 2]]
        gain = layer.cost_G[rank] - _with(layer, table, rank, given, taken)
        gain += layer.cost_G[other] - _with(layer, table, other, taken, given)
        if gain > best_gain:
            best, best_gain = c, gain
    if best < 0:
        return -1
    other, place, others_place = move_CX[best, 0], move_CX[best, 1], move_CX[best, 2]
    given, taken = layer.held_GP[rank, place], layer.held_GP[other, others_place]
    _put(layer, rank, place, taken)
    _put(layer, other, others_place, given)
    _add_up(layer, table, rank)
    _add_up(layer, table, other)
    return int(other)


@numba.njit(cache=True)
def _put(layer: _Layer, rank: int, place: int, expert: int) -> None:
    """Let a slot hold another expert; shares and loads are as before."""
    layer.copies_GE[rank, layer.held_GP[rank, place]] -= 1
    layer.copies_GE[rank, expert] += 1
    layer.held_GP[rank, place] = expert


@numba.njit(cache=True)
def _reassign(layer: _Layer, table: Any) -> bool:
    """Make the best change of a slot whose expert has other replicas to one more replica of another expert."""
    held_GP, copies_GE, cost_G, slope_XGE = layer.held_GP, layer.copies_GE, layer.cost_G, layer.slope_XGE
    ranks, experts = copies_GE.shape
    gain_C = np.full(_TRIED, -np.inf)
    move_CX = np.zeros((_TRIED, 3), dtype=np.int64)
    relief_E = np.zeros(experts)  # what one more replica takes off those that are there
    for expert in range(experts):
        for rank in range(ranks):
            if copies_GE[rank, expert]:
                less = slope_XGE[2, rank, expert] - slope_XGE[1, rank, expert]
                relief_E[expert] -= _guess(cost_G[rank], copies_GE[rank, expert] * less)
    for rank in range(ranks):
        for place in range(held_GP.shape[1]):
            lost = held_GP[rank, place]
            if layer.replicas_E[lost] < 2:
                continue
            burden = 0.0
            for other in range(ranks):
                if other != rank and copies_GE[other, lost]:
                    more = slope_XGE[0, other, lost] - slope_XGE[1, other, lost]
                    burden += _guess(cost_G[other], copies_GE[other, lost] * more)
            for got in range(experts):
                if not copies_GE[rank, got]:
                    here = _guess(cost_G[rank], slope_XGE[2, rank, got] - slope_XGE[1, rank, lost])
                    gain = relief_E[got] - burden - here
                    if gain > gain_C[-1]:
                        _keep(gain_C, move_CX, gain, (rank, place, got))
    best, best_gain = -1, _LEAST_GAIN * layer.cost_G.sum()
    for c in range(_TRIED):
        if gain_C[c] == -np.inf:
            break
        gain = _reassignment_gain(layer, table, move_CX[c, 0], move_CX[c, 1], move_CX[c, 2])
        if gain > best_gain:
            best, best_gain = c, gain
    if best < 0:
        return False
    rank, place, got = move_CX[best, 0], move_CX[best, 1], move_CX[best, 2]
    lost = layer.held_GP[rank, place]
    _put(layer, rank, place, got)
    layer.replicas_E[lost] -= 1
    layer.replicas_E[got] += 1
    _share(layer, lost)
    _share(layer, got)
    for other in range(ranks):
        if other == rank or layer.copies_GE[other, lost] or layer.copies_GE[other, got]:
            _add_up(layer, table, other)
        else:
            for kind in range(3):
                for expert in (lost, got):
                    _find_slopes(
                        layer.active_XEW[kind],
                        layer.rows_XEW[kind],
                        layer.by_active_GW[other],
                        layer.by_row_GW[other],
                        (expert, expert + 1),
                        layer.slope_XGE[kind, other],
                    )
    return True


@numba.njit(cache=True)
def _reassignment_gain(layer: _Layer, table: Any, rank: int, place: int, got: int) -> float:
    """By how much all penalties fall if a slot gets another expert; replicas elsewhere take more, or less, then."""
    penalty_AR, points_a_row, weight_W = table
    lost = layer.held_GP[rank, place]
    active_XEW, rows_XEW = layer.active_XEW, layer.rows_XEW
    gain = 0.0
    for other in range(layer.cost_G.size):
        lost_before, got_before = layer.copies_GE[other, lost], layer.copies_GE[other, got]
        here = 1 if other == rank else 0
        lost_after, got_after = lost_before - here, got_before + here
        if lost_before == 0 and got_after == 0:
            continue
        cost = 0.0
        for step in range(weight_W.size):
            active, rows = layer.active_GW[other, step], layer.rows_GW[other, step]
            active += lost_after * active_XEW[0, lost, step] - lost_before * active_XEW[1, lost, step]
            rows += lost_after * rows_XEW[0, lost, step] - lost_before * rows_XEW[1, lost, step]
            active += got_after * active_XEW[2, got, step] - got_before * active_XEW[1, got, step]
            rows += got_after * rows_XEW[2, got, step] - got_before * rows_XEW[1, got, step]
            cost += weight_W[step] * _look_up(penalty_AR, points_a_row, active, rows)
        gain += layer.cost_G[other] - cost
    return gain

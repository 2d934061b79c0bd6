"""Relief: move by move, load is taken off the fullest rank of each layer.

All that is compiled here calls nothing compiled elsewhere: numba would keep what it compiled before that changed.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

_LEAST_GAIN = 1e-9  # of a mean rank load: below it are rounding errors, and a search must end


class Layers(NamedTuple):
    """All layers while they are searched: each field without its first axis is one layer's.

    `share_LE` is the load of each replica of an expert, `count_LEG` its slots on each rank, `home_LEG` whether a slot
    there costs nothing because the rank held the expert before; `ranks_LEX` lists the ranks of an expert's replicas.
    """

    expert_LS: Any
    load_LE: Any
    replicas_LE: Any
    share_LE: Any
    load_LG: Any
    count_LEG: Any
    home_LEG: Any
    ranks_LEX: Any
    rank_S: Any


class _Layer(NamedTuple):
    """One layer of `Layers`."""

    expert_S: Any
    load_E: Any
    replicas_E: Any
    share_E: Any
    load_G: Any
    count_EG: Any
    home_EG: Any
    ranks_EX: Any
    rank_S: Any


class Path(NamedTuple):
    """The moves of each layer in order, X: two slots and their experts (the same twice: one), what then is.

    `filled_LX`: slots filled anew; `most_LX`: the largest rank load. Entry 0 is before the first move.
    """

    slot_LX2: Any
    expert_LX2: Any
    filled_LX: Any
    most_LX: Any
    length_L: Any

    @classmethod
    def begin(cls, most_L: NDArray[np.float64], *, longest: int) -> "Path":
        """Room for fewer than `longest` moves a layer."""
        layers = most_L.size
        most_LX = np.zeros((layers, longest))
        most_LX[:, 0] = most_L
        return cls(
            slot_LX2=np.zeros((layers, longest, 2), dtype=np.int64),
            expert_LX2=np.zeros((layers, longest, 2), dtype=np.int64),
            filled_LX=np.zeros((layers, longest), dtype=np.int64),
            most_LX=most_LX,
            length_L=np.ones(layers, dtype=np.int64),
        )


def start(expert_LS: NDArray[np.int64], load_LE: NDArray[np.float64], ranks: int) -> Layers:
    """The layers as they are placed now. Where experts are from now on costs nothing."""
    (layers, slots), experts = expert_LS.shape, load_LE.shape[1]
    rank_S = np.arange(slots) // (slots // ranks)
    count_LEG = np.zeros((layers, experts, ranks), dtype=np.int16)
    replicas_LE = np.zeros((layers, experts), dtype=np.int64)
    ranks_LEX = np.empty((layers, experts, slots - experts + 1), dtype=np.int32)
    _count(expert_LS, rank_S, count_LEG, replicas_LE, ranks_LEX)
    share_LE = load_LE / replicas_LE
    load_LS = np.take_along_axis(share_LE, expert_LS, axis=1)
    return Layers(
        expert_LS=expert_LS,
        load_LE=load_LE,
        replicas_LE=replicas_LE,
        share_LE=share_LE,
        load_LG=load_LS.reshape(layers, ranks, -1).sum(axis=2),
        count_LEG=count_LEG,
        home_LEG=count_LEG > 0,
        ranks_LEX=ranks_LEX,
        rank_S=rank_S,
    )


@numba.njit(cache=True)
def _count(expert_LS: Any, rank_S: Any, count_LEG: Any, replicas_LE: Any, ranks_LEX: Any) -> None:
    for layer in range(expert_LS.shape[0]):
        for slot in range(expert_LS.shape[1]):
            expert, rank = expert_LS[layer, slot], rank_S[slot]
            count_LEG[layer, expert, rank] += 1
            ranks_LEX[layer, expert, replicas_LE[layer, expert]] = rank
            replicas_LE[layer, expert] += 1


@numba.njit(cache=True)
def relieve(state: Any, path: Any, level_L: Any, budget: int) -> int:
    """Go on with each layer until none of its ranks is above its level, or nothing helps; the slots filled so far."""
    filled = 0
    for layer in range(level_L.size):
        of = _Layer(
            state.expert_LS[layer],
            state.load_LE[layer],
            state.replicas_LE[layer],
            state.share_LE[layer],
            state.load_LG[layer],
            state.count_LEG[layer],
            state.home_LEG[layer],
            state.ranks_LEX[layer],
            state.rank_S,
        )
        filled += _descend(of, path, layer, level_L[layer], budget)
    return filled


@numba.njit(cache=True)
def _descend(of: Any, path: Any, layer: int, level: float, budget: int) -> int:
    """Relieve fullest ranks until none is above `level` or nothing helps; the slots filled so far."""
    filled = int(path.filled_LX[layer, path.length_L[layer] - 1])
    while path.length_L[layer] < path.filled_LX.shape[1]:
        full = int(np.argmax(of.load_G))
        if of.load_G[full] <= level:
            break
        least = _LEAST_GAIN * level
        rate, cost, slot, expert = _best_gift(of, full, level, least, budget - filled)
        swap_rate, swap_cost, one, other = _best_swap(of, full, level, max(least, rate), budget - filled)
        if swap_rate > rate:
            filled += swap_cost
            _swap(of, one, other)
            _record(path, layer, (one, other), of, filled)
        elif rate > 0:
            filled += cost
            _give(of, slot, expert)
            _record(path, layer, (slot, slot), of, filled)
        else:
            break
    return filled


@numba.njit(cache=True)
def _record(path: Any, layer: int, slots: Any, of: Any, filled: int) -> None:
    entry = path.length_L[layer]
    for one in range(2):
        path.slot_LX2[layer, entry, one] = slots[one]
        path.expert_LX2[layer, entry, one] = of.expert_S[slots[one]]
    path.filled_LX[layer, entry] = filled
    path.most_LX[layer, entry] = of.load_G.max()
    path.length_L[layer] += 1


@numba.njit(cache=True)
def _best_gift(of: Any, full: int, level: float, least: float, budget: int) -> Any:
    """The best replica's slot to give to an expert of rank `full`: gain a slot filled, slots filled, slot, expert."""
    size = of.expert_S.size // of.load_G.size
    most = of.load_G[full]
    best = (0.0, 0, 0, 0)
    best_rate = least
    most_relief = 0.0
    for place in range(full * size, (full + 1) * size):
        taken = of.expert_S[place]
        less = of.share_E[taken] - of.load_E[taken] / (of.replicas_E[taken] + 1)
        most_relief = max(most_relief, _relief(of, taken, less, taken, 0.0, level))
    for slot in range(of.expert_S.size):
        given, rank = of.expert_S[slot], of.rank_S[slot]
        if of.replicas_E[given] < 2 or of.count_EG[given, full]:
            continue
        if max(of.load_G[rank] - level, 0.0) + most_relief <= best_rate:  # no gift of this slot gains more
            continue
        # What the expert's other replicas must take over.
        more = of.load_E[given] / (of.replicas_E[given] - 1) - of.share_E[given]
        gain_here = max(of.load_G[rank] - level, 0.0) - _burden(of, given, more, level, rank)
        if gain_here + most_relief <= best_rate:  # nor with that: but for ranks that hold both experts, which are few
            continue
        back = 0 if of.home_EG[given, rank] else 1
        for place in range(full * size, (full + 1) * size):
            taken = of.expert_S[place]
            share = of.load_E[taken] / (of.replicas_E[taken] + 1)
            after = of.load_G[rank] - of.share_E[given] + share
            less = of.share_E[taken] - share
            if after >= most or of.count_EG[taken, rank]:
                continue
            if of.replicas_E[taken] == 1:
                relief = most - max(most - less, level)
            else:
                relief = _relief(of, taken, less, given, more, level)
            gain = gain_here - max(after - level, 0.0) + relief
            if gain <= best_rate:
                continue
            cost = (0 if of.home_EG[taken, rank] else 1) - back
            rate = gain / max(cost, 1)
            if rate > best_rate and cost <= budget:
                best_rate = rate
                best = (rate, cost, slot, taken)
    return best


@numba.njit(cache=True)
def _burden(of: Any, expert: int, more: float, level: float, but: int) -> float:
    """Load above `level` that `more` a replica adds on all ranks `but` one."""
    burden = 0.0
    for replica in range(of.replicas_E[expert]):
        rank = of.ranks_EX[expert, replica]
        if rank == but:
            continue
        count = of.count_EG[expert, rank]  # replicas beside one another count as one change of their rank
        after = of.load_G[rank] + count * more
        burden += (max(after - level, 0.0) - max(of.load_G[rank] - level, 0.0)) / count
    return burden


@numba.njit(cache=True)
def _relief(of: Any, expert: int, less: float, given: int, more: float, level: float) -> float:
    """Load above `level` that `less` a replica takes off, where replicas of `given` have `more` meanwhile."""
    relief = 0.0
    for replica in range(of.replicas_E[expert]):
        rank = of.ranks_EX[expert, replica]
        count = of.count_EG[expert, rank]
        now = of.load_G[rank] + of.count_EG[given, rank] * more
        relief += (max(now - level, 0.0) - max(now - count * less - level, 0.0)) / count
    return relief


@numba.njit(cache=True)
def _best_swap(of: Any, full: int, level: float, least: float, budget: int) -> Any:
    """The best slot of rank `full` to swap with one of another: gain a slot filled, slots filled, the two slots."""
    size = of.expert_S.size // of.load_G.size
    most = of.load_G[full]
    best = (0.0, 0, 0, 0)
    best_rate = least
    for rank in range(of.load_G.size):
        room = level - of.load_G[rank]
        if room <= 0 or min(room, most - level) <= best_rate:  # no swap with it gains more than either
            continue
        for one in range(full * size, (full + 1) * size):
            leaving = of.expert_S[one]
            if of.count_EG[leaving, rank]:
                continue
            cost_one = (0 if of.home_EG[leaving, rank] else 1) - (0 if of.home_EG[leaving, full] else 1)
            for other in range(rank * size, (rank + 1) * size):
                coming = of.expert_S[other]
                less = of.share_E[leaving] - of.share_E[coming]
                gain = min(less, most - level) - max(less - room, 0.0)
                if gain <= best_rate or of.count_EG[coming, full]:
                    continue
                cost = cost_one + (0 if of.home_EG[coming, full] else 1) - (0 if of.home_EG[coming, rank] else 1)
                rate = gain / max(cost, 1)
                if rate > best_rate and cost <= budget:
                    best_rate = rate
                    best = (rate, cost, one, other)
    return best


@numba.njit(cache=True)
def _give(of: Any, slot: int, expert: int) -> None:
    """Put `expert` in the slot of another one that has several; the loads of both are shared anew."""
    rank, before = of.rank_S[slot], of.expert_S[slot]
    of.expert_S[slot] = expert
    _share(of, before, of.load_E[before] / (of.replicas_E[before] - 1))
    _take_off(of, before, rank)
    _share(of, expert, of.load_E[expert] / (of.replicas_E[expert] + 1))
    _put_on(of, expert, rank)


@numba.njit(cache=True)
def _swap(of: Any, one: int, other: int) -> None:
    """Let two slots of different ranks change experts."""
    one_expert, other_expert = of.expert_S[one], of.expert_S[other]
    one_rank, other_rank = of.rank_S[one], of.rank_S[other]
    of.expert_S[one], of.expert_S[other] = other_expert, one_expert
    _take_off(of, one_expert, one_rank)
    _take_off(of, other_expert, other_rank)
    _put_on(of, one_expert, other_rank)
    _put_on(of, other_expert, one_rank)


@numba.njit(cache=True)
def _share(of: Any, expert: int, share: float) -> None:
    """Give each replica of `expert` the load `share`."""
    for replica in range(of.replicas_E[expert]):
        of.load_G[of.ranks_EX[expert, replica]] += share - of.share_E[expert]
    of.share_E[expert] = share


@numba.njit(cache=True)
def _take_off(of: Any, expert: int, rank: int) -> None:
    """Take a replica off a rank, with its share."""
    last = of.replicas_E[expert] - 1
    for replica in range(last):
        if of.ranks_EX[expert, replica] == rank:
            of.ranks_EX[expert, replica] = of.ranks_EX[expert, last]
            break
    of.replicas_E[expert] = last
    of.count_EG[expert, rank] -= 1
    of.load_G[rank] -= of.share_E[expert]


@numba.njit(cache=True)
def _put_on(of: Any, expert: int, rank: int) -> None:
    """Put a replica on a rank, with its share."""
    of.ranks_EX[expert, of.replicas_E[expert]] = rank
    of.replicas_E[expert] += 1
    of.count_EG[expert, rank] += 1
    of.load_G[rank] += of.share_E[expert]

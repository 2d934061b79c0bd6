"""Balance: how evenly a placement spreads rows and active experts over ranks, and how evenly any could."""

import numpy as np
from numpy.typing import NDArray

from router.placement.base import Placement


def rank_loads_LG(placement: Placement, loads_LE: NDArray[np.integer | np.floating]) -> NDArray[np.float64]:
    """The load of each rank where replicas share their expert's evenly: [L, G]."""
    of_replica_LE = np.asarray(loads_LE, dtype=np.float64) / placement.replicas_LE
    load_LS = np.take_along_axis(of_replica_LE, placement.slot_to_expert_LS, axis=1)
    return np.asarray(load_LS.reshape(placement.layers, placement.ranks, -1).sum(axis=2))


def balancedness(rank_load_XG: NDArray[np.integer | np.floating]) -> float:
    """Mean over max rank load, averaged over all rows of [..., G]; a row without load is balanced.

    >>> balancedness(np.array([[1.0, 3.0], [2.0, 2.0], [0.0, 0.0]])) == (2 / 3 + 1 + 1) / 3
    True
    """
    most_X = rank_load_XG.max(axis=-1)
    return float(np.mean(np.divide(rank_load_XG.mean(axis=-1), most_X, out=np.ones(most_X.shape), where=most_X > 0)))


def balancedness_bound(loads_LE: NDArray[np.integer | np.floating], ranks: int, slots: int) -> float:
    """No placement is more balanced: the largest rank load is the mean at least, and the least largest replica's.

    Without redundant slots the rank of the heaviest expert holds S / G - 1 others too, the lightest at best.
    """
    mean_L = loads_LE.sum(axis=1) / ranks
    largest_L = least_largest_replica_L(loads_LE, ranks, slots)
    if slots == loads_LE.shape[1]:
        largest_L += np.sort(loads_LE, axis=1)[:, : slots // ranks - 1].sum(axis=1)
    most_L = np.maximum(mean_L, largest_L)
    return float(np.mean(np.divide(mean_L, most_L, out=np.ones(most_L.shape), where=most_L > 0)))


def least_largest_replica_L(loads_LE: NDArray[np.integer | np.floating], ranks: int, slots: int) -> NDArray[np.float64]:
    """The smallest that the largest load per replica can be in each layer: [L].

    It comes of giving slots one by one to the largest, but none beyond one a rank: each slot beyond one an expert
    removes the largest of all load / r with 1 <= r < ranks.
    """
    layers, experts = loads_LE.shape
    everywhere_L: NDArray[np.float64] = loads_LE.max(axis=1) / ranks
    levels_LX = (loads_LE[:, :, None] / np.arange(1, max(ranks, 2))).reshape(layers, -1)
    spare = slots - experts
    if spare >= levels_LX.shape[1] or ranks == 1:
        return everywhere_L
    left_L = -np.partition(-levels_LX, spare, axis=1)[:, spare]
    return np.asarray(np.maximum(left_L, everywhere_L))


def active_by_rank_WLG(placement: Placement, steps_WLE: NDArray[np.integer]) -> NDArray[np.int64]:
    """The experts with rows on each rank in each step, where replicas take an expert's rows in turn: [W, L, G].

    The first replica takes the first row: an expert with fewer rows than replicas leaves the last ones idle. One that a
    rank holds twice counts twice: both slots have weights to read.
    """
    ranks, slots_per_rank = placement.ranks, placement.slots_per_rank
    active_WLG = np.zeros((*steps_WLE.shape[:2], ranks), dtype=np.int64)
    for layer in range(placement.layers):
        slots_EX = placement.expert_slots_LEX[layer]
        held_EX = slots_EX >= 0
        turn_S = np.empty(placement.slots, dtype=np.int64)
        turn_S[slots_EX[held_EX]] = np.nonzero(held_EX)[1]
        active_WS = steps_WLE[:, layer, placement.slot_to_expert_LS[layer]] > turn_S
        active_WLG[:, layer] = active_WS.reshape(-1, ranks, slots_per_rank).sum(axis=2)
    return active_WLG


def fewest_active_on_busiest_WL(steps_WLE: NDArray[np.integer], ranks: int) -> NDArray[np.int64]:
    """The fewest active experts that the busiest rank can have, by step and layer: those of a step over the ranks."""
    return np.asarray(-(-(steps_WLE > 0).sum(axis=2) // ranks))


def active_bound(steps_WLE: NDArray[np.integer], ranks: int, slots: int) -> float:
    """No placement spreads active experts more evenly: mean over most, averaged over steps and layers.

    n active experts put ceil(n / G) on some rank. Replicas that take rows too raise the mean, by at most one for each
    redundant slot, and up to the same number on every rank.
    """
    active_WL = (steps_WLE > 0).sum(axis=2)
    most_WL = fewest_active_on_busiest_WL(steps_WLE, ranks)
    reach_WL = np.minimum(active_WL + slots - steps_WLE.shape[2], most_WL * ranks)
    return float(np.mean(np.where(most_WL > 0, reach_WL / ranks / np.maximum(most_WL, 1), 1.0)))


def moved_share(before: Placement, after: Placement) -> float:
    """Of all slots of `after`, those whose expert was nowhere on their rank before: what must be copied."""
    return float(moved_LS(before, after).mean())


def moved_LS(before: Placement, after: Placement) -> NDArray[np.bool_]:
    """The slots of `after` whose expert was not on their rank before: [L, S]. A second copy on a rank is none."""
    held_LGE = np.zeros((before.layers, before.ranks, before.experts), dtype=np.bool_)
    held_LGE[_indices_of(before)] = True
    return np.asarray(~held_LGE[_indices_of(after)])


def _indices_of(placement: Placement) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Layer, rank and expert of each slot: [L, 1], [1, S] and [L, S]."""
    rank_S = np.arange(placement.slots) // placement.slots_per_rank
    return np.arange(placement.layers)[:, None], rank_S[None], placement.slot_to_expert_LS

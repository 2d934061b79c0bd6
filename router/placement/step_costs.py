"""Step costs: what earlier steps would have cost under a placement, replicas chosen by chance or by a split.

Axes: P the slots of a rank.
"""

import numpy as np
from numpy.typing import NDArray

from router.placement.base import Placement
from router.rank_seconds import RankSeconds
from router.splits import split

Floats = NDArray[np.float64]


def expected_load_WLG(slots_LS: NDArray[np.int64], steps_WLE: NDArray[np.integer], ranks: int) -> tuple[Floats, Floats]:
    """Active experts and rows that each rank expects in each step: [W, L, G] each.

    Each of an expert's n rows goes to one of its r replicas by chance, so that a replica expects n / r rows and is
    active with probability 1 - (1 - 1/r)^n. Which replicas take the rows of a small step depends on their sources,
    of which a plan knows nothing.

    >>> active_WLG, rows_WLG = expected_load_WLG(np.array([[0, 1, 0, 2]]), np.array([[[2, 5, 0]]]), ranks=2)
    >>> active_WLG.tolist(), rows_WLG.tolist()  # expert 0 has two rows for two replicas: each is idle in a quarter
    ([[[1.75, 0.75]]], [[[6.0, 1.0]]])
    """
    steps, layers, experts = steps_WLE.shape
    replicas_LE = np.stack([np.bincount(expert_S, minlength=experts) for expert_S in slots_LS])
    idle_WLE = (1 - 1 / np.maximum(replicas_LE, 1)) ** steps_WLE
    rows_WLE = steps_WLE / np.maximum(replicas_LE, 1)
    active_WLG, rows_WLG = (
        np.take_along_axis(of_replica_WLE, slots_LS[None], axis=2).reshape(steps, layers, ranks, -1).sum(axis=3)
        for of_replica_WLE in (1 - idle_WLE, rows_WLE)
    )
    return active_WLG, rows_WLG


def split_load_WLG(
    slots_LS: NDArray[np.int64], steps_WLE: NDArray[np.integer], ranks: int, name: str
) -> tuple[Floats, Floats]:
    """Active experts and rows of each rank in each step where the split of that name deals out the rows: [W, L, G]."""
    placement = Placement(slot_to_expert_LS=slots_LS, experts=steps_WLE.shape[2], ranks=ranks)
    rows_WLS = np.zeros((*steps_WLE.shape[:2], placement.slots))
    for layer, slots_EX in enumerate(placement.expert_slots_LEX):
        held_EX = slots_EX >= 0
        for step, counts_E in enumerate(steps_WLE[:, layer].astype(np.int64)):
            rows_WLS[step, layer, slots_EX[held_EX]] = split(name, counts_E, placement, layer)[held_EX]
    rows_WLGP = rows_WLS.reshape(*rows_WLS.shape[:2], ranks, -1)
    return (rows_WLGP > 0).sum(axis=3).astype(np.float64), rows_WLGP.sum(axis=3)


def predicted_s_WL(
    slots_LS: NDArray[np.int64],
    steps_WLE: NDArray[np.integer],
    ranks: int,
    seconds: RankSeconds,
    split_name: str | None = None,
) -> Floats:
    """Seconds that each step waits in each layer for its slowest rank and for the exchange of the fullest: [W, L].

    Rows choose replicas by the split of that name; None: by chance.
    """
    if split_name is None:
        active_WLG, rows_WLG = expected_load_WLG(slots_LS, steps_WLE, ranks)
    else:
        active_WLG, rows_WLG = split_load_WLG(slots_LS, steps_WLE, ranks, split_name)
    return np.asarray(seconds.of(active_WLG, rows_WLG).max(axis=2) + seconds.row_s * rows_WLG.max(axis=2))

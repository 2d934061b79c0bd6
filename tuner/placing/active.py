"""Active experts: how evenly they could be spread over ranks at best."""

import numpy as np
from numpy.typing import NDArray


def fewest_on_busiest_WL(steps_WLE: NDArray[np.integer], ranks: int) -> NDArray[np.int64]:
    """The fewest active experts that the busiest rank can have, by step and layer: those of a step over the ranks."""
    return np.asarray(-(-(steps_WLE > 0).sum(axis=2) // ranks))


def active_bound(steps_WLE: NDArray[np.integer], ranks: int, slots: int) -> float:
    """No placement spreads active experts more evenly: mean over most, averaged over steps and layers.

    n active experts put ceil(n / G) on some rank. Replicas that take rows too raise the mean, by at most one for each
    redundant slot, and up to the same number on every rank.
    """
    active_WL = (steps_WLE > 0).sum(axis=2)
    most_WL = fewest_on_busiest_WL(steps_WLE, ranks)
    reach_WL = np.minimum(active_WL + slots - steps_WLE.shape[2], most_WL * ranks)
    return float(np.mean(np.where(most_WL > 0, reach_WL / ranks / np.maximum(most_WL, 1), 1.0)))

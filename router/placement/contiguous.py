"""Contiguous placement: expert i in slot i, what every engine does by default."""

import numpy as np
from numpy.typing import NDArray


def contiguous(loads_LE: NDArray[np.float64], ranks: int, slots: int, seed: int) -> NDArray[np.int64]:
    """Slots [L, S] filled with 0, 1, 2, …; redundant slots start again at expert 0. Loads and seed are not used."""
    layers, experts = loads_LE.shape
    return np.tile(np.arange(slots) % experts, (layers, 1))

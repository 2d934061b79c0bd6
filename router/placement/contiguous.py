"""Contiguous placement: expert i in slot i, what every engine does by default."""

import numpy as np
from numpy.typing import NDArray

from router.placement.problem import PlacementProblem


def contiguous(problem: PlacementProblem) -> NDArray[np.int64]:
    """Slots [L, S] filled with 0, 1, 2, …; redundant slots start again at expert 0."""
    return np.tile(np.arange(problem.slots) % problem.experts, (problem.layers, 1))

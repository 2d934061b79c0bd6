"""Random placement: the honest baseline, since recorded loads often fall with the expert's id."""

import numpy as np
from numpy.typing import NDArray

from router.placement.problem import PlacementProblem


def permuted(problem: PlacementProblem) -> NDArray[np.int64]:
    """Slots [L, S]: a random permutation of the experts a layer; redundant slots take further random experts."""
    rng = np.random.default_rng(problem.seed)
    order_LE = np.stack([rng.permutation(problem.experts) for _ in range(problem.layers)])
    return order_LE[:, np.arange(problem.slots) % problem.experts]

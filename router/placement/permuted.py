"""Random placement: the honest baseline, since recorded loads often fall with the expert's id."""

import numpy as np
from numpy.typing import NDArray


def permuted(loads_LE: NDArray[np.float64], ranks: int, slots: int, seed: int) -> NDArray[np.int64]:
    """Slots [L, S]: a random permutation of the experts a layer; redundant slots take further random experts."""
    layers, experts = loads_LE.shape
    rng = np.random.default_rng(seed)
    order_LE = np.stack([rng.permutation(experts) for _ in range(layers)])
    return order_LE[:, np.arange(slots) % experts]

"""Load shapes that placements are tried on, from a few hot experts to many that differ a little."""

import numpy as np
from numpy.typing import NDArray


def load_shapes(layers: int, experts: int) -> dict[str, NDArray[np.float64]]:
    """Loads [L, E] by name; each layer its own."""
    rng = np.random.default_rng(5)
    shapes = {
        f"zipf {exponent}": rng.permuted(np.tile(np.arange(1, experts + 1) ** -exponent, (layers, 1)), axis=1)
        for exponent in (0.8, 1.0, 1.2)
    }
    shapes["lognormal"] = rng.lognormal(0, 1, (layers, experts))
    shapes["pareto"] = rng.pareto(2, (layers, experts)) + 1
    return shapes

"""Load shapes that placements are tried on, from a few hot experts to many that differ a little."""

import numpy as np
from numpy.typing import NDArray


def load_shapes(layers: int, experts: int) -> dict[str, NDArray[np.float64]]:
    """Loads [L, E] by name, the same in every run: independent draws, or a permutation of Zipf's law a layer."""
    shapes = {
        "lognormal": np.random.default_rng(0).lognormal(0, 1, (layers, experts)),
        "pareto": 1 + np.random.default_rng(0).pareto(2, (layers, experts)),  # numpy's starts at 0; Pareto's own at 1
    }
    for exponent in (0.8, 1.0, 1.2):
        rng, popularity_E = np.random.default_rng(0), np.arange(1, experts + 1) ** -exponent
        shapes[f"zipf {exponent}"] = np.stack([rng.permutation(popularity_E) for _ in range(layers)])
    return shapes

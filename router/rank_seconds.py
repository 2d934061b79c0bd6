"""What a rank's experts of one layer take, by how many of them are active and by their rows."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class RankSeconds:
    """A table of a cost model's own times, with straight lines between its points and beyond them.

    `seconds_AR`: with `active_A` active experts (ascending, from 0) that have `rows_R` rows together (ascending, from
    0). `row_s`: what one more row a rank receives adds to the exchanges, out and back. Made by `sim.prices`.
    """

    active_A: NDArray[np.float64]
    rows_R: NDArray[np.float64]
    seconds_AR: NDArray[np.float64]
    row_s: float = 0.0

"""What a rank's experts of one layer take, by how many of them are active and by their rows."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from traces.errors import InputError

_Numbers = NDArray[np.integer | np.floating]


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class RankSeconds:
    """A table of a cost model's own times, with straight lines between its points and beyond them.

    `seconds_AR`: with `active_A` active experts (ascending, from 0) that have `rows_R` rows together (ascending, from
    0). `row_s`: what one more row a rank receives adds to the exchanges, out and back. Made by
    `sim.rank_seconds.rank_seconds_of`.

    Errors: `InputError` unless both axes have two points or more, begin at 0 and ascend, and no time is negative or
    not a number.
    """

    active_A: NDArray[np.float64]
    rows_R: NDArray[np.float64]
    seconds_AR: NDArray[np.float64]
    row_s: float = 0.0

    def __post_init__(self) -> None:
        for name, axis_X in (("active experts", self.active_A), ("rows", self.rows_R)):
            if axis_X.ndim != 1 or axis_X.size < 2 or axis_X[0] != 0 or not (np.diff(axis_X) > 0).all():
                raise InputError(
                    f"rank seconds: {name} are {axis_X.tolist()}; give two points or more, from 0, ascending"
                )
        if self.seconds_AR.shape != (self.active_A.size, self.rows_R.size):
            raise InputError(
                f"rank seconds: times of shape {self.seconds_AR.shape} for {self.active_A.size} counts of active "
                f"experts and {self.rows_R.size} of rows; give one time for each of both"
            )
        for what, value_X in (("times", self.seconds_AR), ("row_s", np.array([self.row_s]))):
            bad_X = value_X[~((value_X >= 0) & np.isfinite(value_X))]
            if bad_X.size:
                raise InputError(f"rank seconds: {what} hold {bad_X[0]:g}; give seconds of 0 or more")

    def of(self, active_X: _Numbers, rows_X: _Numbers) -> NDArray[np.float64]:
        """Seconds of ranks with `active_X` active experts and `rows_X` rows, which broadcast; exchanges left out.

        Expected numbers need not be whole. Beyond the last point the last straight line goes on.
        """
        below_X, part_X = _between(self.active_A, active_X)
        left_X, share_X = _between(self.rows_R, rows_X)
        fewer_X, more_X = (
            (1 - share_X) * self.seconds_AR[at_X, left_X] + share_X * self.seconds_AR[at_X, left_X + 1]
            for at_X in (below_X, below_X + 1)
        )
        return np.asarray((1 - part_X) * fewer_X + part_X * more_X)


def _between(points_P: NDArray[np.float64], value_X: _Numbers) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The point at or below each value, not the last one, and how far the value lies on the way to the next."""
    at_X = np.clip(np.searchsorted(points_P, value_X, side="right") - 1, 0, points_P.size - 2)
    return at_X, (value_X - points_P[at_X]) / (points_P[at_X + 1] - points_P[at_X])

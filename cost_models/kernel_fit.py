"""One fit: physics with fitted prices, and trees for what it leaves."""

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from cost_models.boosting import Boosting, Trees, grow
from cost_models.description import Description
from cost_models.physics import Physics, fit_physics
from traces.errors import InputError

_SLACK = 1e-3  # rounding of logarithms is no extrapolation
_DENSE = 8  # points a step of a curve


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A fitted kernel. `low_F` and `high_F`: the region that the residual has seen, feature by feature."""

    physics: Physics
    features: tuple[str, ...]
    sources: tuple[str, ...]
    low_F: NDArray[np.float64]
    high_F: NDArray[np.float64]
    trees: Trees

    def predict(self, description: Description) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Seconds of each operation, and how far it lies beyond the region that was seen (0: inside), each of shape X.

        Beyond is the sum over features of the distance to what was seen; the residual halves with every unit of it
        (a doubling, where axes are logarithmic), so that only physics is left far away.
        """
        located = self.locate(description)
        return self.seconds(located), located.beyond_X

    def locate(self, description: Description) -> "Located":
        """Where operations lie in the region that was seen: enough to choose between fits, for a part of the work."""
        unknown = [name for name in self.features if name not in description.features]
        if unknown or not description.stages.keys() <= self.physics.prices.keys():
            raise InputError("a kernel was fitted as another version of moeroute describes it; fit its profile again")
        features = [np.asarray(description.features[name]) for name in self.features]
        terms = [np.shape(term) for terms in description.stages.values() for term in terms.values()]
        shape = np.broadcast_shapes(*terms, *(feature.shape for feature in features))
        matrix_FN = feature_matrix(description, self.features, self.sources, shape)
        beyond_N = np.zeros(matrix_FN.shape[1])
        _add_distances(matrix_FN, self.low_F - _SLACK, self.high_F + _SLACK, beyond_N)
        return Located(description=description, matrix_FN=matrix_FN, beyond_X=beyond_N.reshape(shape))

    def seconds(self, located: "Located") -> NDArray[np.float64]:
        """Seconds of operations that were located, shape X."""
        beyond_X = located.beyond_X
        # All thresholds lie inside the region: beyond it the edge's leaf holds.
        residual_X = self.trees.predict(located.matrix_FN).reshape(beyond_X.shape)
        if beyond_X.any():
            residual_X = residual_X * 2.0**-beyond_X
        return np.asarray(self.physics.seconds(located.description) * np.exp(residual_X))


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """Operations in the region of a fit: their features [F, N], and how far beyond it they lie, of shape X."""

    description: Description
    matrix_FN: NDArray[np.float32]
    beyond_X: NDArray[np.float64]


@numba.njit(cache=True)
def _add_distances(
    matrix_FN: NDArray[np.float32],
    low_F: NDArray[np.float64],
    high_F: NDArray[np.float64],
    beyond_N: NDArray[np.float64],
) -> None:
    """Add to `beyond_N` how far each row lies outside the box from `low_F` to `high_F`."""
    for feature in range(matrix_FN.shape[0]):
        low, high = low_F[feature], high_F[feature]
        for row in range(matrix_FN.shape[1]):
            value = matrix_FN[feature, row]
            beyond_N[row] += max(low - value, 0.0) + max(value - high, 0.0)


def feature_matrix(
    description: Description, features: tuple[str, ...], sources: tuple[str, ...], shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """Features in order, then a flag for each source but the first, by operation of `shape`: [F, N]."""
    columns = [description.features[name] for name in features]
    given = np.asarray(description.source)
    columns += [given == source for source in sources[1:]]
    matrix_FX = np.empty((len(columns), *shape), dtype=np.float32)
    for index, column in enumerate(columns):
        matrix_FX[index] = column
    return matrix_FX.reshape(len(columns), -1)


def fit_kernel(
    description: Description, seconds_N: NDArray[np.float64], *, boosting: Boosting, threads: int = 1
) -> Fit:
    """Fit physics first, then trees to what it leaves."""
    physics = fit_physics(description, seconds_N)
    features = tuple(description.features)
    sources = tuple(np.unique(description.source).tolist())
    matrix_FN = feature_matrix(description, features, sources, seconds_N.shape)
    physical_N = np.broadcast_to(physics.seconds(description), seconds_N.shape)
    increasing = [name in description.increasing for name in features] + [False] * (len(sources) - 1)
    rows_NF, residual_N = matrix_FN.T, np.log(seconds_N / physical_N)
    if description.curve is not None:
        rows_NF, residual_N = _densified(rows_NF, residual_N, features.index(description.curve))
    trees = grow(rows_NF, residual_N, increasing=increasing, settings=boosting, threads=threads)
    return Fit(
        physics=physics,
        features=features,
        sources=sources,
        low_F=matrix_FN.min(axis=1).astype(np.float64),
        high_F=matrix_FN.max(axis=1).astype(np.float64),
        trees=trees,
    )


def _densified(
    rows_NF: NDArray[np.float32], target_N: NDArray[np.float64], curve: int
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The rows, and more between neighbours along the feature `curve` that are the same in all others.

    Targets between are interpolated, so that trees, which are steps, follow the curve instead of its few points.
    """
    others = np.round(np.delete(rows_NF, curve, axis=1), 4)
    group_N = np.unique(others, axis=0, return_inverse=True)[1].ravel()
    order = np.lexsort((rows_NF[:, curve], group_N))
    low, high = order[:-1], order[1:]
    same = group_N[low] == group_N[high]
    low, high = low[same], high[same]
    rows, targets = [rows_NF], [target_N]
    for share in np.arange(1, _DENSE) / _DENSE:
        rows.append(((1 - share) * rows_NF[low] + share * rows_NF[high]).astype(np.float32))
        targets.append((1 - share) * target_N[low] + share * target_N[high])
    return np.concatenate(rows), np.concatenate(targets)

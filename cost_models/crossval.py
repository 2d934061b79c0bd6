"""Held-out errors: every row is predicted by a fit that has not seen its fold."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models.boosting import Boosting
from cost_models.description import Description
from cost_models.kernel_fit import fit_kernel


def take(description: Description, rows: NDArray[np.bool_]) -> Description:
    """The operations of some rows."""
    size = len(rows)

    def some(array: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.broadcast_to(array, size)[rows])

    return Description(
        bound_s=some(description.bound_s),
        stages={stage: {n: some(t) for n, t in terms.items()} for stage, terms in description.stages.items()},
        features={name: some(values) for name, values in description.features.items()},
        increasing=description.increasing,
        curve=description.curve,
        source=np.broadcast_to(np.asarray(description.source), size)[rows],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Seconds that fits without a row's fold predict for it; NaN for rows that are never held out.

    `physics_N`: by the physical model alone.
    """

    predicted_N: NDArray[np.float64]
    physics_N: NDArray[np.float64]


def held_out_predictions(
    description: Description,
    seconds_N: NDArray[np.float64],
    fold_N: NDArray[np.int64],
    *,
    suspect_N: NDArray[np.bool_],
    boosting: Boosting,
    threads: int = 1,
) -> HeldOut:
    """Predict every row by a fit without its fold and without `suspect_N`."""
    predicted_N, physics_N = np.full((2, len(seconds_N)), np.nan)
    for fold in np.unique(fold_N[fold_N >= 0]):
        held = fold_N == fold
        train = ~held & ~suspect_N
        fit = fit_kernel(take(description, train), seconds_N[train], boosting=boosting, threads=threads)
        rows = take(description, held)
        predicted_N[held] = fit.predict(rows)[0]
        physics_N[held] = fit.physics.seconds(rows)
    return HeldOut(predicted_N=predicted_N, physics_N=physics_N)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Mean, median and 90th percentile of absolute relative errors, as fractions."""

    mape: float
    median_ape: float
    p90_ape: float


def scores(predicted_N: NDArray[np.float64], seconds_N: NDArray[np.float64]) -> Scores:
    """Score predictions against what was measured."""
    errors = np.abs(predicted_N / seconds_N - 1)
    return Scores(
        mape=float(errors.mean()), median_ape=float(np.median(errors)), p90_ape=float(np.quantile(errors, 0.9))
    )

"""Intervals: between which multiples of a prediction the measured times of held-out rows lie."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHARE = 0.9  # of held-out rows that an interval is to cover
_ROWS_A_BIN = 60
_MOST_BINS = 6
_FEWEST_FOLDS = 2  # to try one with the quantiles of others
_NARROWEST = 5e-3  # each side of a prediction: no timing repeats better
_MOST_POWER = 10.0  # wider by more than this is no interval any more

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Quantiles of measured / predicted among held-out rows, in bins of predicted seconds.

    `edges_s`: where one bin ends and the next begins, one fewer than there are bins in `low` and `high`.
    """

    edges_s: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def around(self, seconds_X: Floats, beyond_X: Floats) -> tuple[Floats, Floats]:
        """The interval's ends for predictions that lie `beyond_X` outside the measured region (0: inside).

        Outside nothing was held out, so the interval is a guess: it widens by its own (logarithmic) width a unit.
        """
        bin_X = np.searchsorted(np.asarray(self.edges_s), seconds_X)
        power_X = 1 + beyond_X
        return seconds_X * np.asarray(self.low)[bin_X] ** power_X, seconds_X * np.asarray(self.high)[bin_X] ** power_X

    def power_to_reach(self, predicted_N: Floats, seconds_N: Floats) -> Floats:
        """The power of its ends that an interval needs to reach what was measured: 1 on an end, 0 in the middle."""
        bin_N = np.searchsorted(np.asarray(self.edges_s), predicted_N)
        ratio_N = np.log(seconds_N / predicted_N)
        end_N = np.where(ratio_N < 0, np.log(self.low)[bin_N], np.log(self.high)[bin_N])
        return np.asarray(ratio_N / end_N)


def fit_spread(predicted_N: Floats, seconds_N: Floats, fold_N: NDArray[np.int64]) -> Spread:
    """Quantiles with the finite-sample correction of split conformal prediction (Lei et al., arXiv:1604.04173).

    Rows of one fold err alike, so that rows of others say too little about them. Every fold is therefore tried with the
    quantiles of the others, and widths are scaled until 90% of all rows lie inside.
    """
    whole = _quantiles(predicted_N, seconds_N)
    folds = np.unique(fold_N)
    if len(folds) < _FEWEST_FOLDS:
        return whole
    needed_N = np.empty(len(seconds_N))
    for fold in folds:
        held = fold_N == fold
        others = _quantiles(predicted_N[~held], seconds_N[~held])
        needed_N[held] = others.power_to_reach(predicted_N[held], seconds_N[held])
    power = min(float(np.quantile(needed_N, SHARE, method="higher")), _MOST_POWER)
    return Spread(
        edges_s=whole.edges_s,
        low=tuple(low**power for low in whole.low),
        high=tuple(high**power for high in whole.high),
    )


def _quantiles(predicted_N: Floats, seconds_N: Floats) -> Spread:
    bins = int(np.clip(len(predicted_N) // _ROWS_A_BIN, 1, _MOST_BINS))
    edges_s = np.unique(np.quantile(predicted_N, np.arange(1, bins) / bins))
    bin_N = np.searchsorted(edges_s, predicted_N)
    low, high = [], []
    for index in range(len(edges_s) + 1):
        ratio = np.sort(seconds_N[bin_N == index] / predicted_N[bin_N == index])
        rows = len(ratio)
        tail = int(np.floor((rows + 1) * (1 - SHARE) / 2))  # rows left outside at each end
        low.append(min(float(ratio[max(tail - 1, 0)]), 1 - _NARROWEST) if rows else 1 - _NARROWEST)
        high.append(max(float(ratio[min(rows - tail, rows - 1)]), 1 + _NARROWEST) if rows else 1 + _NARROWEST)
    return Spread(edges_s=tuple(edges_s.tolist()), low=tuple(low), high=tuple(high))


def coverage(predicted_N: Floats, seconds_N: Floats, fold_N: NDArray[np.int64]) -> float:
    """The share of rows inside intervals that were fitted on the other folds' rows (of one fold: on the other rows)."""
    if len(np.unique(fold_N)) == 1:
        fold_N = np.arange(len(fold_N))
        inner_N = np.zeros_like(fold_N)
    else:
        inner_N = fold_N
    inside_N = np.zeros(len(seconds_N), dtype=bool)
    for fold in np.unique(fold_N):
        held = fold_N == fold
        spread = fit_spread(predicted_N[~held], seconds_N[~held], inner_N[~held])
        low_N, high_N = spread.around(predicted_N[held], np.zeros(int(held.sum())))
        inside_N[held] = (low_N <= seconds_N[held]) & (seconds_N[held] <= high_N)
    return float(inside_N.mean())

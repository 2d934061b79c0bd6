"""Gain: the share of their time that steps save, with an interval over held-out windows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

_CONFIDENCE = 0.9  # as every interval of a cost model
_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """`mean`: the saved share, 0.1 for steps that take 0.9 of what they did; `interval`: its 90% interval.

    `windows`: how many there were; the interval is None where that is one.
    """

    mean: float
    interval: tuple[float, float] | None
    windows: int


def gain_of(
    before_s_XW: Sequence[NDArray[np.float64]], after_s_XW: Sequence[NDArray[np.float64]], *, seed: int = 0
) -> Gain:
    """The saving of the same steps before and after, in X windows of W steps each, W may differ.

    1. Steps are paired: each saves 1 - after / before, nothing where before is 0. A window saves the mean of its
       steps, all windows the mean of theirs.
    2. Windows are resampled with replacement, whole ones, since steps of one window are of the same requests.
    3. The interval's ends are percentiles of the resampled means, farther out for few windows, as a t interval is
       wider than a normal one: at Phi(-sqrt(n / (n - 1)) * t) (Hesterberg 2015, arXiv 1411.5279, expanded percentiles).
    """
    saved_X = np.array([_saved(before_W, after_W) for before_W, after_W in zip(before_s_XW, after_s_XW, strict=True)])
    windows = saved_X.size
    mean = float(saved_X.mean())
    if windows == 1:
        return Gain(mean=mean, interval=None, windows=1)
    drawn_RX = np.random.default_rng(seed).integers(windows, size=(_RESAMPLES, windows))
    mean_R = saved_X[drawn_RX].mean(axis=1)
    tail = (1 - _CONFIDENCE) / 2
    expanded = float(ndtr(np.sqrt(windows / (windows - 1)) * stdtrit(windows - 1, tail)))
    low, high = np.quantile(mean_R, [expanded, 1 - expanded])
    return Gain(mean=mean, interval=(float(low), float(high)), windows=windows)


def _saved(before_W: NDArray[np.float64], after_W: NDArray[np.float64]) -> float:
    """The share that the mean step saves."""
    return float(np.mean(1 - np.divide(after_W, before_W, out=np.ones(before_W.shape), where=before_W > 0)))

"""Synthetic loads that change from step to step."""

import numpy as np
import pytest

from traces.drift import drifting_loads
from traces.errors import InputError

EVEN = np.ones((2, 400))


def test_every_step_has_its_rows_and_the_same_seed_the_same_loads() -> None:
    loads_WLE = drifting_loads(EVEN, steps=5, rows=1000, sigma=0.1, burst_every=2, burst_steps=2, seed=3)
    assert loads_WLE.shape == (5, 2, 400)
    assert (loads_WLE.sum(axis=2) == 1000).all()
    again = drifting_loads(EVEN, steps=5, rows=1000, sigma=0.1, burst_every=2, burst_steps=2, seed=3)
    np.testing.assert_array_equal(loads_WLE, again)


def test_loads_walk_by_sigma_a_step() -> None:
    """After 9 steps of sigma = 0.1 the logarithms of 800 loads have spread by 0.1 · sqrt(9) = 0.3, about."""
    loads_WLE = drifting_loads(EVEN, steps=10, rows=10_000_000, sigma=0.1, seed=1)
    spread = np.log(loads_WLE[9] / loads_WLE[9].mean(axis=1, keepdims=True)).std()
    assert 0.27 < spread < 0.33
    assert np.log(loads_WLE[0] / loads_WLE[0].mean()).std() < 0.01  # the first step is as popularity says


def test_a_burst_lasts_as_long_as_it_should() -> None:
    """A burst begins at once and every other follows at once: half the experts, others each three steps, eightfold."""
    loads_WLE = drifting_loads(
        EVEN, steps=9, rows=10_000_000, burst_every=1, burst_steps=3, burst_share=0.5, burst_factor=8, seed=2
    )
    hot_WLE = loads_WLE > loads_WLE.mean(axis=2, keepdims=True)
    assert 0.4 < hot_WLE.mean() < 0.6
    assert loads_WLE[0][hot_WLE[0]].mean() / loads_WLE[0][~hot_WLE[0]].mean() == pytest.approx(8, rel=0.02)
    changed_W = (hot_WLE[1:] != hot_WLE[:-1]).any(axis=(1, 2))
    assert changed_W.tolist() == [False, False, True, False, False, True, False, False]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match=r"sigma is -0.1; it must be at least 0"):
        drifting_loads(EVEN, steps=1, rows=1, sigma=-0.1)
    with pytest.raises(InputError, match="a layer has no load"):
        drifting_loads(np.zeros((1, 4)), steps=1, rows=1)

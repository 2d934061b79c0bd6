"""Intervals from held-out rows."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cost_models.intervals import Spread, coverage, fit_spread

ONE_FOLD = np.zeros(1000, dtype=np.int64)


def test_twenty_rows_are_all_inside_by_hand() -> None:
    """(20 + 1) x 5% is one row and a bit: the interval starts at the smallest ratio and ends at the second largest."""
    measured_N = np.linspace(0.81, 1.19, 20)  # ratios .81, .83, … 1.17, 1.19
    spread = fit_spread(np.ones(20), measured_N, ONE_FOLD[:20])
    assert spread.edges_s == ()
    assert spread.low == (0.81,)
    np.testing.assert_allclose(spread.high, 1.19)


def test_each_size_has_its_own_interval() -> None:
    """Small times are 50% off, large ones 1%."""
    sign_N = np.where(np.arange(400) % 2 == 0, 1, -1)
    small_N, large_N = np.linspace(1, 2, 400), np.linspace(100, 200, 400)
    predicted_N = np.concatenate([small_N, large_N])
    measured_N = np.concatenate([small_N * (1 + 0.5 * sign_N), large_N * (1 + 0.01 * sign_N)])
    low, high = fit_spread(predicted_N, measured_N, ONE_FOLD[:800]).around(np.array([1.5, 150.0]), np.zeros(2))
    np.testing.assert_allclose(low, [0.75, 148.5])
    np.testing.assert_allclose(high, [2.25, 151.5])


def test_beyond_the_measured_region_an_interval_widens() -> None:
    spread = Spread(edges_s=(), low=(0.5,), high=(2.0,))
    low, high = spread.around(np.full(3, 1.0), np.array([0.0, 1.0, 2.0]))
    assert low.tolist() == [0.5, 0.25, 0.125]
    assert high.tolist() == [2.0, 4.0, 8.0]


def test_nine_in_ten_rows_of_a_fold_lie_in_intervals_of_the_others() -> None:
    generator = np.random.default_rng(0)
    predicted_N = generator.uniform(1e-5, 1e-2, 5000)
    measured_N = predicted_N * np.exp(generator.normal(0, 0.1, 5000))
    assert 0.88 < coverage(predicted_N, measured_N, generator.integers(0, 5, 5000)) < 0.92
    assert 0.88 < coverage(predicted_N, measured_N, np.zeros(5000, dtype=np.int64)) < 0.92


def test_a_fold_that_is_unlike_the_others_is_not_covered() -> None:
    fold_N = np.repeat([0, 1], 500)
    measured_N = np.where(fold_N == 0, 3.0, 1.0)
    assert coverage(np.ones(1000), measured_N, fold_N) < 0.6


def test_folds_that_err_each_in_their_own_way_widen_the_interval() -> None:
    """Twenty folds, each off by one factor of its own: rows of the others alone would promise too much."""
    generator = np.random.default_rng(1)
    fold_N = np.repeat(np.arange(20), 100)
    measured_N = np.exp(generator.normal(0, 0.1, 20))[fold_N] * np.exp(generator.normal(0, 0.01, 2000))
    assert 0.8 < coverage(np.ones(2000), measured_N, fold_N) <= 0.96
    wide, narrow = (fit_spread(np.ones(2000), measured_N, folds_N) for folds_N in (fold_N, np.zeros_like(fold_N)))
    assert wide.high[0] > narrow.high[0]


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.integers(0, 4)), min_size=1, max_size=300), st.integers(0, 2**32 - 1)
)
def test_an_interval_holds_its_prediction(rows: list[tuple[float, int]], seed: int) -> None:
    ratios, folds = zip(*rows, strict=True)
    predicted_N = np.random.default_rng(seed).uniform(1e-6, 1, len(ratios))
    low, high = fit_spread(predicted_N, predicted_N * ratios, np.array(folds)).around(
        predicted_N, np.zeros(len(ratios))
    )
    assert (low <= predicted_N).all()
    assert (predicted_N <= high).all()

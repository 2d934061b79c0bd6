"""The table of a rank's times: straight lines between its points, and what it refuses."""

from typing import Any

import numpy as np
import pytest

from router.rank_seconds import RankSeconds
from traces.errors import InputError

GIVEN: dict[str, Any] = {
    "active_A": np.array([0.0, 2.0]),
    "rows_R": np.array([0.0, 10.0, 30.0]),
    "seconds_AR": np.array([[0.0, 0.0, 0.0], [4.0, 5.0, 9.0]]),
}


def test_between_points_and_beyond_them_run_straight_lines() -> None:
    seconds = RankSeconds(**GIVEN)
    # 2 active: 5 rows are half-way from 4 to 5, 20 rows half-way from 5 to 9, 40 rows half of that slope further on.
    assert seconds.of(np.array([2, 2, 2]), np.array([5, 20, 40])).tolist() == [4.5, 7.0, 11.0]
    # 1 active is half-way from 0 to those, 3 active half of it beyond.
    assert seconds.of(np.array([1, 3]), np.array([20, 20])).tolist() == [3.5, 10.5]


def test_loads_broadcast() -> None:
    assert RankSeconds(**GIVEN).of(np.array([[0], [2]]), np.array([0, 10, 30])).tolist() == GIVEN["seconds_AR"].tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"active_A": np.array([1.0, 2.0])}, r"active experts are \[1.0, 2.0\]; give two points or more, from 0"),
        ({"rows_R": np.array([0.0, 30.0, 10.0])}, "rows are .*; give two points or more, from 0, ascending"),
        ({"seconds_AR": np.zeros((2, 2))}, r"times of shape \(2, 2\) for 2 counts of active experts and 3 of rows"),
        ({"seconds_AR": np.full((2, 3), -1.0)}, "times hold -1; give seconds of 0 or more"),
        ({"row_s": float("nan")}, "row_s hold nan; give seconds of 0 or more"),
    ],
)
def test_what_is_no_table_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RankSeconds(**{**GIVEN, **given})

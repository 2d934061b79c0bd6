import re
from typing import Any

import numpy as np
import pytest

from router.placement import place
from traces.errors import InputError

GOOD = {"ranks": 4, "slots": 8, "nodes": 2, "groups": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": 9}, "9 expert slots do not divide over 4 ranks; add 3 redundant slots"),
        ({"slots": 4}, "4 slots cannot hold 8 experts; give at least 8"),
        (
            {"slots": 36},
            (
                "36 slots are more than every expert on every rank takes; a second copy there relieves nothing: "
                "use at most 32"
            ),
        ),
        ({"nodes": 3}, "4 ranks do not divide over 3 nodes; use a divisor of the ranks"),
        ({"groups": 3}, "8 experts do not divide into 3 groups; use a divisor of the experts"),
        ({"away_share": 1.5}, "away_share is 1.5; it must be 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_mend(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        place("balanced", np.ones((2, 8)), **{**GOOD, **change})


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (np.nan, "loads: layer 1, expert 3 has nan, which is not a finite number; give counts of 0 or more"),
        (np.inf, "loads: layer 1, expert 3 has inf, which is not a finite number; give counts of 0 or more"),
        (-2.0, "loads: layer 1, expert 3 has -2, which is negative; give counts of 0 or more"),
    ],
)
def test_a_load_that_is_none_is_named(load: float, message: str) -> None:
    loads_LE = np.ones((2, 8))
    loads_LE[1, 3] = load
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        place("balanced", loads_LE, **GOOD)

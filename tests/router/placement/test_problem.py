import re
from typing import Any

import numpy as np
import pytest

from router.placement import PLACEMENTS, place
from router.placement.base import slots_in
from router.rank_seconds import RankSeconds
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


@pytest.mark.parametrize(
    ("traffic", "message"),
    [
        ({"steps_WLE": np.ones((3, 2, 7), dtype=int)}, "steps of shape (3, 2, 7) for loads of 2 layers of 8 experts; "),
        ({"steps_WLE": np.ones((0, 2, 8), dtype=int)}, "steps of shape (0, 2, 8) for loads of 2 layers of 8 experts; "),
        (
            {"steps_WLE": -np.ones((3, 2, 8), dtype=int)},
            "give one step or more, with 0 or more rows a layer and expert",
        ),
        ({"ids_TLK": np.ones((3, 1, 2), dtype=int)}, "ids of shape (3, 1, 2) for loads of 2 layers; "),
        ({"ids_TLK": np.ones((0, 2, 2), dtype=int)}, "give one token or more, with one expert or more a layer"),
        ({"ids_TLK": np.ones((3, 2, 0), dtype=int)}, "ids of shape (3, 2, 0) for loads of 2 layers; "),
    ],
)
def test_traffic_must_be_of_these_layers_and_experts(traffic: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        place("balanced", np.ones((2, 8)), **GOOD, **traffic)


def test_a_layer_whose_sum_is_no_float_is_named() -> None:
    with pytest.raises(InputError, match="loads: layer 0 sums up to more than a float holds; scale the loads down"):
        place("balanced", np.full((2, 8), 1e308), **GOOD)


@pytest.mark.parametrize("algorithm", sorted(PLACEMENTS))
@pytest.mark.parametrize("scale", [1e300, 1e-300])
def test_the_unit_of_loads_says_nothing(algorithm: str, scale: float) -> None:
    rng, ends = np.random.default_rng(0), np.array([0.0, 1.0])
    loads_LE = rng.integers(1, 50, (2, 8)).astype(float)
    traffic = {
        "steps_WLE": rng.integers(0, 9, (3, 2, 8)),
        "ids_TLK": rng.random((12, 2, 8)).argsort(axis=2)[:, :, :2],
        "seconds": RankSeconds(active_A=ends, rows_R=ends, seconds_AR=ends[:, None] + 0.1 * ends),
    }
    one, other = (place(algorithm, loads, **GOOD, **traffic) for loads in (loads_LE, scale * loads_LE))
    assert one.slot_to_expert_LS.tolist() == other.slot_to_expert_LS.tolist()


@pytest.mark.parametrize("algorithm", ["balanced", "eplb", "hierarchical", "lpt", "soft_hierarchical"])
def test_loads_may_lie_in_any_order(algorithm: str) -> None:
    loads_LE = np.random.default_rng(0).random((2, 8))
    one, other = (place(algorithm, loads, **GOOD) for loads in (loads_LE, np.asfortranarray(loads_LE)))
    assert one.slot_to_expert_LS.tolist() == other.slot_to_expert_LS.tolist()


@pytest.mark.parametrize(("share", "slots"), [(0.0, 0), (0.07, 7), (0.29, 29), (0.999, 99), (1.0, 100)])
def test_shares_of_slots_are_whole_slots(share: float, slots: int) -> None:
    assert slots_in(share, 100) == slots

import numpy as np
import pytest

from router.balance import balancedness, balancedness_bound, rank_loads_LG
from router.placement import place
from router.placement.balanced import by_falling_load_LE
from router.placement.replicate import replicate
from tests.router.placement.shapes import load_shapes

SHAPES = load_shapes(8, 256)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_redundant_slots_make_every_shape_even(shape: str) -> None:
    placement = place("balanced", SHAPES[shape], ranks=32, slots=288)
    assert balancedness(rank_loads_LG(placement, SHAPES[shape])) >= 0.9995


@pytest.mark.parametrize("shape", list(SHAPES))
def test_without_redundancy_it_is_no_worse_than_lpt_in_any_layer(shape: str) -> None:
    balanced, lpt = (
        rank_loads_LG(place(algorithm, SHAPES[shape], ranks=32, slots=256), SHAPES[shape]).max(axis=1)
        for algorithm in ("balanced", "lpt")
    )
    assert (balanced <= lpt * (1 + 1e-9)).all()


def test_the_eight_ranks_of_two_slots() -> None:
    """LPT and EPLB leave 232: of five replicas of 120, five of 112 and two experts of 120, four ranks have two.

    With other numbers of replicas no rank has two: 560 in three of 186.67 beside a 10 each, 600 in five of 120 beside
    the halves of the two 120 and the 20. So 196.67 can be had.
    """
    loads = np.array([[600, 560, 120, 120, 20, 10, 10, 10]], dtype=float)
    placement = place("balanced", loads, ranks=8, slots=16)
    assert rank_loads_LG(placement, loads).max() <= 205


def test_two_ranks_by_hand() -> None:
    # 6 + 1 and 4 + 3 are even; rounds give 6, 4 and then the lighter rank, which has 4, the 3.
    placement = place("balanced", np.array([[1.0, 6, 3, 4]]), ranks=2, slots=4)
    assert sorted(sorted(held) for held in placement.slot_to_expert_LS.reshape(2, 2).tolist()) == [[0, 1], [2, 3]]


def test_swaps_even_out_what_rounds_leave() -> None:
    # Rounds: 9 | 8, then 5 | 7, then 4 | 3: 18 on both. With 6 for 7: 9 | 8, 5 | 6, 4 | 3 give 18 | 17, the best of 35.
    even, odd = (
        rank_loads_LG(place("balanced", loads, ranks=2, slots=6), loads).max()
        for loads in (np.array([[9.0, 8, 7, 5, 4, 3]]), np.array([[9.0, 8, 6, 5, 4, 3]]))
    )
    assert (even, odd) == (18, 18)


def test_a_layer_without_load_is_placed_as_an_even_one() -> None:
    placement = place("balanced", np.array([[0.0] * 4, [3.0, 1, 1, 1]]), ranks=2, slots=6)
    assert rank_loads_LG(placement, np.ones((2, 4)))[0].tolist() == [2, 2]


def test_experts_come_by_falling_load_and_ties_by_number() -> None:
    assert by_falling_load_LE(np.array([[0.0, 2, 7, 2, 0]])).tolist() == [[2, 1, 3, 0, 4]]


def test_the_bound_by_hand() -> None:
    """8 + 1 + 1 + 2 = 12 on two ranks: 6 each. A redundant slot halves the 8; without one it has a 1 beside it."""
    loads = np.array([[8.0, 1, 1, 2]])
    assert balancedness_bound(loads, 2, 6) == 1
    assert balancedness_bound(loads, 2, 4) == 6 / 9


def test_water_filling_levels_the_largest_replica() -> None:
    assert replicate(np.array([1.0, 10, 4]), 6, ranks=3).tolist() == [1, 3, 2]

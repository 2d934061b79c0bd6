"""Moves under a budget: by hand, and what they always keep."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.balance import balancedness, moved_LS, rank_loads_LG
from router.moves import improve
from router.placement import place
from router.placement.base import Placement, slots_in
from router.relief import Path, relieve, start
from tests.router.placement.shapes import load_shapes
from traces.errors import InputError


def placed(slots_LS: Any, ranks: int) -> Placement:
    slots = np.array(slots_LS)
    return Placement(slot_to_expert_LS=slots, experts=int(slots.max()) + 1, ranks=ranks)


def test_two_slots_swap() -> None:
    """Ranks have 4 + 3 = 7 and 2 + 1 = 3; experts 0 and 2 differ by 2, so that their swap leaves 5 and 5."""
    current, loads = placed([[0, 1, 2, 3]], ranks=2), np.array([[4.0, 3, 2, 1]])
    after = improve(current, loads, fills=2)
    assert after.slot_to_expert_LS.tolist() == [[2, 1, 0, 3]]
    assert rank_loads_LG(after, loads).tolist() == [[5, 5]]
    # A swap fills two slots, and there is no replica whose slot could be given away.
    assert improve(current, loads, fills=1).slot_to_expert_LS.tolist() == [[0, 1, 2, 3]]


def test_a_replica_gives_its_slot_to_an_expert_of_the_fullest_rank() -> None:
    """Loads 2, 9, 2, 1 and experts 0 and 2 twice: ranks have 1 + 9 = 10, 1 + 1 = 2 and 1 + 1 = 2.

    Expert 2 gives up slot 2, on rank 1, to expert 1: ranks have 1 + 4.5, 4.5 + 1 and 1 + 2. That is 4.5 less on the
    fullest rank for one slot. (Slot 5 would do as well: the lower one. Expert 0 is on the fullest rank itself.)
    """
    current, loads = placed([[0, 1, 2, 0, 3, 2]], ranks=3), np.array([[2.0, 9, 2, 1]])
    after = improve(current, loads, fills=1)
    assert after.slot_to_expert_LS.tolist() == [[0, 1, 1, 0, 3, 2]]
    assert rank_loads_LG(after, loads).tolist() == [[5.5, 5.5, 3]]


def test_the_budget_goes_to_the_layer_where_it_helps_most() -> None:
    """One swap for two layers: from 7 of 10 to 5 of 10 on the fullest rank, or from 6 to 5."""
    current = placed([[0, 1, 2, 3], [0, 1, 2, 3]], ranks=2)
    for one, other in ((0, 1), (1, 0)):
        loads = np.empty((2, 4))
        loads[one], loads[other] = [4, 3, 2, 1], [3, 3, 2, 2]
        moved_L = moved_LS(current, improve(current, loads, fills=3)).sum(axis=1)
        assert moved_L[one] == 2
        assert moved_L[other] == 0


def test_a_balanced_layer_stays() -> None:
    current = placed([[0, 1, 2, 3]], ranks=2)
    for loads in (np.ones((1, 4)), np.zeros((1, 4))):
        assert improve(current, loads, fills=4).slot_to_expert_LS.tolist() == [[0, 1, 2, 3]]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Placement, Any, int]:
    """A placement, loads that it was not planned for, and a budget."""
    ranks, experts, layers = draw(st.integers(1, 5)), draw(st.integers(1, 12)), draw(st.integers(1, 3))
    size = min(-(-experts // ranks) + draw(st.integers(0, 3)), experts)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    planned_LE, loads_LE = rng.integers(0, 20, size=(2, layers, experts)).astype(float)
    algorithm = draw(st.sampled_from(["contiguous", "random", "lpt"]))
    current = place(algorithm, planned_LE, ranks=ranks, slots=ranks * size)
    return current, loads_LE, draw(st.integers(0, 20))


def second_copies(placement: Placement) -> int:
    """Slots whose expert another slot of their rank holds too."""
    held_LGS = np.sort(placement.slot_to_expert_LS.reshape(placement.layers, placement.ranks, -1), axis=2)
    return int((np.diff(held_LGS, axis=2) == 0).sum())


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_the_budget_is_kept_and_no_layer_gets_worse(case: tuple[Placement, Any, int]) -> None:
    current, loads_LE, fills = case
    after = improve(current, loads_LE, fills=fills)  # a Placement has a slot for every expert
    assert moved_LS(current, after).sum() <= fills
    before_L, after_L = (rank_loads_LG(placement, loads_LE).max(axis=1) for placement in (current, after))
    assert (after_L <= before_L * (1 + 1e-12)).all()
    assert second_copies(after) <= second_copies(current)
    again = improve(current, loads_LE, fills=fills)
    np.testing.assert_array_equal(after.slot_to_expert_LS, again.slot_to_expert_LS)


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_the_slots_that_a_search_counts_are_those_that_have_moved_in_the_end(case: tuple[Placement, Any, int]) -> None:
    """Whatever way it took: an expert that comes back to its first rank costs nothing, and gives back what it cost."""
    current, loads_LE, _ = case
    state = start(current.slot_to_expert_LS.copy(), loads_LE, current.ranks)
    path = Path.begin(state.load_LG.max(axis=1), longest=2 * current.slots)
    filled = relieve(state, path, loads_LE.sum(axis=1) / current.ranks * 1.01, 10**6)
    after = Placement(slot_to_expert_LS=state.expert_LS, experts=current.experts, ranks=current.ranks)
    assert filled == moved_LS(current, after).sum()


SHAPES = load_shapes(12, 256)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_few_moves_win_back_what_drift_has_cost(shape: str) -> None:
    """Loads drifted by sigma = 0.3: 5% of slots bring .74-.82 to .94 and more, 10% to .97."""
    rng = np.random.default_rng(7)
    planned_LE = SHAPES[shape]
    drifted_LE = planned_LE * np.exp(0.3 * rng.standard_normal(planned_LE.shape))
    current = place("lpt", planned_LE, ranks=32, slots=288)
    for share, least in ((0.05, 0.94), (0.1, 0.97)):
        after = improve(current, drifted_LE, fills=slots_in(share, current.slot_to_expert_LS.size))
        assert moved_LS(current, after).mean() <= share
        assert balancedness(rank_loads_LG(after, drifted_LE)) >= least


def test_bad_requests_are_refused_with_the_mend() -> None:
    current = placed([[0, 1, 2, 3]], ranks=2)
    with pytest.raises(InputError, match="a budget of -1 slots; give 0 or more"):
        improve(current, np.ones((1, 4)), fills=-1)
    with pytest.raises(InputError, match=r"loads of shape \(1, 3\) for a placement of 1 layers of 4 experts"):
        improve(current, np.ones((1, 3)), fills=1)
    with pytest.raises(InputError, match="layer 0, expert 2 has -1, which is negative"):
        improve(current, np.array([[1.0, 1, -1, 1]]), fills=1)

"""Ranks renumbered so that few slots move."""

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.balance import moved_LS, moved_share, rank_loads_LG
from router.placement import place
from router.placement.base import Placement
from router.relabel import relabel
from traces.errors import InputError


def placed(slots_LS: Any, ranks: int, **more: Any) -> Placement:
    slots = np.array(slots_LS)
    return Placement(slot_to_expert_LS=slots, experts=int(slots.max()) + 1, ranks=ranks, **more)


def test_the_same_ranks_in_another_order_move_nothing() -> None:
    before = placed([[0, 1, 2, 3], [0, 1, 2, 3]], ranks=2)
    after = placed([[3, 2, 0, 1], [1, 0, 3, 2]], ranks=2)
    assert moved_share(before, after) == 0.5
    renumbered = relabel(before, after)
    assert renumbered.slot_to_expert_LS.tolist() == [[0, 1, 3, 2], [1, 0, 3, 2]]
    assert moved_share(before, renumbered) == 0


def test_ranks_of_one_node_stay_together() -> None:
    """Experts 0, 1 | 2, 3 on two nodes become 0, 2 | 1, 3: on each node one of two can stay."""
    before, after = placed([[0, 1, 2, 3]], ranks=4), placed([[1, 3, 0, 2]], ranks=4)
    assert moved_share(before, relabel(before, after)) == 0
    renumbered = relabel(before, after, nodes=2)
    assert moved_share(before, renumbered) == 0.5
    nodes = [set(node) for node in renumbered.slot_to_expert_LS.reshape(2, 2).tolist()]
    assert nodes in ([{0, 2}, {1, 3}], [{1, 3}, {0, 2}])


def test_residency_goes_with_the_slots() -> None:
    before = placed([[0, 1, 2, 3]], ranks=2)
    after = placed([[2, 3, 0, 1]], ranks=2, resident_LS=np.array([[True, False, True, True]]))
    resident_LS = relabel(before, after).resident_LS
    assert resident_LS is not None
    assert resident_LS.tolist() == [[True, True, True, False]]


@settings(max_examples=60, deadline=None)
@given(ranks=st.integers(1, 4), experts=st.integers(1, 8), more=st.integers(0, 2), seed=st.integers(0, 99))
def test_no_order_of_ranks_moves_fewer(ranks: int, experts: int, more: int, seed: int) -> None:
    slots = ranks * min(-(-experts // ranks) + more, experts)
    rng = np.random.default_rng(seed)
    loads_LE = rng.integers(1, 9, size=(2, experts)).astype(float)
    before, after = (place("random", loads_LE, ranks=ranks, slots=slots, seed=int(s)) for s in rng.integers(0, 99, 2))
    renumbered = relabel(before, after)
    np.testing.assert_allclose(
        np.sort(rank_loads_LG(renumbered, loads_LE)), np.sort(rank_loads_LG(after, loads_LE)), rtol=1e-12
    )
    slots_LGS = after.slot_to_expert_LS.reshape(2, ranks, -1)
    fewest_L = np.min(
        [
            moved_LS(before, placed_like(after, slots_LGS[:, list(order)].reshape(2, -1))).sum(axis=1)
            for order in permutations(range(ranks))
        ],
        axis=0,
    )
    np.testing.assert_array_equal(moved_LS(before, renumbered).sum(axis=1), fewest_L)


def placed_like(placement: Placement, slots_LS: Any) -> Placement:
    return Placement(slot_to_expert_LS=slots_LS, experts=placement.experts, ranks=placement.ranks)


def test_placements_that_do_not_go_together_are_refused() -> None:
    before = placed([[0, 1, 2, 3]], ranks=2)
    with pytest.raises(InputError, match="a placement of 1 layers of 4 experts on 4 ranks cannot take the numbers of"):
        relabel(before, placed([[0, 1, 2, 3]], ranks=4))
    with pytest.raises(InputError, match="2 ranks do not divide over 3 nodes"):
        relabel(before, before, nodes=3)

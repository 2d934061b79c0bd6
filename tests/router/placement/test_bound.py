"""Bounds where groups of experts stay on one node: by hand, and that no plan is above them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.balance import balancedness, rank_loads_LG
from router.placement import plan
from router.placement.bound import bound_of
from router.placement.problem import PlacementProblem

LOADS = np.array([[8.0, 3, 2, 1]])


def test_the_bound_of_groups_on_nodes_by_hand() -> None:
    """Four groups of an expert on two nodes of a rank: of (8,3|2,1), (8,2|3,1) and (8,1|3,2) the last is best: 9."""
    problem = PlacementProblem(loads_LE=LOADS, ranks=2, slots=4, nodes=2, groups=4)
    np.testing.assert_allclose(bound_of(problem, LOADS, "hierarchical"), 7 / 9)
    # Without groups the 8 still has one beside it where there is no spare slot, the 1 at best.
    np.testing.assert_allclose(bound_of(problem, LOADS, "balanced"), 7 / 9)


@pytest.mark.parametrize(
    ("algorithm", "away_share", "bound"),
    [
        ("hierarchical", 1.0, 7 / 9),  # it lets no slot leave, whatever may
        ("soft_hierarchical", 0.0, 7 / 9),
        ("soft_hierarchical", 0.5, 1.0),
        ("balanced", 0.0, 1.0),
        ("incremental", 0.0, 1.0),  # moves under a budget, which know no groups
    ],
)
def test_a_group_binds_only_those_that_keep_all_of_it_on_a_node(
    algorithm: str, away_share: float, bound: float
) -> None:
    """Two spare slots: without groups the 8 has a replica on either rank, 7 and 7; with them still 9 on its node."""
    problem = PlacementProblem(loads_LE=LOADS, ranks=2, slots=6, nodes=2, groups=4, away_share=away_share)
    np.testing.assert_allclose(bound_of(problem, LOADS, algorithm), bound)


def test_with_too_many_ways_to_share_out_groups_the_bound_is_that_without() -> None:
    """16 groups on 8 nodes: 16! / (2!^8 · 8!) = 2,027,025 ways. The 9 has a mean of 24 / 8 = 3 on each rank."""
    loads_LE = np.ones((1, 16))
    loads_LE[0, 0] = 9
    problem = PlacementProblem(loads_LE=loads_LE, ranks=8, slots=32, nodes=8, groups=16)
    assert bound_of(problem, loads_LE, "hierarchical") == bound_of(problem, loads_LE, "balanced") == 1


@pytest.mark.parametrize(("algorithm", "away_share"), [("hierarchical", 1.0), ("soft_hierarchical", 0.0)])
@settings(max_examples=30, deadline=None)
@given(loads=st.lists(st.integers(0, 50), min_size=8, max_size=8))
def test_no_plan_is_above_its_bound(algorithm: str, away_share: float, loads: list[int]) -> None:
    loads_LE = np.array([loads], dtype=float)
    problem = PlacementProblem(loads_LE=loads_LE, ranks=4, slots=12, nodes=2, groups=4, away_share=away_share)
    reached = balancedness(rank_loads_LG(plan(algorithm, problem), loads_LE))
    assert reached <= bound_of(problem, loads_LE, algorithm) + 1e-9

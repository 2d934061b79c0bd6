import re
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from router.balance import balancedness, least_largest_replica_L, rank_loads_LG
from router.placement import place
from router.placement.base import Placement
from tests.router.placement.shapes import load_shapes
from traces.errors import InputError

SHAPES = load_shapes(6, 256)
SIZES = {"ranks": 32, "slots": 288, "nodes": 4, "groups": 8}


def bound(loads_LE: NDArray[np.float64]) -> float:
    """Mean over layers: mean rank load over the least largest bound of a node, over all pairings of 8 groups."""
    of_layers = []
    for load_E in loads_LE:
        load_XE = load_E.reshape(8, 32)
        least = {
            pair: max(both.sum() / 8, float(least_largest_replica_L(both[None], 8, 72)[0]))
            for pair in combinations(range(8), 2)
            for both in [load_XE[list(pair)].reshape(-1)]
        }
        worst = min(max(least[pair] for pair in pairing) for pairing in pairings(list(range(8))))
        of_layers.append(load_E.sum() / 32 / worst)
    return float(np.mean(of_layers))


def pairings(groups: list[int]) -> list[list[tuple[int, int]]]:
    if not groups:
        return [[]]
    first, *others = groups
    return [
        [(first, other), *rest] for other in others for rest in pairings([group for group in others if group != other])
    ]


def test_there_are_105_pairings() -> None:
    assert len(pairings(list(range(8)))) == 105


@pytest.mark.parametrize("shape", list(SHAPES))
def test_it_comes_near_the_bound_of_all_pairings(shape: str) -> None:
    placement = place("hierarchical", SHAPES[shape], **SIZES)
    assert bound(SHAPES[shape]) - 0.003 <= balancedness(rank_loads_LG(placement, SHAPES[shape]))
    assert off_node(placement, SHAPES[shape]) == 0


@pytest.mark.parametrize("shape", list(SHAPES))
def test_redundant_slots_that_may_leave_home_buy_balance_with_tokens_off_node(shape: str) -> None:
    loads_LE = SHAPES[shape]
    placements = [place("soft_hierarchical", loads_LE, **SIZES, away_share=share) for share in (0.0, 0.25, 1.0)]
    at_home, some, all_away = (balancedness(rank_loads_LG(placement, loads_LE)) for placement in placements)
    assert at_home < some
    assert all_away >= 0.9
    assert [off_node(placement, loads_LE) > 0 for placement in placements] == [False, True, True]


def off_node(placement: Placement, loads_LE: NDArray[np.float64]) -> float:
    """The share of rows that are computed on another node than that which holds all 32 experts of their group."""
    away = 0.0
    for load_E, expert_S in zip(loads_LE, placement.slot_to_expert_LS, strict=True):
        count_NE = np.stack([np.bincount(held, minlength=256) for held in expert_S.reshape(4, -1)])
        whole_NX = (count_NE > 0).reshape(4, 8, 32).all(axis=2)
        assert whole_NX.any(axis=0).all()
        assert (whole_NX.sum(axis=1) >= 2).all()
        home_E = np.repeat(whole_NX.argmax(axis=0), 32)
        away += float((load_E * (1 - count_NE[home_E, np.arange(256)] / count_NE.sum(axis=0))).sum() / load_E.sum())
    return away / len(loads_LE)


def test_a_hot_node_by_hand() -> None:
    """Two nodes of one rank with three slots, one redundant slot each; groups of 10 + 2 and 1 + 1.

    At home the nodes have 12 and 2. A replica of the 10 on the light node takes 5 along: 7 and 7.
    """
    loads = np.array([[10.0, 2, 1, 1]])
    sizes = {"ranks": 2, "slots": 6, "nodes": 2, "groups": 2}
    assert rank_loads_LG(place("hierarchical", loads, **sizes), loads).tolist() == [[12, 2]]
    soft = place("soft_hierarchical", loads, **sizes, away_share=0.5)
    assert rank_loads_LG(soft, loads).tolist() == [[7, 7]]
    assert [sorted(set(held)) for held in soft.slot_to_expert_LS.reshape(2, 3).tolist()] == [[0, 1], [0, 2, 3]]


@pytest.mark.parametrize("algorithm", ["hierarchical", "soft_hierarchical"])
def test_groups_must_divide_over_nodes(algorithm: str) -> None:
    with pytest.raises(InputError, match=re.escape("3 groups of experts do not divide over 2 nodes")):
        place(algorithm, np.ones((1, 6)), ranks=2, slots=6, nodes=2, groups=3)

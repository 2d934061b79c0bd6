import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.affinity import stays, visits
from router.placement.affinity_turns import replicas_in_turn
from router.placement.base import Placement


def test_visits_and_stays_by_hand() -> None:
    """Four ranks of one slot on two nodes; the second layer lies the other way round.

    Token 0: experts 0 and 1 are on ranks 0 and 1, one node; then 0 and 1 on ranks 3 and 2, the other node: none stays.
    Token 1: experts 0 and 2 are on ranks 0 and 2, two nodes; then 3 and 1 on ranks 0 and 2: of four pairs two stay.
    """
    placement = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3], [3, 2, 1, 0]]), experts=4, ranks=4)
    ids_TLK = np.array([[[0, 1], [0, 1]], [[0, 2], [3, 1]]])
    visited, stayed = visits(placement, ids_TLK, nodes=2), stays(placement, ids_TLK, nodes=2)
    assert visited.nodes_L.tolist() == [1.5, 1.5]
    assert visited.ranks_L.tolist() == [2.0, 2.0]
    assert stayed.nodes_L.tolist() == [2 / 8]
    assert stayed.ranks_L.tolist() == [2 / 8]


def test_ids_of_no_expert_visit_nothing_and_do_not_stay() -> None:
    placement = Placement(slot_to_expert_LS=np.array([[0, 1], [0, 1]]), experts=2, ranks=2)
    ids_TLK = np.array([[[0, 5], [0, -1]], [[-1, 2], [1, 0]]])  # pairs: 0 to 0 alone, which stays
    assert visits(placement, ids_TLK, nodes=1).ranks_L.tolist() == [0.5, 1.5]
    assert visits(placement, ids_TLK, nodes=1).nodes_L.tolist() == [0.5, 1.0]
    assert stays(placement, ids_TLK, nodes=2).nodes_L.tolist() == [1.0]


def test_a_token_takes_one_replica_in_turn() -> None:
    """Expert 0 is on both ranks: the first token finds it beside expert 1 on rank 0, the second on rank 1."""
    placement = Placement(slot_to_expert_LS=np.array([[0, 1, 0, 2]]), experts=3, ranks=2)
    ids_TLK = np.array([[[0, 1]], [[1, 0]]])
    assert visits(placement, ids_TLK, nodes=2).ranks_L.tolist() == [(1 + 2) / 2]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 99), replicas=st.lists(st.integers(1, 4), min_size=4, max_size=4))
def test_replicas_in_turn_share_evenly(seed: int, replicas: list[int]) -> None:
    ids_TK = np.random.default_rng(seed).integers(0, 4, (30, 2))
    turn_TK = replicas_in_turn(ids_TK, np.array(replicas))
    for expert, count in enumerate(replicas):
        taken = np.bincount(turn_TK[ids_TK == expert], minlength=count)
        assert taken.size == count
        assert np.ptp(taken) <= 1


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_nodes_are_at_most_the_ranks_and_stays_on_a_rank_at_most_those_on_its_node(nodes: int) -> None:
    rng = np.random.default_rng(nodes)
    placement = Placement(slot_to_expert_LS=np.stack([rng.permutation(8), rng.permutation(8)]), experts=8, ranks=4)
    ids_TLK = rng.random((50, 2, 8)).argsort(axis=2)[:, :, :3]
    visited, stayed = visits(placement, ids_TLK, nodes), stays(placement, ids_TLK, nodes)
    assert (visited.nodes_L <= visited.ranks_L).all()
    assert (visited.nodes_L <= nodes).all()
    assert (stayed.ranks_L <= stayed.nodes_L).all()

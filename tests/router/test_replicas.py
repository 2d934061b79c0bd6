"""Which replica computes a pair."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.assignment import UNUSED, Assignment
from router.placement import place
from router.placement.base import Placement
from router.replicas import REPLICA_CHOICES, ReplicaChoice, asks_counts, choose_slots, deal_rows, rows_by_expert
from router.splits import SPLITS, split
from traces.errors import InputError

# Rank 0 holds slots 0 and 1, rank 1 holds 2 and 3: both experts on both ranks.
TWICE = Placement(slot_to_expert_LS=np.array([[0, 1, 0, 1]]), experts=2, ranks=2)
# A source takes turns, or all wait for the counts of all.
IN_TURN: tuple[ReplicaChoice, ...] = ("even", "local", "nearest")
BY_COUNTS: tuple[ReplicaChoice, ...] = ("least_loaded", "water_filling", "fewest_active")


def assigned(ids_TK: Any, kept_TK: Any = None) -> Assignment:
    ids = np.array(ids_TK)
    kept = ids != UNUSED if kept_TK is None else np.array(kept_TK)
    weights = kept.astype(np.float32)
    return Assignment(ids_TK=ids, scores_TK=weights, weights_TK=weights, kept_TK=kept, rerouted_TK=np.zeros_like(kept))


def slots(assignment: Assignment, placement: Placement, sources: list[int], choice: ReplicaChoice) -> list[list[int]]:
    chosen: list[list[int]] = choose_slots(assignment, placement, 0, np.array(sources), choice).tolist()
    return chosen


def test_replicas_take_turns_and_each_source_starts_at_another() -> None:
    # Rank 0: slots 0, 2, 0, 2. Rank 1 starts at the second replica: 2, 0, 2, 0.
    chosen = slots(assigned([[0]] * 8), TWICE, [0] * 4 + [1] * 4, "even")
    assert chosen == [[0], [2], [0], [2], [2], [0], [2], [0]]


def test_each_expert_has_turns_of_its_own() -> None:
    # Expert 0 is asked by tokens 0, 1, 2 and expert 1 by tokens 1, 2: slots 0, 2, 0 and 1, 3.
    chosen = slots(assigned([[0, UNUSED], [1, 0], [0, 1]]), TWICE, [0] * 3, "even")
    assert chosen == [[0, -1], [1, 2], [0, 3]]


def test_a_dropped_pair_takes_no_turn() -> None:
    chosen = slots(assigned([[0]] * 4, [[True], [False], [True], [True]]), TWICE, [0] * 4, "even")
    assert chosen == [[0], [-1], [2], [0]]


def test_local_takes_the_ranks_own_replica() -> None:
    assert slots(assigned([[0, 1]] * 4), TWICE, [0, 0, 1, 1], "local") == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_local_falls_back_to_turns_where_the_rank_has_none() -> None:
    # Three ranks with a slot pair each; rank 0 holds no expert 1, which lies in slots 2 (rank 1) and 4 (rank 2).
    placement = Placement(slot_to_expert_LS=np.array([[0, 2, 1, 2, 1, 2]]), experts=3, ranks=3)
    assert slots(assigned([[1]] * 4), placement, [0] * 4, "local") == [[2], [4], [2], [4]]
    assert slots(assigned([[1]] * 2), placement, [2] * 2, "local") == [[4], [4]]


def test_without_replicas_the_slot_is_the_experts_own() -> None:
    one_each = Placement(slot_to_expert_LS=np.array([[3, 1, 0, 2]]), experts=4, ranks=2)
    for choice in REPLICA_CHOICES:
        assert not asks_counts(choice, one_each)
        assert slots(assigned([[0, 1], [2, 3]]), one_each, [0, 1], choice) == [[2, 1], [3, 0]]


def test_a_slot_without_a_known_expert_is_refused() -> None:
    with pytest.raises(InputError, match="a slot holds an expert that is none of 0 to 1"):
        Placement(slot_to_expert_LS=np.array([[0, 1, 2]]), experts=2, ranks=1)


@pytest.mark.parametrize("choice", REPLICA_CHOICES)
def test_numpy_and_torch_choose_alike_by_hand(choice: ReplicaChoice) -> None:
    """Ids of any integer type, a dropped pair and an unused one."""
    ids_TK = np.array([[0, 1], [1, UNUSED], [0, 1], [0, 1]], dtype=np.int32)
    kept_TK = np.array([[True, True], [True, False], [False, True], [True, True]])
    expected = {
        "even": [[0, 1], [3, -1], [-1, 3], [2, 1]],  # rank 1's turns start at the second replica
        "local": [[0, 1], [1, -1], [-1, 3], [2, 3]],
        "nearest": [[0, 1], [1, -1], [-1, 3], [2, 3]],
        # Expert 0 has 2 rows, expert 1 has 4. Expert 1's are poured first, 2 on each rank; then one of expert 0.
        "least_loaded": [[0, 1], [1, -1], [-1, 3], [2, 3]],
        # Expert 0 first: one on each rank; then 2 of expert 1.
        "water_filling": [[0, 1], [1, -1], [-1, 3], [2, 3]],
        # Expert 1 on rank 0, expert 0 on rank 1.
        "fewest_active": [[2, 1], [1, -1], [-1, 1], [2, 1]],
    }[choice]
    sources = np.array([0, 0, 1, 1])
    assert choose_slots(assigned(ids_TK, kept_TK), TWICE, 0, sources, choice).tolist() == expected
    in_torch = Assignment(
        ids_TK=torch.as_tensor(ids_TK).long(),
        scores_TK=torch.zeros(4, 2),
        weights_TK=torch.zeros(4, 2),
        kept_TK=torch.as_tensor(kept_TK),
        rerouted_TK=torch.zeros(kept_TK.shape, dtype=torch.bool),
    )
    assert choose_slots(in_torch, TWICE, 0, torch.as_tensor(sources), choice).tolist() == expected


def test_layers_have_tables_of_their_own() -> None:
    placement = Placement(slot_to_expert_LS=np.array([[0, 1], [1, 0]]), experts=2, ranks=2)
    for layer, slot in ((0, 0), (1, 1)):
        assert choose_slots(assigned([[0]]), placement, layer, np.array([0]), "even").tolist() == [[slot]]


@st.composite
def steps(draw: st.DrawFn) -> tuple[Assignment, Placement, Any]:
    """A placement with replicas and an assignment, tokens of a rank together."""
    ranks, experts = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    slots_per_rank = draw(st.integers(-(-experts // ranks), experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    algorithm = draw(st.sampled_from(["contiguous", "random", "lpt"]))
    placement = place(algorithm, rng.random((1, experts)), ranks=ranks, slots=ranks * slots_per_rank, seed=1)
    tokens, k = draw(st.integers(0, 16)), draw(st.integers(1, experts))
    ids_TK = rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :k]
    ids_TK = np.where(rng.random((tokens, k)) < 0.2, UNUSED, ids_TK)
    kept_TK = (ids_TK != UNUSED) & (rng.random((tokens, k)) < 0.8)
    return assigned(ids_TK, kept_TK), placement, np.sort(rng.integers(0, ranks, tokens))


@pytest.mark.parametrize("choice", REPLICA_CHOICES)
@settings(max_examples=60, deadline=None)
@given(step=steps())
def test_a_kept_pair_goes_to_a_slot_that_holds_its_expert(
    choice: ReplicaChoice, step: tuple[Assignment, Placement, Any]
) -> None:
    assignment, placement, source_rank_T = step
    slot_TK = choose_slots(assignment, placement, 0, source_rank_T, choice)
    kept_TK = assignment.kept_TK
    assert (slot_TK[~kept_TK] == -1).all()
    np.testing.assert_array_equal(placement.slot_to_expert_LS[0][slot_TK[kept_TK]], assignment.ids_TK[kept_TK])


@settings(max_examples=100, deadline=None)
@given(step=steps())
def test_even_turns_differ_by_one_at_most(step: tuple[Assignment, Placement, Any]) -> None:
    assignment, placement, source_rank_T = step
    slot_TK = choose_slots(assignment, placement, 0, source_rank_T, "even")
    for rank in range(placement.ranks):
        for expert in range(placement.experts):
            here_TK = (source_rank_T == rank)[:, None] & assignment.kept_TK & (assignment.ids_TK == expert)
            turns_X = [
                (slot_TK[here_TK] == slot).sum() for slot in np.where(placement.slot_to_expert_LS[0] == expert)[0]
            ]
            assert max(turns_X) - min(turns_X) <= 1
            assert sum(turns_X) == here_TK.sum()


@pytest.mark.parametrize("choice", ["local", "nearest"])
@settings(max_examples=100, deadline=None)
@given(step=steps())
def test_local_never_leaves_a_rank_that_holds_the_expert(
    choice: ReplicaChoice, step: tuple[Assignment, Placement, Any]
) -> None:
    assignment, placement, source_rank_T = step
    held_by = placement.slot_to_expert_LS[0].reshape(placement.ranks, -1)
    slot_TK = choose_slots(assignment, placement, 0, source_rank_T, choice)
    for token, column in zip(*np.nonzero(assignment.kept_TK), strict=True):
        if assignment.ids_TK[token, column] in held_by[source_rank_T[token]]:
            assert slot_TK[token, column] // placement.slots_per_rank == source_rank_T[token]


@settings(max_examples=100, deadline=None)
@given(step=steps(), nodes=st.integers(1, 4))
def test_nearest_never_leaves_a_node_that_holds_the_expert(step: tuple[Assignment, Placement, Any], nodes: int) -> None:
    assignment, placement, source_rank_T = step
    node_of_G = np.arange(placement.ranks) * nodes // placement.ranks
    node_of_S = node_of_G.repeat(placement.slots_per_rank)
    expert_S = placement.slot_to_expert_LS[0]
    slot_TK = choose_slots(assignment, placement, 0, source_rank_T, "nearest", node_of_G=node_of_G)
    for rank in range(placement.ranks):
        own_TK = slot_TK[source_rank_T == rank]
        for expert in range(placement.experts):
            inside = (expert_S == expert) & (node_of_S == node_of_G[rank])
            at_home = (expert_S == expert) & (np.arange(placement.slots) // placement.slots_per_rank == rank)
            used = own_TK[
                assignment.kept_TK[source_rank_T == rank] & (assignment.ids_TK[source_rank_T == rank] == expert)
            ]
            if inside.any():
                assert inside[used].all()
            if inside.any() and not at_home.any():
                turns_X = np.bincount(used, minlength=placement.slots)[inside]
                assert turns_X.max() - turns_X.min() <= 1


def test_nearest_takes_turns_inside_its_node_by_hand() -> None:
    # Ranks 0 to 2 on one node, 3 on another, expert 0 on ranks 1, 2 and 3: slots 2, 4 and 6. Rank 0 stays in its node;
    # rank 2 and rank 3 stay at home.
    placement = Placement(slot_to_expert_LS=np.array([[1, 2, 0, 1, 0, 2, 0, 3]]), experts=4, ranks=4)
    node_of_G = np.array([0, 0, 0, 1])
    sources = np.array([0, 0, 0, 2, 3])
    slot_TK = choose_slots(assigned([[0]] * 5), placement, 0, sources, "nearest", node_of_G=node_of_G)
    assert slot_TK[:, 0].tolist() == [2, 4, 2, 4, 6]
    # Expert 3 is on no rank of node 0, and expert 1 on none of node 1, whose rank takes both replicas, in turn.
    slot_TK = choose_slots(assigned([[3, 1]] * 2), placement, 0, np.array([3, 3]), "nearest", node_of_G=node_of_G)
    assert slot_TK.tolist() == [[7, 3], [7, 0]]


@pytest.mark.parametrize("choice", BY_COUNTS)
@settings(max_examples=60, deadline=None)
@given(step=steps(), nodes=st.integers(1, 4))
def test_replicas_compute_what_the_split_says(
    choice: ReplicaChoice, step: tuple[Assignment, Placement, Any], nodes: int
) -> None:
    assignment, placement, source_rank_T = step
    node_of_G = np.arange(placement.ranks) * nodes // placement.ranks
    slot_TK = choose_slots(assignment, placement, 0, source_rank_T, choice, node_of_G=node_of_G)
    counts_E = np.bincount(assignment.ids_TK[assignment.kept_TK], minlength=placement.experts)
    rows_S = np.bincount(slot_TK[assignment.kept_TK], minlength=placement.slots)
    slots_EX, rows_EX = placement.expert_slots_LEX[0], split(choice, counts_E, placement, 0)
    np.testing.assert_array_equal(rows_S[slots_EX[slots_EX >= 0]], rows_EX[slots_EX >= 0])


@pytest.mark.parametrize("choice", BY_COUNTS)
@settings(max_examples=60, deadline=None)
@given(step=steps())
def test_a_rank_that_knows_all_counts_finds_its_part_of_the_answer(
    choice: ReplicaChoice, step: tuple[Assignment, Placement, Any]
) -> None:
    assignment, placement, source_rank_T = step
    everywhere_TK = choose_slots(assignment, placement, 0, source_rank_T, choice)
    rows_GE = rows_by_expert(assignment, source_rank_T, placement)
    assert rows_GE.sum() == assignment.kept_TK.sum()
    for rank in range(placement.ranks):
        own_T = source_rank_T == rank
        own = assigned(assignment.ids_TK[own_T], assignment.kept_TK[own_T])
        np.testing.assert_array_equal(rows_by_expert(own, source_rank_T[own_T], placement)[rank], rows_GE[rank])
        rows_GS = deal_rows(rows_GE, placement, 0, choice)
        own_TK = choose_slots(own, placement, 0, source_rank_T[own_T], choice, rows_GS=rows_GS)
        np.testing.assert_array_equal(own_TK, everywhere_TK[own_T])
        np.testing.assert_array_equal(np.bincount(own_TK[own_TK >= 0], minlength=placement.slots), rows_GS[rank])


def test_a_choice_by_counts_is_a_split() -> None:
    assert set(BY_COUNTS) == set(SPLITS)
    assert {choice for choice in REPLICA_CHOICES if asks_counts(choice, TWICE)} == set(BY_COUNTS)


@pytest.mark.parametrize("choice", IN_TURN)
@settings(max_examples=100, deadline=None)
@given(step=steps())
def test_a_rank_alone_finds_its_part_of_the_answer(
    choice: ReplicaChoice, step: tuple[Assignment, Placement, Any]
) -> None:
    assignment, placement, source_rank_T = step
    everywhere_TK = choose_slots(assignment, placement, 0, source_rank_T, choice)
    for rank in range(placement.ranks):
        own_T = source_rank_T == rank
        own = assigned(assignment.ids_TK[own_T], assignment.kept_TK[own_T])
        own_TK = choose_slots(own, placement, 0, source_rank_T[own_T], choice)
        np.testing.assert_array_equal(own_TK, everywhere_TK[own_T])


@pytest.mark.parametrize("choice", REPLICA_CHOICES)
@settings(max_examples=60, deadline=None)
@given(step=steps(), seed=st.integers(0, 99))
def test_numpy_and_torch_choose_alike(
    choice: ReplicaChoice, step: tuple[Assignment, Placement, Any], seed: int
) -> None:
    """The compiled loop and the array functions, whatever the order of the tokens."""
    assignment, placement, source_rank_T = step
    order_T = np.random.default_rng(seed).permutation(source_rank_T.size)
    assignment, source_rank_T = assignment.take(order_T), source_rank_T[order_T]
    in_torch = Assignment(
        **{
            name: torch.as_tensor(np.array(getattr(assignment, name)))
            for name in ("ids_TK", "scores_TK", "weights_TK", "kept_TK", "rerouted_TK")
        }
    )
    node_of_G = np.arange(placement.ranks) // 2
    np.testing.assert_array_equal(
        choose_slots(assignment, placement, 0, source_rank_T, choice, node_of_G=node_of_G),
        choose_slots(in_torch, placement, 0, torch.as_tensor(source_rank_T), choice, node_of_G=node_of_G).numpy(),
    )

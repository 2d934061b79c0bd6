"""Splits of a step's rows over replicas: by hand, against brute force, and against the linear program."""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.placement import place
from router.placement.base import Placement
from router.splits import SPLITS, rank_loads_G, split
from router.splits.choices import pour
from router.splits.deal import deal
from router.splits.lp import lp_split
from router.splits.paths import lower_largest
from tests.router.placement.shapes import load_shapes

# Rank 0 holds experts 0 and 1, rank 1 holds 0 and 2, rank 2 holds 2 and 3: 0 and 2 have a choice.
CHAIN = Placement(slot_to_expert_LS=np.array([[0, 1, 0, 2, 2, 3]]), experts=4, ranks=3)
# Both ranks hold both experts.
TWICE = Placement(slot_to_expert_LS=np.array([[0, 1, 0, 1]]), experts=2, ranks=2)
NAMES = sorted(SPLITS)


def rows(name: str, counts: list[int], placement: Placement) -> list[list[int]]:
    rows_EX: list[list[int]] = split(name, np.array(counts), placement, 0).tolist()
    return rows_EX


def active_G(rows_EX: Any, placement: Placement) -> Any:
    """The experts with rows on each rank."""
    slots = placement.expert_slots_LEX[0][rows_EX > 0]
    pairs = {(int(slot) // placement.slots_per_rank, int(placement.slot_to_expert_LS[0, slot])) for slot in slots}
    return np.bincount([rank for rank, _ in pairs], minlength=placement.ranks)


def test_water_goes_where_the_level_is_low() -> None:
    # Expert 1 puts 6 rows on rank 0. Expert 0's 4 fill rank 1 alone; expert 2's 4 then fill rank 2 to the same level.
    # Nobody can be below rank 0's 6.
    assert rows("water_filling", [4, 6, 4, 0], CHAIN) == [[0, 4], [6, 0], [0, 4], [0, 0]]


def test_a_level_that_does_not_divide_leaves_a_row_to_the_least_loaded() -> None:
    # Ranks 0 and 1 have 3 and 2 rows, rank 2 has 9. Of 4 more, one brings rank 1 level and the others make 5 and 4: the
    # odd one goes to the rank that was lower.
    load_G, rows_X = np.array([3, 2, 9]), np.zeros(3, dtype=np.int64)
    pour(4, np.array([0, 1, 2]), load_G, rows_X, np.empty(3, dtype=np.int64))
    assert rows_X.tolist() == [1, 3, 0]
    assert load_G.tolist() == [4, 5, 9]


def test_rows_move_along_a_chain_of_ranks() -> None:
    # Ranks 0 to 3 have 3, 2, 2 and 1 rows; neighbours share an expert with one row on each. No row can be moved to an
    # emptier rank with profit, but one of each of the three can.
    rank_EX = np.array([[0, 1], [1, 2], [2, 3]])
    rows_EX, load_G = np.ones((3, 2), dtype=np.int64), np.array([3, 2, 2, 1])
    lower_largest(rows_EX, rank_EX, np.arange(3), load_G)
    assert load_G.tolist() == [2, 2, 2, 2]
    assert rows_EX.tolist() == [[0, 2], [0, 2], [0, 2]]


def test_the_least_loaded_takes_what_has_fewer_replicas_first() -> None:
    # Three ranks. Expert 0 is on all, 1 on ranks 0 and 1. Expert 1 comes first: 4 rows, 2 on each. Expert 0's 5 then
    # find 2, 2, 0: two fill rank 2 up to them, one goes to each.
    placement = Placement(slot_to_expert_LS=np.array([[0, 1, 0, 1, 0, 2]]), experts=3, ranks=3)
    assert rows("least_loaded", [5, 4, 0], placement) == [[1, 1, 3], [2, 2, 0], [0, 0, 0]]


def test_the_least_loaded_never_looks_back() -> None:
    # Expert 1 has 6 rows on rank 0, expert 3 has 2 on rank 2. Expert 2's 6 fill ranks 1 and 2 to 4 each. Expert 0's 5
    # then find 6 and 4, and end at 8 and 7. Had expert 2 left rank 1 alone, nobody would have more than 7: 19 rows.
    greedy, best = (split(name, np.array([5, 6, 6, 2]), CHAIN, 0) for name in ("least_loaded", "water_filling"))
    assert sorted(rank_loads_G(greedy, CHAIN, 0).tolist()) == [4, 7, 8]
    assert rank_loads_G(best, CHAIN, 0).max() == 7


def test_each_expert_goes_to_one_rank_where_few_are_active() -> None:
    # Even shares make both ranks read both experts' weights.
    assert rows("fewest_active", [5, 3], TWICE) == [[5, 0], [0, 3]]
    # Expert 1 is on rank 0. Expert 0, with most rows, finds nobody on rank 1; expert 2 then nobody on rank 2.
    assert rows("fewest_active", [8, 2, 4, 0], CHAIN) == [[0, 8], [2, 0], [0, 4], [0, 0]]


def test_among_as_many_active_experts_rows_decide() -> None:
    # Two active experts on each rank either way: 10 + 1 on one rank and 9 + 2 on the other, not 10 + 9.
    twice = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3] * 2]), experts=4, ranks=2)
    rows_EX = split("fewest_active", np.array([10, 9, 2, 1]), twice, 0)
    assert sorted(rank_loads_G(rows_EX, twice, 0).tolist()) == [11, 11]


def test_who_waits_anyway_reads_another_expert() -> None:
    # Expert 1 has 1 row on rank 0, expert 3 has 3 on rank 1; expert 0's 10 must make one of them read a second expert.
    # The other one then may too, and 7 rows are on each.
    placement = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 0, 3, 4]]), experts=5, ranks=2)
    assert rows("fewest_active", [10, 1, 0, 3, 0], placement)[0] == [6, 4]
    # With expert 2 on rank 0 as well, rank 0 reads two and expert 0 must go to rank 1, whole: no more than two.
    assert rows("fewest_active", [10, 1, 1, 3, 0], placement)[0] == [0, 10]


def test_the_linear_program_splits_rows() -> None:
    rows_EX, largest = lp_split(np.array([5, 0]), TWICE, 0)
    assert largest == pytest.approx(2.5)
    assert rows_EX[0].tolist() == pytest.approx([2.5, 2.5])


@st.composite
def splittable(draw: st.DrawFn) -> tuple[Any, Placement]:
    ranks, experts = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    slots_per_rank = draw(st.integers(-(-experts // ranks), experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    algorithm = draw(st.sampled_from(["contiguous", "lpt", "random"]))
    placement = place(algorithm, rng.random((1, experts)), ranks=ranks, slots=ranks * slots_per_rank, seed=1)
    return rng.integers(0, draw(st.sampled_from([1, 4, 100])) + 1, experts), placement


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None)
@given(step=splittable())
def test_all_rows_go_to_replicas_that_exist(name: str, step: tuple[Any, Placement]) -> None:
    counts_E, placement = step
    rows_EX = split(name, counts_E, placement, 0)
    np.testing.assert_array_equal(rows_EX.sum(axis=1), counts_E)
    assert (rows_EX >= 0).all()
    assert (rows_EX[placement.expert_slots_LEX[0] < 0] == 0).all()
    assert rank_loads_G(rows_EX, placement, 0).sum() == counts_E.sum()
    np.testing.assert_array_equal(rows_EX, split(name, counts_E, placement, 0))


@settings(max_examples=100, deadline=None)
@given(step=splittable())
def test_water_filling_is_the_linear_program_in_whole_rows(step: tuple[Any, Placement]) -> None:
    counts_E, placement = step
    largest = int(rank_loads_G(split("water_filling", counts_E, placement, 0), placement, 0).max())
    assert largest == math.ceil(lp_split(counts_E, placement, 0)[1] - 1e-6)
    assert largest <= rank_loads_G(split("least_loaded", counts_E, placement, 0), placement, 0).max()


@settings(max_examples=100, deadline=None)
@given(step=splittable())
def test_no_choice_of_one_replica_each_has_fewer_active_experts(step: tuple[Any, Placement]) -> None:
    counts_E, placement = step
    rows_EX = split("fewest_active", counts_E, placement, 0)
    ranks_of = [
        sorted({int(slot) // placement.slots_per_rank for slot in slots if slot >= 0})
        for slots, count in zip(placement.expert_slots_LEX[0], counts_E, strict=True)
        if count
    ]
    found = active_G(rows_EX, placement).max()
    if math.prod(len(ranks) for ranks in ranks_of) <= 3000:
        best = min(np.bincount(chosen or [0], minlength=placement.ranks).max() for chosen in product(*ranks_of))
        assert found == (best if ranks_of else 0)
    # In turn, an expert is active on every rank for which it has rows enough.
    turns_X = np.arange(placement.expert_slots_LEX[0].shape[1])
    in_turn_EX = (counts_E[:, None] > turns_X) & (placement.expert_slots_LEX[0] >= 0)
    assert found <= active_G(in_turn_EX, placement).max()


SHAPES = load_shapes(1, 256)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_it_stays_within_one_per_cent_of_the_program(shape: str) -> None:
    """256 experts, 288 slots, 32 ranks, top-8: where a row is more than that, within the row that cannot be split."""
    rng = np.random.default_rng(1)
    loads_E = SHAPES[shape][0]
    placement = place("lpt", SHAPES[shape], ranks=32, slots=288)
    for tokens in (256, 1024, 4096):
        counts_E = rng.multinomial(8 * tokens, loads_E / loads_E.sum())
        largest = rank_loads_G(split("water_filling", counts_E, placement, 0), placement, 0).max()
        program = lp_split(counts_E, placement, 0)[1]
        assert largest == math.ceil(program - 1e-6)
        assert largest <= max(1.01 * program, program + 1)


# Ranks 0 and 1 on one node, 2 on the other; the only expert is on all of them.
EVERYWHERE: dict[str, Any] = {
    "slots_EX": np.array([[0, 1, 2]]),
    "replicas_E": np.array([3]),
    "slots_per_rank": 1,
    "node_of_G": np.array([0, 0, 1]),
}


def test_rows_are_dealt_to_their_own_rank_then_node_then_anywhere() -> None:
    # Rank 0 has 6 rows and a share of 2 at home. Of the other 4, rank 1 has room for 3 beside its own 1; one leaves.
    dealt_GS = deal(np.array([[6], [1], [0]]), np.array([[2, 4, 1]]), **EVERYWHERE)
    assert dealt_GS.tolist() == [[2, 3, 1], [0, 1, 0], [0, 0, 0]]
    # Rank 2 keeps its 2 although rank 0, which comes first, would need the room.
    dealt_GS = deal(np.array([[5], [0], [2]]), np.array([[1, 3, 3]]), **EVERYWHERE)
    assert dealt_GS.tolist() == [[1, 3, 1], [0, 0, 0], [0, 0, 2]]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(step=splittable(), nodes=st.integers(1, 3), seed=st.integers(0, 99))
def test_dealing_adds_up_and_keeps_at_home_what_it_can(
    name: str, step: tuple[Any, Placement], nodes: int, seed: int
) -> None:
    counts_E, placement = step
    ranks = placement.ranks
    rng = np.random.default_rng(seed)
    rows_GE = np.stack([rng.multinomial(count, np.full(ranks, 1 / ranks)) for count in counts_E], axis=1)
    rows_EX = split(name, counts_E, placement, 0)
    slots_EX = placement.expert_slots_LEX[0]
    dealt_GS = deal(
        rows_GE,
        rows_EX,
        slots_EX,
        placement.replicas_LE[0],
        placement.slots_per_rank,
        np.arange(ranks) * nodes // ranks,
    )
    assert (dealt_GS >= 0).all()
    np.testing.assert_array_equal(dealt_GS.sum(axis=0)[slots_EX[slots_EX >= 0]], rows_EX[slots_EX >= 0])
    for expert in range(placement.experts):
        own = slots_EX[expert][slots_EX[expert] >= 0]
        np.testing.assert_array_equal(dealt_GS[:, own].sum(axis=1), rows_GE[:, expert])
        for rank in range(ranks):
            home = own[own // placement.slots_per_rank == rank]
            share = int(dealt_GS[:, home].sum())
            assert dealt_GS[rank, home].sum() == min(share, rows_GE[rank, expert])

"""Searches on earlier steps, and the placements that use them: active experts, and a cost model's own times."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from router.balance import active_by_rank_WLG, rank_loads_LG
from router.placement.active_aware import active_aware
from router.placement.balanced import balanced
from router.placement.base import Placement
from router.placement.cost_aware import cost_aware, engines_plan
from router.placement.eplb import eplb
from router.placement.problem import PlacementProblem
from router.placement.step_costs import expected_load_WLG, predicted_s_WL
from router.placement.step_search import search_steps
from router.rank_seconds import RankSeconds

# Seconds an active expert and seconds a row, of decode (weights are all) and of prefill (rows are all).
DECODE, PREFILL = (1.0, 0.0), (0.0, 1.0)


def seconds_of(active_s: float, row_s: float, exchange_s: float = 0.0) -> RankSeconds:
    ends = np.array([0.0, 1.0])
    return RankSeconds(active_A=ends, rows_R=ends, seconds_AR=active_s * ends[:, None] + row_s * ends, row_s=exchange_s)


def problem_of(steps_WE: Any, *, ranks: int, slots: int, seconds: RankSeconds | None = None) -> PlacementProblem:
    """Of one layer."""
    steps_WLE = np.array(steps_WE)[:, None]
    return PlacementProblem(
        loads_LE=steps_WLE.sum(axis=0).astype(float), ranks=ranks, slots=slots, steps_WLE=steps_WLE, seconds=seconds
    )


def ranks_of(slots_LS: Any, ranks: int) -> list[list[int]]:
    """The experts of each rank of the first layer, both sorted."""
    return sorted(sorted(held) for held in slots_LS[0].reshape(ranks, -1).tolist())


TOGETHER = [[5, 0, 0, 2], [0, 4, 3, 0]] * 4  # experts 0 and 3 work in the same steps, 1 and 2 in the others


def test_experts_that_are_active_together_are_split() -> None:
    """By loads 5, 4, 3 and 2 the even pairs are {0, 3} and {1, 2}: one rank reads two experts while the other is idle.

    Split, both ranks read one expert in every step.
    """
    problem = problem_of(TOGETHER, ranks=2, slots=4)
    assert ranks_of(balanced(problem), 2) == [[0, 3], [1, 2]]
    slots_LS = active_aware(problem)
    assert problem.steps_WLE is not None
    active_WLG = active_by_rank_WLG(Placement(slot_to_expert_LS=slots_LS, experts=4, ranks=2), problem.steps_WLE)
    assert active_WLG.tolist() == [[[1, 1]]] * 8


def test_a_redundant_slot_goes_to_an_expert_that_wakes_no_second_replica() -> None:
    """By loads expert 0 gets it: both ranks then read two experts. A second replica of the one-row expert 2 is read
    in half of the steps only, and the first in the other half: 1.5 each.
    """
    problem = problem_of([[12, 4, 1]] * 4, ranks=2, slots=4)
    assert ranks_of(balanced(problem), 2) == [[0, 1], [0, 2]]
    assert ranks_of(active_aware(problem), 2) == [[0, 2], [1, 2]]


def test_the_cost_model_says_what_a_redundant_slot_is_for() -> None:
    """The same loads: where weights cost, expert 2 gets it; where rows do, expert 0: 10 and 7 rows, not 12.5, 4.5."""
    steps_WE = [[12, 4, 1]] * 4
    for costs, expected in ((DECODE, [[0, 2], [1, 2]]), (PREFILL, [[0, 1], [0, 2]])):
        problem = problem_of(steps_WE, ranks=2, slots=4, seconds=seconds_of(*costs))
        assert ranks_of(cost_aware(problem), 2) == expected


def test_the_exchange_of_the_fullest_rank_counts_too() -> None:
    # Experts cost nothing; rows on links do: 10 of 17 on the fullest rank rather than 12.5.
    problem = problem_of([[12, 4, 1]] * 4, ranks=2, slots=4, seconds=seconds_of(0.0, 0.0, 0.5))
    slots_LS = cost_aware(problem)
    assert ranks_of(slots_LS, 2) == [[0, 1], [0, 2]]
    assert problem.steps_WLE is not None
    assert problem.seconds is not None
    assert predicted_s_WL(slots_LS, problem.steps_WLE, 2, problem.seconds).tolist() == [[5.0]] * 4


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_and_empty_ones_are_planned_all_the_same(steps: int) -> None:
    problem = problem_of(np.zeros((steps, 4), dtype=np.int64), ranks=2, slots=6, seconds=seconds_of(*DECODE))
    for plan in (active_aware, cost_aware):
        placement = Placement(slot_to_expert_LS=plan(problem), experts=4, ranks=2)  # it has a slot for each expert
        assert placement.slots == 6
        assert placement.replicas_LE.max() == 2


def correlated_steps_WLE(rng: np.random.Generator, steps: int, layers: int, experts: int) -> Any:
    """Steps in which one of four groups of experts, a quarter each but spread over all, has most of the rows."""
    group_E = np.arange(experts) // 4 % 4
    hot_WL1 = rng.integers(4, size=(steps, layers, 1))
    return rng.poisson(np.where(group_E == hot_WL1, 2.0, 0.1))


def test_what_is_planned_on_some_steps_holds_in_the_next() -> None:
    """64 experts on 8 ranks: ranks that hold as much of every group read fewer experts at the worst."""
    rng = np.random.default_rng(2)
    planned_WLE, later_WLE = (correlated_steps_WLE(rng, 24, 4, 64) for _ in range(2))
    seconds = seconds_of(1.0, 0.01)
    problem = PlacementProblem(
        loads_LE=planned_WLE.sum(axis=0).astype(float), ranks=8, slots=64, steps_WLE=planned_WLE, seconds=seconds
    )
    by_loads_s, active_s, cost_s = (
        predicted_s_WL(plan(problem), later_WLE, 8, seconds).mean() for plan in (balanced, active_aware, cost_aware)
    )
    assert active_s < 0.93 * by_loads_s
    assert cost_s < 0.93 * by_loads_s


def test_a_search_that_only_learns_chance_is_not_taken() -> None:
    """Rows are drawn anew in each step, and steps say nothing of the next: what engines run is kept.

    A search is faster by more than a tenth on the steps that it has seen, and slower on later ones.
    """
    rng = np.random.default_rng(1)
    planned_WLE, later_WLE = (rng.poisson(1.0, size=(steps, 4, 32)) for steps in (6, 40))
    seconds = seconds_of(*PREFILL)
    problem = PlacementProblem(
        loads_LE=planned_WLE.sum(axis=0).astype(float), ranks=8, slots=64, steps_WLE=planned_WLE, seconds=seconds
    )
    engines_LS = engines_plan(problem)
    searched_LS = search_steps(active_aware(problem), planned_WLE, 8, seconds)
    for steps_WLE, least, most in ((planned_WLE, 0.0, 0.9), (later_WLE, 1.02, 2.0)):
        engines_s, searched_s = (
            predicted_s_WL(of_LS, steps_WLE, 8, seconds).mean() for of_LS in (engines_LS, searched_LS)
        )
        assert least * engines_s <= searched_s < most * engines_s
    np.testing.assert_array_equal(cost_aware(problem), engines_LS)


def test_replicas_of_what_engines_run_are_kept_apart() -> None:
    """EPLB gives ranks 2, 2, 0, 3 | 2, 2, 1, 3 | 2, 0, 0, 0 | 2, 1, 1, 1: there are ranks without 0 and without 1.

    One round of swaps is not enough: what comes in return for a replica may be on the rank as well.
    """
    problem = PlacementProblem(loads_LE=np.array([[5.0, 5, 8, 2]]), ranks=4, slots=16)
    assert eplb(problem).reshape(4, 4).tolist() == [[2, 2, 0, 3], [2, 2, 1, 3], [2, 0, 0, 0], [2, 1, 1, 1]]
    held_GP = engines_plan(problem).reshape(4, 4).tolist()
    twice = {expert for held in held_GP for expert in held if held.count(expert) > 1}
    assert all(expert in held for expert in twice for held in held_GP)


@settings(max_examples=60, deadline=None)
@given(
    steps_WLE=arrays(np.int64, (4, 2, 8), elements=st.sampled_from([0, 0, 1, 2, 9])),
    slots=st.sampled_from([8, 12, 16]),
    costs=st.tuples(*[st.sampled_from([0.0, 0.1, 1.0])] * 3),
)
def test_a_search_is_never_worse_than_its_start_on_its_own_steps(steps_WLE: Any, slots: int, costs: Any) -> None:
    seconds = seconds_of(*costs)
    start_LS = balanced(PlacementProblem(loads_LE=steps_WLE.sum(axis=0).astype(float), ranks=4, slots=slots))
    found_LS = search_steps(start_LS, steps_WLE, 4, seconds)
    start_L, found_L = (predicted_s_WL(of_LS, steps_WLE, 4, seconds).mean(axis=0) for of_LS in (start_LS, found_LS))
    assert (found_L <= start_L).all()
    for held_GP in found_LS.reshape(2, 4, -1):
        assert all(len(set(held)) == len(held) for held in held_GP.tolist())


@settings(max_examples=60, deadline=None)
@given(steps_WLE=arrays(np.int64, (3, 2, 8), elements=st.integers(0, 9)), slots=st.sampled_from([8, 12]))
def test_expected_loads_add_up_to_all_rows_and_are_exact_without_replicas(steps_WLE: Any, slots: int) -> None:
    slots_LS = balanced(PlacementProblem(loads_LE=steps_WLE.sum(axis=0).astype(float), ranks=4, slots=slots))
    placement = Placement(slot_to_expert_LS=slots_LS, experts=8, ranks=4)
    active_WLG, rows_WLG = expected_load_WLG(slots_LS, steps_WLE, 4)
    np.testing.assert_allclose(rows_WLG.sum(axis=2), steps_WLE.sum(axis=2))
    for loads_LE, rows_LG in zip(steps_WLE, rows_WLG, strict=True):
        np.testing.assert_allclose(rows_LG, rank_loads_LG(placement, loads_LE), atol=1e-12)
    if slots == 8:
        np.testing.assert_array_equal(active_WLG, active_by_rank_WLG(placement, steps_WLE))

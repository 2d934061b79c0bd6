"""When to rebalance, and to what."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from router.balance import moved_LS, moved_share
from router.placement import place
from router.placement.base import Placement
from router.rank_seconds import RankSeconds
from router.rebalance import Incremental, Never, Rebalancer, Replan, WhenItPays, predicted_by
from traces.errors import InputError

# Ranks hold experts 0, 1 and 2, 3. Loads of 4, 3, 2, 1 make 7 and 3; after a swap of 0 and 2 both have 5.
CURRENT = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3]]), experts=4, ranks=2)
SKEWED = np.array([[4, 3, 2, 1]])


def window(*steps: Any) -> Any:
    return np.stack([np.array(step) for step in steps])


def fullest_s(placement: Placement, steps_WLE: Any) -> float:
    """A second a row of the fullest rank."""
    on_rank_WG = steps_WLE[:, 0, placement.slot_to_expert_LS[0]].reshape(len(steps_WLE), 2, 2).sum(axis=2)
    return float(on_rank_WG.max(axis=1).mean())


def when_it_pays(horizon: int, move_s: float) -> WhenItPays:
    return WhenItPays(
        every=4,
        window=4,
        horizon=horizon,
        step_s=fullest_s,
        move_s=lambda before, after: move_s * float(moved_LS(before, after).sum()),
        budget_shares=(0.5, 1.0),
        algorithm=None,
    )


@pytest.mark.parametrize(
    "rebalancer",
    [
        Replan(every=4, window=2, algorithm="lpt"),
        Incremental(every=4, window=2, budget_share=0.5),
        when_it_pays(horizon=10, move_s=0.0),
    ],
    ids=lambda rebalancer: type(rebalancer).__name__,
)
def test_a_placement_changes_only_when_that_is_due(rebalancer: Rebalancer) -> None:
    seen = window(SKEWED, SKEWED)
    assert rebalancer.next(0, CURRENT, seen[:0]) is CURRENT
    assert rebalancer.next(3, CURRENT, seen) is CURRENT
    for step in (4, 8):
        changed = rebalancer.next(step, CURRENT, seen)
        assert fullest_s(changed, seen) == 5
    assert Never().next(4, CURRENT, seen) is CURRENT


def test_moves_stay_within_the_budget() -> None:
    # A share of 0.5 of four slots pays for one swap, 0.25 for none.
    assert (
        moved_share(CURRENT, Incremental(every=1, window=1, budget_share=0.5).next(1, CURRENT, window(SKEWED))) == 0.5
    )
    assert moved_share(CURRENT, Incremental(every=1, window=1, budget_share=0.25).next(1, CURRENT, window(SKEWED))) == 0


def test_a_renumbered_plan_moves_no_more_than_the_plan() -> None:
    rng = np.random.default_rng(2)
    planned, now = rng.integers(1, 50, size=(2, 1, 3, 16))
    current = place("lpt", planned[0], ranks=4, slots=20)
    anew, renumbered = (
        Replan(every=1, window=1, algorithm="lpt", renumber=renumber).next(1, current, now)
        for renumber in (False, True)
    )
    assert moved_share(current, renumbered) < moved_share(current, anew)


def test_it_pays_when_the_saving_until_the_horizon_exceeds_the_move() -> None:
    """A step takes 7 s, after a swap 5; the swap fills two slots at 10 s each. 10 steps save no more than that."""
    seen = window(SKEWED, SKEWED, SKEWED, SKEWED)
    assert when_it_pays(horizon=10, move_s=10.0).next(4, CURRENT, seen) is CURRENT
    changed = when_it_pays(horizon=11, move_s=10.0).next(4, CURRENT, seen)
    assert changed.slot_to_expert_LS.tolist() == [[2, 1, 0, 3]]


def test_a_plan_made_anew_is_tried_beside_moves() -> None:
    """No moves are allowed that help; a plan costs nothing here, and balances."""
    rebalancer = replace(when_it_pays(horizon=1, move_s=0.0), budget_shares=(0.25,), algorithm="lpt")
    seen = window(SKEWED, SKEWED)
    changed = rebalancer.next(4, CURRENT, seen)
    assert fullest_s(changed, seen) == 5
    assert moved_share(CURRENT, changed) == 0.5  # its ranks are renumbered: two of four slots stay


def test_a_plan_is_judged_by_later_steps_than_it_was_made_for() -> None:
    """The older half asks for a swap that the newer half, with the loads turned round, makes no better."""
    turned = np.array([[1, 2, 3, 4]])  # ranks have 3 and 7; with 0 and 2 swapped 5 and 5
    spike = np.array([[40, 1, 1, 1]])
    calm = np.array([[1, 1, 1, 1]])
    assert when_it_pays(horizon=100, move_s=0.0).next(4, CURRENT, window(spike, spike, calm, calm)) is CURRENT
    assert when_it_pays(horizon=100, move_s=0.0).next(4, CURRENT, window(SKEWED, SKEWED, turned, turned)) is not CURRENT


def test_predicted_seconds_are_of_the_slowest_rank_of_each_layer() -> None:
    """1 s an active expert and 0.1 s a row: ranks of two active experts, 7 rows and 3, take 2.7 and 2.3 s."""
    seconds = RankSeconds(
        active_A=np.array([0.0, 2.0]), rows_R=np.array([0.0, 10.0]), seconds_AR=np.array([[0.0, 1.0], [2.0, 3.0]])
    )
    assert predicted_by(seconds)(CURRENT, window(SKEWED)) == pytest.approx(2.7)
    assert predicted_by(seconds)(CURRENT, window(SKEWED, np.zeros((1, 4), dtype=int))) == pytest.approx(2.7 / 2)


def test_names_and_refusals() -> None:
    names = [Never().name, Replan(every=9, window=1).name, Incremental(every=9, window=1, budget_share=0.05).name]
    assert names == ["never", "eplb every 9", "moves of 0.05 every 9"]
    assert when_it_pays(horizon=10, move_s=1.0).name == "when it pays within 10, asked every 4"
    with pytest.raises(InputError, match="every is 0 steps; it must be at least 1"):
        Replan(every=0, window=1)
    with pytest.raises(InputError, match="window is 0 steps"):
        Incremental(every=1, window=0, budget_share=0.1)
    with pytest.raises(InputError, match=r"budget_share is 1\.5; give more than 0 and at most 1"):
        Incremental(every=1, window=1, budget_share=1.5)
    with pytest.raises(InputError, match="window is 1; a plan and its judgement need at least 2 steps"):
        WhenItPays(every=1, window=1, horizon=1, step_s=fullest_s, move_s=lambda before, after: 0.0)
    with pytest.raises(InputError, match="horizon is 0 steps"):
        WhenItPays(every=1, window=2, horizon=0, step_s=fullest_s, move_s=lambda before, after: 0.0)

"""Cost-aware placement: the least time that a cost model predicts for earlier steps, without learning their chance."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from router.placement.active_aware import active_aware
from router.placement.balanced import balanced
from router.placement.problem import PlacementProblem
from router.placement.step_costs import predicted_s_WL
from router.placement.step_search import search_steps

Plan = Callable[[PlacementProblem], NDArray[np.int64]]
_FOLDS = 2


def cost_aware(problem: PlacementProblem) -> NDArray[np.int64]:
    """Slots [L, S] for which `problem.seconds` predicts the shortest steps: slowest rank and fullest exchange of each.

    1. Ways to plan, by loads, by active experts, and that improved by a search on predicted times (`step_search`), are
       tried on either half of the steps and timed on the other.
    2. The fastest way plans again, from all steps. Of one step alone nothing can be held out, and it is timed on that.

    So a search that fits the chance of the steps it has seen is not what is taken.
    """
    steps_WLE = problem.steps_WLE
    assert steps_WLE is not None
    plans: tuple[Plan, ...] = (_searched, active_aware, balanced)
    fold_W = np.arange(len(steps_WLE)) * _FOLDS // len(steps_WLE)
    seconds_P = np.zeros(len(plans))
    for fold in np.unique(fold_W):
        planned_WLE = steps_WLE[fold_W != fold] if len(steps_WLE) > 1 else steps_WLE
        others = replace(problem, loads_LE=planned_WLE.sum(axis=0).astype(np.float64), steps_WLE=planned_WLE)
        seconds_P += [_seconds(plan(others), problem, steps_WLE[fold_W == fold]) for plan in plans]
    return plans[int(seconds_P.argmin())](problem)


def _searched(problem: PlacementProblem) -> NDArray[np.int64]:
    """The active-aware plan, improved by predicted times."""
    assert problem.steps_WLE is not None
    assert problem.seconds is not None
    return search_steps(active_aware(problem), problem.steps_WLE, problem.ranks, problem.seconds)


def _seconds(slots_LS: NDArray[np.int64], problem: PlacementProblem, steps_WLE: NDArray[np.integer]) -> float:
    assert problem.seconds is not None
    return float(predicted_s_WL(slots_LS, steps_WLE, problem.ranks, problem.seconds).sum())

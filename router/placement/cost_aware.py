"""Cost-aware placement: the least time that a cost model predicts for earlier steps, without learning their chance."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from router.placement.active_aware import active_aware
from router.placement.balanced import balanced
from router.placement.eplb import eplb
from router.placement.pack import keep_apart
from router.placement.problem import PlacementProblem
from router.placement.step_costs import predicted_s_WL
from router.placement.step_search import search_steps

Plan = Callable[[PlacementProblem], NDArray[np.int64]]
_FOLDS = 2
_SURE = 2.0  # standard errors by which a plan must be faster than what engines run


def cost_aware(problem: PlacementProblem) -> NDArray[np.int64]:
    """Slots [L, S] for which `problem.seconds` predicts the shortest steps: slowest rank and fullest exchange of each.

    1. Ways to plan, by loads, by active experts, and that improved by a search on predicted times (`step_search`), are
       tried on either half of the steps and timed on the other.
    2. The fastest way plans again, from all steps, if it surely is faster than what engines run: by two standard errors
       of what it saves a step. Else that is kept: a plan that gains nothing can only lose.

    So a search that fits the chance of the steps it has seen is not what is taken. Of one step alone nothing can be
    held out, and plans are timed on that.
    """
    steps_WLE = problem.steps_WLE
    assert steps_WLE is not None
    plans: tuple[Plan, ...] = (engines_plan, balanced, active_aware, _searched)
    fold_W = np.arange(len(steps_WLE)) * _FOLDS // len(steps_WLE)
    seconds_PW = np.empty((len(plans), len(steps_WLE)))
    for fold in np.unique(fold_W):
        planned_WLE = steps_WLE[fold_W != fold] if len(steps_WLE) > 1 else steps_WLE
        others = replace(problem, loads_LE=planned_WLE.sum(axis=0).astype(np.float64), steps_WLE=planned_WLE)
        for plan, seconds_W in zip(plans, seconds_PW, strict=True):
            seconds_W[fold_W == fold] = _seconds_W(plan(others), problem, steps_WLE[fold_W == fold])
    saved_PW = seconds_PW[0] - seconds_PW
    best = int(saved_PW.mean(axis=1).argmax())
    error_s = saved_PW[best].std() / np.sqrt(len(steps_WLE))
    return plans[best if saved_PW[best].mean() > _SURE * error_s else 0](problem)


def engines_plan(problem: PlacementProblem) -> NDArray[np.int64]:
    """EPLB's plan, with replicas of one expert on different ranks, if need be of other nodes than their group's."""
    slots_LS = eplb(problem)
    keep_apart(slots_LS.reshape(problem.layers, problem.ranks, -1), problem.experts)
    return slots_LS


def _searched(problem: PlacementProblem) -> NDArray[np.int64]:
    """The active-aware plan, improved by predicted times where replicas are chosen by chance."""
    assert problem.steps_WLE is not None
    assert problem.seconds is not None
    return search_steps(active_aware(replace(problem, split=None)), problem.steps_WLE, problem.ranks, problem.seconds)


def _seconds_W(
    slots_LS: NDArray[np.int64], problem: PlacementProblem, steps_WLE: NDArray[np.integer]
) -> NDArray[np.float64]:
    assert problem.seconds is not None
    seconds_WL = predicted_s_WL(slots_LS, steps_WLE, problem.ranks, problem.seconds, problem.split)
    return np.asarray(seconds_WL.sum(axis=1))

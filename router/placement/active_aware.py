"""Active-expert-aware placement: evens out what decode pays for, the experts whose weights a rank reads in a step."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from router.placement.balanced import balanced
from router.placement.problem import PlacementProblem
from router.placement.step_search import search_steps
from router.rank_seconds import RankSeconds

# What an active expert's rows cost beside the read of its weights, on average: rows come second, but decide where
# nothing else does, as where all experts are active in every step.
_ROWS_SHARE = 0.1
_TIES = 1e-3  # the weight of rows among experts that are equally often active


def active_aware(problem: PlacementProblem) -> NDArray[np.int64]:
    """Slots [L, S] with few and evenly spread active experts, and after that evenly spread rows, in earlier steps.

    1. Start from the loads alone (`balanced`).
    2. Redundant slots go where they wake the fewest experts: not to experts with many rows, whose every replica is
       active in every step, unless evening out is worth it, but to those that rarely have more than one.
    3. Slots swap, so that experts that are active in the same steps come to different ranks (`step_search`).

    Where rows will go to the fewest replicas, a second one wakes nobody: the experts that are active most often get one
    each, on ranks that are evenly active without them, so that each step has most to choose from.

    Balancing active experts instead of tokens: METRO, arXiv 2512.09277, which does it by the choice of replicas.
    """
    assert problem.steps_WLE is not None
    if problem.split == "fewest_active":
        active_LE = (problem.steps_WLE > 0).mean(axis=0)
        rows_LE = problem.even_where_none_LE
        return balanced(replace(problem, loads_LE=active_LE + _TIES * rows_LE / rows_LE.mean()))
    active = max(int(np.count_nonzero(problem.steps_WLE)), 1)
    row = _ROWS_SHARE * active / max(int(problem.steps_WLE.sum()), 1)
    ends = np.array([0.0, 1.0])
    experts_and_rows = RankSeconds(active_A=ends, rows_R=ends, seconds_AR=ends[:, None] + row * ends)
    return search_steps(balanced(problem), problem.steps_WLE, problem.ranks, experts_and_rows)

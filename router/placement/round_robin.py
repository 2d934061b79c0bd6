"""Round-robin placement: expert e on rank e % G, vLLM's alternative to its contiguous default."""

import math

import numpy as np
from numpy.typing import NDArray

from router.placement.problem import PlacementProblem


def round_robin(problem: PlacementProblem) -> NDArray[np.int64]:
    """Slots [L, S] dealt to ranks like cards: experts 0, 1, 2, … in turn, and redundant slots go on at expert 0.

    When the deal meets an expert and a rank together again, after lcm(E, G) slots, it passes over one rank, so that no
    expert is twice on a rank before it is on all. That many slots are whole rounds: every rank gets S / G.
    """
    dealt_S = np.arange(problem.slots)
    rank_S = (dealt_S + dealt_S // math.lcm(problem.experts, problem.ranks)) % problem.ranks
    by_rank_S = np.argsort(rank_S, kind="stable")
    return np.tile(by_rank_S % problem.experts, (problem.layers, 1))

"""Step search: swaps and other replicas that make earlier steps wait less for their slowest rank. Compiled.

What a rank takes is a table of its active experts and rows; its penalty rises exponentially with that, so that slow
ranks count most and all still count: the largest rank of a few steps is mostly chance, and a search for it alone would
learn that chance.
"""

import numpy as np
from numpy.typing import NDArray

from router.placement.step_costs import expected_load_WLG, predicted_s_WL
from router.placement.step_moves import search_layer
from router.rank_seconds import RankSeconds

# Penalties grow e-fold with every so many standard deviations of rank times: from smooth to steep, so that a search
# does not end where a smooth one would go on.
_STEEPNESS = (0.25, 1.0)
_ROW_POINTS = 129
_ROW_SPAN = 3.0  # times the fullest rank's rows: how far the table of penalties goes
_LARGEST_EXPONENT = 60.0  # steps of very different sizes reach it, and are then told apart less
_NO_DEVIATION = 1e-6  # of the mean time


def search_steps(
    slots_LS: NDArray[np.int64], steps_WLE: NDArray[np.integer], ranks: int, seconds: RankSeconds
) -> NDArray[np.int64]:
    """Slots [L, S] no worse than `slots_LS` on the steps, by `predicted_s_WL`, and mostly better on others like them.

    Layer by layer and from smooth to steep penalties: 1. redundant slots go to other experts, 2. slots of the rank with
    the largest penalty swap with others, each time by the best move found, as long as one is found. No rank gets an
    expert that it holds already. A layer whose start is better in the end keeps it.
    """
    found_LS = slots_LS.copy()
    for layer, expert_S in enumerate(found_LS):
        steps_WE = steps_WLE[:, layer]
        for steepness in _STEEPNESS:
            penalty = _penalty(expert_S, steps_WE, ranks, seconds, steepness)
            if penalty is not None:
                search_layer(expert_S.reshape(ranks, -1), np.ascontiguousarray(steps_WE.T, dtype=np.float64), *penalty)
    before_L, after_L = (
        predicted_s_WL(of_LS, steps_WLE, ranks, seconds).mean(axis=0) for of_LS in (slots_LS, found_LS)
    )
    return np.where((after_L < before_L)[:, None], found_LS, slots_LS)


def _penalty(
    expert_S: NDArray[np.int64], steps_WE: NDArray[np.integer], ranks: int, seconds: RankSeconds, steepness: float
) -> tuple[NDArray[np.float64], float, NDArray[np.float64]] | None:
    """Penalties by whole active experts and a grid of rows, points of it a row, and each step's weight [W].

    exp(steepness * (time - mean of the step) / deviation), the deviation over all ranks and steps; None if it is 0.
    """
    active_WG, rows_WG = (load_WLG[:, 0] for load_WLG in expected_load_WLG(expert_S[None], steps_WE[:, None], ranks))
    time_WG = seconds.of(active_WG, rows_WG) + seconds.row_s * rows_WG
    mean_W = time_WG.mean(axis=1)
    deviation_s = float(np.sqrt(np.mean((time_WG - mean_W[:, None]) ** 2)))
    if deviation_s <= _NO_DEVIATION * mean_W.mean():
        return None
    active_A = np.arange(expert_S.size // ranks + 1)[:, None]
    rows_R = np.linspace(0, max(_ROW_SPAN * rows_WG.max(), 1.0), _ROW_POINTS)
    time_AR = seconds.of(active_A, rows_R) + seconds.row_s * rows_R
    above_AR = (time_AR - mean_W.mean()) / deviation_s
    below_W = (mean_W.mean() - mean_W) / deviation_s
    penalty_AR, weight_W = (
        np.exp(np.clip(steepness * value_X, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)) for value_X in (above_AR, below_W)
    )
    return penalty_AR, float(1 / rows_R[1]), weight_W

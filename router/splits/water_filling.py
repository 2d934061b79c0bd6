"""Water-filling: the split whose busiest rank has the fewest rows that whole rows allow."""

from typing import Any

import numba
import numpy as np

from router.splits.choices import fixed_rows, pour_anew
from router.splits.paths import lower_largest

# Fewer leave long searches for paths, more take longer than they save: of 1 to 20, the shortest worst time (measured).
_SWEEPS = 4


@numba.njit(cache=True)
def water_filling(counts_E: Any, slots_EX: Any, replicas_E: Any, slots_per_rank: int, ranks: int) -> Any:
    """Rows of each replica [E, X], so that the largest number of rows on a rank is least.

    1. Rows of experts with one replica go there.
    2. In several sweeps, each expert with more takes its rows back and pours them anew over the ranks of its replicas:
       block coordinate descent on the sum of squared loads, whose minimum has the least largest load too.
    3. Whole rows can leave it short of that; paths from the busiest rank to less loaded ones do the rest, exactly.

    The linear program may split rows: rounded up to a whole row, its optimum is this one.
    """
    rows_EX, load_G, rank_EX, spread_P = fixed_rows(counts_E, slots_EX, replicas_E, slots_per_rank, ranks)
    order_X = np.empty(slots_EX.shape[1], dtype=np.int64)
    for _ in range(_SWEEPS):
        for expert in spread_P:
            pour_anew(counts_E[expert], rank_EX[expert], load_G, rows_EX[expert], order_X)
    lower_largest(rows_EX, rank_EX, spread_P, load_G)
    return rows_EX

"""Prices of a choice: where a layer's experts are, and what a cost model asks for sending one more row to one of them.

Made by `sim.prices.prices_of` from the same cost model that prices the step; a policy only reads them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class RoutePrices:
    """Marginal costs in seconds, at the load that a step of even routing has, and where experts are.

    `share_LEG`: the share of an expert's rows that each rank computes, summing to one over ranks (replicas share
    evenly), or over the groups of ranks that divide an expert's width. `row_s`: one more row on a rank whose experts
    are all active; `active_s`: one more active expert on a rank, which is the read of its weights; `hop_s_GG`: one row
    on the links from source to destination rank and back, 0 for the own rank; `load_s_LE`: bringing an expert's weights
    into its rank's memory, 0 for those that lie there. `node_of_G`: the node of each rank.
    """

    share_LEG: NDArray[np.float32]
    row_s: float
    active_s: float
    hop_s_GG: NDArray[np.float64]
    load_s_LE: NDArray[np.float64]
    node_of_G: NDArray[np.int64]

    @property
    def ranks(self) -> int:
        """G."""
        return int(self.share_LEG.shape[2])

"""What a layer's step takes on its ranks and links, as far as the choice of experts moves it: prices times loads."""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from router.prices import RoutePrices


@dataclass(frozen=True, eq=False, kw_only=True)  # no slots: what is derived is kept
class StepLoad:
    """Prices of one layer, ready for loads by source rank X and expert E (null experts among them, which cost nothing).

    `share_EG` the share of an expert's rows that each rank computes, `holds_EG` whether it has any; `open_s_E` what an
    active expert costs each rank that holds it; `row_s` a row; `hop_s_XG` a row on the links. A row of X stands for
    `copies` source ranks alike.
    """

    share_EG: NDArray[np.float64]
    holds_EG: NDArray[np.bool_]
    open_s_E: NDArray[np.float64]
    row_s: float
    hop_s_XG: NDArray[np.float64]
    copies: int

    @classmethod
    def of(cls, prices: RoutePrices, layer: int, *, experts: int, source: int | None, ranks: int) -> Self:
        """Of all source ranks, or as one `source` sees it that takes the other `ranks` to be like itself."""
        share_EG = np.zeros((experts, prices.ranks))
        share_EG[: prices.share_LEG.shape[1]] = prices.share_LEG[layer]
        open_s_E = np.zeros(experts)
        open_s_E[: prices.load_s_LE.shape[1]] = prices.active_s + prices.load_s_LE[layer]
        return cls(
            share_EG=share_EG,
            holds_EG=share_EG > 0,
            open_s_E=open_s_E,
            row_s=prices.row_s,
            hop_s_XG=prices.hop_s_GG if source is None else prices.hop_s_GG[source : source + 1],
            copies=1 if source is None else ranks,
        )

    @property
    def sources(self) -> int:
        """X."""
        return int(self.hop_s_XG.shape[0])

    @property
    def experts(self) -> int:
        """E, with null experts."""
        return int(self.share_EG.shape[0])

    @property
    def ranks(self) -> int:
        """G."""
        return int(self.share_EG.shape[1])

    @cached_property
    def ranks_of(self) -> list[list[int]]:
        """The ranks that hold each expert."""
        return [np.flatnonzero(holds_G).tolist() for holds_G in self.holds_EG]

    def compute_s_G(self, rows_XE: NDArray[np.int64]) -> NDArray[np.float64]:
        """What each rank computes: its rows, and the weights of its active experts."""
        rows_E = rows_XE.sum(axis=0)
        open_E = np.where(rows_E > 0, self.open_s_E, 0.0)
        return np.asarray((rows_E * (self.copies * self.row_s)) @ self.share_EG + open_E @ self.holds_EG)

    def links_s_XG(self, rows_XE: NDArray[np.int64]) -> NDArray[np.float64]:
        """What each source sends each rank, in seconds of a link."""
        return np.asarray((rows_XE @ self.share_EG) * self.hop_s_XG)

    def opening_s(self, rows_XE: NDArray[np.int64]) -> float:
        """What the active experts alone cost the rank where they cost most."""
        return float((np.where(rows_XE.sum(axis=0) > 0, self.open_s_E, 0.0) @ self.holds_EG).max())

    def row_price_s_XE(
        self, busy_G: NDArray[np.float64], out_X: NDArray[np.float64], in_G: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """What a row of each source and expert adds to the step, by how much each rank and link sets its time."""
        compute_s_E = self.copies * self.row_s * (self.share_EG @ busy_G)
        link_s_XG = self.hop_s_XG * (out_X[:, None] + self.copies * in_G)
        return np.asarray(compute_s_E + link_s_XG @ self.share_EG.T)

    def seconds(self, rows_XE: NDArray[np.int64]) -> float:
        """The slowest rank's, and the busiest link's: no rank goes on before the others."""
        links_s_XG = self.links_s_XG(rows_XE)
        busiest_s = max(float(links_s_XG.sum(axis=1).max()), self.copies * float(links_s_XG.sum(axis=0).max()))
        return float(self.compute_s_G(rows_XE).max()) + busiest_s

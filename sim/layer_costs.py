"""Layer costs: a cost model's own times of one MoE layer's experts and exchanges, for loads that are given."""

from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from cost_models.kernels.token_traffic import Direction
from cost_models.ops import CostModel, Experts, Regroup, TokenExchange
from cost_models.traffic import Traffic
from sim.layout import Layout
from sim.lower import MODES, Protocol
from traces.model import ModelSpec


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class LayerCosts:
    """One layer of a deployment whose tokens use `width` experts each and are dispatched in `dispatch_dtype`."""

    model: ModelSpec
    costs: CostModel
    layout: Layout
    protocol: Protocol
    dispatch_dtype: str
    width: int

    def experts_s(self, slots: int, active_X: NDArray[np.float64], rows_X: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds of experts on ranks of `slots` slots: `rows_X` rows, evenly on the first `active_X` slots.

        With the regrouping of rows on their way in and out. Every row is taken for a token of its own.
        """
        model, costs = self.model, self.costs
        rows_XS = np.array(
            [
                np.append(np.diff(np.linspace(0, rows, int(active) + 1).round()), np.zeros(slots - int(active)))
                for active, rows in zip(active_X, rows_X, strict=True)
            ]
        ).astype(np.int64)
        time_X = costs.seconds(
            Experts(
                rows_XS=rows_XS,
                hidden=model.hidden,
                expert_hidden=model.expert_hidden // self.layout.expert_tensor,
                matrices=model.expert_matrices,
                weight_bytes=model.weight_bytes,
                row_bytes=model.row_bytes,
                routed_tokens_X=rows_XS.sum(axis=1),
                top_k=self.width,
                mode=MODES[self.protocol],
                dtype=model.dtype,
            )
        )
        if Regroup not in costs.included:
            time_X = time_X + 2 * costs.seconds(
                Regroup(rows_X=rows_XS.sum(axis=1), segments=slots * self.layout.ranks, row_bytes=model.row_bytes)
            )
        return time_X

    def exchanges_s(self, tokens_per_rank: int, rows_GG: NDArray[np.int64], node_rows_GN: NDArray[np.int64]) -> float:
        """Seconds of the dispatch and return of `rows_GG` rows by source and destination rank.

        `node_rows_GN`: rows by source rank and node, for the protocol that sends once to each node.
        """
        traffic = Traffic(
            rows_XGG=rows_GG[None],
            node_rows_XGN=node_rows_GN[None] if self.protocol == "per_node" else None,
            node_of_G=self.layout.node_of_G,
        )
        return sum(
            float(
                self.costs.seconds(
                    TokenExchange(
                        tokens_X=np.array([tokens_per_rank]),
                        hidden=self.model.hidden,
                        top_k=self.width,
                        experts=self.model.experts,
                        ranks_X=np.array(self.layout.ranks),
                        nodes_X=np.array(self.layout.nodes),
                        direction=direction,
                        mode=MODES[self.protocol],
                        dtype=self.dispatch_dtype,
                        traffic=traffic,
                    )
                )[0]
            )
            for direction in get_args(Direction)
        )

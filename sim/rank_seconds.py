"""Rank seconds: a cost model's own times of a rank's experts and of one more row in an exchange, for placements."""

import numpy as np

from cost_models.ops import CostModel
from router.rank_seconds import RankSeconds
from sim.layer_costs import LayerCosts
from sim.layout import Layout
from sim.lower import Protocol
from traces.model import ModelSpec

_MOST_ACTIVE_POINTS = 33
_ROW_POINTS_PER_DOUBLING = 2


def rank_seconds_of(
    model: ModelSpec,
    costs: CostModel,
    *,
    layout: Layout,
    protocol: Protocol,
    dispatch_dtype: str,
    slots_per_rank: int,
    tokens_per_rank: int,
    width: int,
) -> RankSeconds:
    """Times of up to `slots_per_rank` active experts and all rows of a step of `tokens_per_rank` tokens on each rank.

    Of one layer. Experts, and rows regrouped on their way in and out, are what `Work` of such a rank would be priced
    at; exchanges grow by the row that the busiest rank receives more. More work never takes less time: where kernels'
    measured times fall, the time of less work stands for more, so that no placement is sought in a dent.
    """
    step_rows = max(tokens_per_rank * layout.ranks * width, 2)
    active_A = np.unique(np.linspace(0, slots_per_rank, min(slots_per_rank + 1, _MOST_ACTIVE_POINTS)).round())
    doublings = np.arange(np.ceil(np.log2(step_rows)) * _ROW_POINTS_PER_DOUBLING + 1) / _ROW_POINTS_PER_DOUBLING
    rows_R = np.append(0.0, np.unique(np.ceil(2.0**doublings)))
    active_X, rows_X = (axis_AR.ravel() for axis_AR in np.meshgrid(active_A, rows_R, indexing="ij"))
    # An active expert has a row at least, and rows have an expert: else the nearest load that can be.
    layer = LayerCosts(
        model=model, costs=costs, layout=layout, protocol=protocol, dispatch_dtype=dispatch_dtype, width=width
    )
    time_X = layer.experts_s(slots_per_rank, active_X, np.where(active_X > 0, np.maximum(rows_X, active_X), 0))
    rising_AR = np.maximum.accumulate(time_X.reshape(active_A.size, rows_R.size), axis=1)
    return RankSeconds(
        active_A=active_A,
        rows_R=rows_R,
        seconds_AR=np.maximum.accumulate(rising_AR, axis=0),
        row_s=_received_row_s(layer, tokens_per_rank),
    )


def _received_row_s(layer: LayerCosts, tokens_per_rank: int) -> float:
    """Seconds of one more row on the rank with most rows: the slope from an even step to one rank with double.

    Rows that each source sends are the same in both, so that only their destinations differ. Of a rank's rows its own
    tokens' share stays where it is.
    """
    layout, ranks = layer.layout, layer.layout.ranks
    each = max(-(-tokens_per_rank * layer.width // ranks), 1)  # rows from a source to a destination

    def exchange_s(rows_of_first: int) -> float:
        """Each source sends so many rows to rank 0 and `each` to the others, but for one that has the fewer for it."""
        rows_GG = np.full((ranks, ranks), each)
        rows_GG[:, 0] = rows_of_first
        source_G = np.arange(ranks)
        rows_GG[source_G, np.maximum(source_G, 1)] -= rows_of_first - each
        node_rows_GN = np.stack(
            [rows_GG[:, layout.node_of_G == node].sum(axis=1) for node in range(layout.nodes)], axis=1
        )
        return layer.exchanges_s(tokens_per_rank, rows_GG, node_rows_GN)

    if ranks == 1:
        return 0.0
    return max(exchange_s(2 * each) - exchange_s(each), 0.0) / (each * ranks)

"""Rank seconds: a cost model's own times of a rank's experts and of one more row in an exchange, for placements."""

import numpy as np
from numpy.typing import NDArray

from cost_models.ops import CostModel, Experts, Regroup, TokenExchange
from cost_models.traffic import Traffic
from router.rank_seconds import RankSeconds
from sim.layout import Layout
from sim.lower import MODES, Protocol
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
    time_X = experts_s(
        model,
        costs,
        layout=layout,
        protocol=protocol,
        slots=slots_per_rank,
        width=width,
        active_X=active_X,
        rows_X=np.where(active_X > 0, np.maximum(rows_X, active_X), 0),
    )
    rising_AR = np.maximum.accumulate(time_X.reshape(active_A.size, rows_R.size), axis=1)
    return RankSeconds(
        active_A=active_A,
        rows_R=rows_R,
        seconds_AR=np.maximum.accumulate(rising_AR, axis=0),
        row_s=_received_row_s(model, costs, layout, protocol, dispatch_dtype, tokens_per_rank, width),
    )


def experts_s(
    model: ModelSpec,
    costs: CostModel,
    *,
    layout: Layout,
    protocol: Protocol,
    slots: int,
    width: int,
    active_X: NDArray[np.float64],
    rows_X: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Seconds of one layer's experts on ranks of `slots` slots: `rows_X` rows, evenly on the first `active_X` slots.

    With the regrouping of rows on their way in and out. Every row is taken for a token of its own.
    """
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
            expert_hidden=model.expert_hidden // layout.expert_tensor,
            matrices=model.expert_matrices,
            weight_bytes=model.weight_bytes,
            row_bytes=model.row_bytes,
            routed_tokens_X=rows_XS.sum(axis=1),
            top_k=width,
            mode=MODES[protocol],
            dtype=model.dtype,
        )
    )
    if Regroup not in costs.included:
        time_X = time_X + 2 * costs.seconds(
            Regroup(rows_X=rows_XS.sum(axis=1), segments=slots * layout.ranks, row_bytes=model.row_bytes)
        )
    return time_X


def exchanges_s(
    model: ModelSpec,
    costs: CostModel,
    *,
    layout: Layout,
    protocol: Protocol,
    dispatch_dtype: str,
    tokens_per_rank: int,
    width: int,
    rows_GG: NDArray[np.int64],
    node_rows_GN: NDArray[np.int64],
) -> float:
    """Seconds of one layer's dispatch and return of `rows_GG` rows by source and destination rank.

    `node_rows_GN`: rows by source rank and node, for the protocol that sends once to each node.
    """
    traffic = Traffic(
        rows_XGG=rows_GG[None],
        node_rows_XGN=node_rows_GN[None] if protocol == "per_node" else None,
        node_of_G=layout.node_of_G,
    )
    return sum(
        float(
            costs.seconds(
                TokenExchange(
                    tokens_X=np.array([tokens_per_rank]),
                    hidden=model.hidden,
                    top_k=width,
                    experts=model.experts,
                    ranks_X=np.array(layout.ranks),
                    nodes_X=np.array(layout.nodes),
                    direction=direction,
                    mode=MODES[protocol],
                    dtype=dispatch_dtype,
                    traffic=traffic,
                )
            )[0]
        )
        for direction in ("dispatch", "combine")
    )


def _received_row_s(
    model: ModelSpec,
    costs: CostModel,
    layout: Layout,
    protocol: Protocol,
    dispatch_dtype: str,
    tokens_per_rank: int,
    width: int,
) -> float:
    """Seconds of one more row on the rank with most rows: the slope from an even step to one rank with double.

    Rows that each source sends are the same in both, so that only their destinations differ. Of a rank's rows its own
    tokens' share stays where it is.
    """
    ranks = layout.ranks
    each = max(-(-tokens_per_rank * width // ranks), 1)  # rows from a source to a destination

    def exchange_s(rows_of_first: int) -> float:
        """Each source sends so many rows to rank 0 and `each` to the others, but for one that has the fewer for it."""
        rows_GG = np.full((ranks, ranks), each)
        rows_GG[:, 0] = rows_of_first
        source_G = np.arange(ranks)
        rows_GG[source_G, np.maximum(source_G, 1)] -= rows_of_first - each
        node_rows_GN = np.stack(
            [rows_GG[:, layout.node_of_G == node].sum(axis=1) for node in range(layout.nodes)], axis=1
        )
        return exchanges_s(
            model,
            costs,
            layout=layout,
            protocol=protocol,
            dispatch_dtype=dispatch_dtype,
            tokens_per_rank=tokens_per_rank,
            width=width,
            rows_GG=rows_GG,
            node_rows_GN=node_rows_GN,
        )

    if ranks == 1:
        return 0.0
    return max(exchange_s(2 * each) - exchange_s(each), 0.0) / (each * ranks)

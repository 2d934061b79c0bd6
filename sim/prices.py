"""Prices for policies that look at hardware: the cost model's answer to "one more", at the load of even routing."""

import numpy as np
from numpy.typing import NDArray

from cost_models.ops import CostModel, Experts, TokenExchange
from cost_models.traffic import Traffic
from router.placement.base import Placement
from router.prices import RoutePrices
from sim.layout import Layout
from sim.lower import MODES, Protocol
from traces.model import ModelSpec


def prices_of(
    model: ModelSpec,
    placement: Placement,
    costs: CostModel,
    *,
    layout: Layout,
    protocol: Protocol,
    dispatch_dtype: str,
    tokens_per_rank: int,
    width: int,
) -> RoutePrices:
    """Marginal costs where each of the ranks has `tokens_per_rank` tokens that use `width` experts evenly."""
    rows_per_slot = tokens_per_rank * layout.ranks * width / placement.slots
    row_s, active_s = _expert_prices(model, placement, costs, layout, rows_per_slot, width)
    return RoutePrices(
        share_LEG=placement.share_LEG,
        row_s=row_s,
        active_s=active_s,
        hop_s_GG=_hop_prices(model, costs, layout, protocol, dispatch_dtype, max(tokens_per_rank, 1), width),
        load_s_LE=np.zeros((placement.layers, placement.experts)),
        node_of_G=layout.node_of_G,
    )


def _expert_prices(
    model: ModelSpec, placement: Placement, costs: CostModel, layout: Layout, rows_per_slot: float, width: int
) -> tuple[float, float]:
    """Seconds of one more row, and of one more active expert for the same rows."""
    slots = placement.slots_per_rank
    rows = max(round(rows_per_slot), 1)
    more = max(rows // 4, 1)
    half = max(slots // 2, 1)
    even_S = np.full(slots, rows)
    few_S = np.zeros(slots, dtype=np.int64)
    few_S[:half] = np.diff(np.linspace(0, rows * slots, half + 1).astype(np.int64))
    rows_XS = np.stack([even_S, even_S + more, few_S])
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
            dtype=model.dtype,
        )
    )
    row_s = max(float(time_X[1] - time_X[0]) / (more * slots), 0.0)
    active_s = max(float(time_X[0] - time_X[2]) / (slots - half), 0.0) if slots > half else 0.0
    return row_s, active_s


def _hop_prices(
    model: ModelSpec,
    costs: CostModel,
    layout: Layout,
    protocol: Protocol,
    dispatch_dtype: str,
    rows: int,
    width: int,
) -> NDArray[np.float64]:
    """Seconds of one row out and back by source and destination: what exchanges with a neighbour take beyond none."""
    ranks, node_of_G = layout.ranks, layout.node_of_G

    def exchange_s(destination_G: NDArray[np.int64]) -> float:
        rows_XGG = np.zeros((1, ranks, ranks), dtype=np.int64)
        rows_XGG[0, np.arange(ranks), destination_G] = rows
        node_rows_XGN = np.zeros((1, ranks, layout.nodes), dtype=np.int64)
        node_rows_XGN[0, np.arange(ranks), node_of_G[destination_G]] = rows
        traffic = Traffic(
            rows_XGG=rows_XGG,
            node_rows_XGN=node_rows_XGN if protocol == "per_node" else None,
            node_of_G=node_of_G,
        )
        return sum(
            float(
                costs.seconds(
                    TokenExchange(
                        tokens_X=np.array([rows]),
                        hidden=model.hidden,
                        top_k=width,
                        experts=model.experts,
                        ranks_X=np.array(ranks),
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

    own_G = np.arange(ranks)
    stay_s = exchange_s(own_G)
    hop_s_GG = np.zeros((ranks, ranks))
    same_node_GG = node_of_G[:, None] == node_of_G
    size = int(np.bincount(node_of_G)[0])
    if size > 1:
        next_in_node_G = own_G // size * size + (own_G + 1) % size
        hop_s_GG[same_node_GG] = max(exchange_s(next_in_node_G) - stay_s, 0.0) / rows
    if layout.nodes > 1:
        hop_s_GG[~same_node_GG] = max(exchange_s((own_G + size) % ranks) - stay_s, 0.0) / rows
    np.fill_diagonal(hop_s_GG, 0.0)
    return hop_s_GG

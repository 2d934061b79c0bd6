"""Prices for policies that look at hardware: the cost model's answer to "one more", at the load of even routing."""

import numpy as np
from numpy.typing import NDArray

from cost_models.ops import CostModel, Experts, HostToDevice, Regroup, TokenExchange
from cost_models.traffic import Traffic
from router.placement.base import Placement
from router.prices import RoutePrices
from sim.layout import Layout
from sim.lower import MODES, Protocol
from traces.model import ModelSpec

# Loads at which experts are priced, about an even one: shares of a rank's experts that are active, and of its rows.
_ACTIVE = np.array([0.5, 0.75, 1.0])
_ROWS = np.array([0.5, 0.75, 1.0, 1.25, 1.5, 2.0])


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
    """Marginal costs where each of the ranks has `tokens_per_rank` tokens that use `width` experts evenly.

    Slopes of the cost model's own times about that load: at few rows an expert a step waits for weights and a row is
    almost free, at many it is the other way round. An expert that stays in no rank's memory costs its loading; one that
    stays in some rank's costs none, though its other replicas may be loaded.
    """
    rows_per_slot = tokens_per_rank * layout.ranks * width / placement.slots
    row_s, active_s = _expert_prices(model, placement, costs, layout, protocol, rows_per_slot, width)
    return RoutePrices(
        share_LEG=np.repeat(placement.share_LEG, layout.expert_tensor, axis=2),
        row_s=row_s,
        active_s=active_s,
        hop_s_GG=_hop_prices(model, costs, layout, protocol, dispatch_dtype, max(tokens_per_rank, 1), width),
        load_s_LE=_load_prices(model, placement, costs, layout),
        node_of_G=layout.node_of_G,
    )


def _expert_prices(
    model: ModelSpec,
    placement: Placement,
    costs: CostModel,
    layout: Layout,
    protocol: Protocol,
    rows_per_slot: float,
    width: int,
) -> tuple[float, float]:
    """Seconds of one more row, regrouped on its way in and out, and of one more active expert for the same rows.

    Kernels' times go in steps of tiles, and the difference of two of them may have either sign. So a plane is laid
    through ranks of half to twice the rows on half of the experts to all of them, as near as least squares get.
    """
    slots = placement.slots_per_rank
    even = max(rows_per_slot * slots, 1.0)
    active_X, rows_X = (
        axis.ravel() for axis in np.meshgrid(np.unique(np.ceil(slots * _ACTIVE)), np.unique(np.ceil(even * _ROWS)))
    )
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
    return _slopes(time_X, rows_X, (rows_XS > 0).sum(axis=1).astype(np.float64))


def _load_prices(model: ModelSpec, placement: Placement, costs: CostModel, layout: Layout) -> NDArray[np.float64]:
    """Seconds [L, E] to load each expert, or a rank's part of it, from the host; 0 for those that are resident."""
    if placement.resident_LE.all():
        return np.zeros(placement.resident_LE.shape)
    load_s = costs.seconds(HostToDevice(bytes_X=np.array([model.expert_bytes / layout.expert_tensor])))[0]
    return np.where(placement.resident_LE, 0.0, load_s)


def _slopes(
    time_X: NDArray[np.float64], rows_X: NDArray[np.float64], active_X: NDArray[np.float64]
) -> tuple[float, float]:
    """By how much time rises with rows and with active experts; neither falls."""
    kept = [name for name, value_X in (("row", rows_X), ("active", active_X)) if np.ptp(value_X) > 0]
    values = {"row": rows_X, "active": active_X}
    while kept:
        columns = [np.ones_like(time_X), *(values[name] for name in kept)]
        slopes = dict(zip(kept, np.linalg.lstsq(np.stack(columns, axis=1), time_X, rcond=None)[0][1:], strict=True))
        falling = min(slopes, key=lambda name: slopes[name] * float(np.ptp(values[name])))
        if slopes[falling] >= 0:
            return float(slopes.get("row", 0.0)), float(slopes.get("active", 0.0))
        kept.remove(falling)
    return 0.0, 0.0


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

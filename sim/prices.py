"""Prices for policies that look at hardware: the cost model's answer to "one more", at the load of even routing."""

import numpy as np
from numpy.typing import NDArray

from cost_models.ops import CostModel, HostToDevice
from router.placement.base import Placement
from router.prices import RoutePrices
from sim.layer_costs import LayerCosts
from sim.layout import Layout
from sim.lower import Protocol
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
    layer = LayerCosts(
        model=model, costs=costs, layout=layout, protocol=protocol, dispatch_dtype=dispatch_dtype, width=width
    )
    row_s, active_s = _expert_prices(layer, placement.slots_per_rank, rows_per_slot)
    return RoutePrices(
        share_LEG=np.repeat(placement.share_LEG, layout.expert_tensor, axis=2),
        row_s=row_s,
        active_s=active_s,
        hop_s_GG=_hop_prices(layer, max(tokens_per_rank, 1)),
        load_s_LE=_load_prices(model, placement, costs, layout),
        node_of_G=layout.node_of_G,
    )


def _expert_prices(layer: LayerCosts, slots: int, rows_per_slot: float) -> tuple[float, float]:
    """Seconds of one more row, regrouped on its way in and out, and of one more active expert for the same rows.

    Kernels' times go in steps of tiles, and the difference of two of them may have either sign. So a plane is laid
    through ranks of half to twice the rows on half of the experts to all of them, as near as least squares get.
    """
    even = max(rows_per_slot * slots, 1.0)
    active_X, rows_X = (
        axis.ravel() for axis in np.meshgrid(np.unique(np.ceil(slots * _ACTIVE)), np.unique(np.ceil(even * _ROWS)))
    )
    time_X = layer.experts_s(slots, active_X, rows_X)
    # A slot has a row at least to be active.
    return _slopes(time_X, rows_X, np.minimum(active_X, rows_X))


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


def _hop_prices(layer: LayerCosts, rows: int) -> NDArray[np.float64]:
    """Seconds of one row out and back by source and destination: what exchanges with a neighbour take beyond none."""
    layout = layer.layout
    ranks, node_of_G = layout.ranks, layout.node_of_G

    def exchange_s(destination_G: NDArray[np.int64]) -> float:
        rows_GG = np.zeros((ranks, ranks), dtype=np.int64)
        rows_GG[np.arange(ranks), destination_G] = rows
        node_rows_GN = np.zeros((ranks, layout.nodes), dtype=np.int64)
        node_rows_GN[np.arange(ranks), node_of_G[destination_G]] = rows
        return layer.exchanges_s(rows, rows_GG, node_rows_GN)

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

"""Heat maps of simulations: the load of ranks by layer, and the traffic from rank to rank."""

from collections.abc import Sequence
from html import escape
from math import ceil

import numpy as np
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from cost_models.units import GB
from sim.report import Report
from tuner.html_plot import figure_text, load_axis, log_load, plot
from tuner.simulated import SimulatedScenario

_TRAFFIC_COLOURS = ["#f7f7f7", "#a9d0e5", "#0072b2", "#0b2f4a"]
_CELLS = 128  # ranks along one side of a heat map; of more, neighbours share a cell


def load_maps(scenarios: Sequence[SimulatedScenario]) -> str:
    """Rows and active experts by layer and rank, a row of two heat maps for each scenario."""
    titles = [
        figure_text(f"{kind}{f', {s.name}' if len(scenarios) > 1 else ''}")
        for s in scenarios
        for kind in ("rows", "active experts")
    ]
    heights = [min(420, max(110, 12 * len(s.layers_L))) for s in scenarios]
    plot_px = sum(heights) + 70 * (len(scenarios) - 1)
    figure = make_subplots(
        rows=len(scenarios),
        cols=2,
        subplot_titles=titles,
        horizontal_spacing=0.08,
        vertical_spacing=70 / plot_px if len(scenarios) > 1 else None,
        row_heights=heights,
    )
    extent = 0.16
    for row, scenario in enumerate(scenarios, 1):
        for column, (load_LG, what) in enumerate(
            ((scenario.rows_LG, "rows"), (scenario.active_LG, "active experts")), 1
        ):
            load_LC, ticks_C = _pooled(load_LG)
            over_mean_LC = load_LC / np.maximum(load_LG.mean(axis=1, keepdims=True), 1e-9)
            log_LC = log_load(over_mean_LC)
            extent = max(extent, float(np.abs(log_LC).max()))
            figure.add_heatmap(
                z=log_LC.astype(np.float32),
                x=ticks_C,
                y=[f"{layer}" for layer in scenario.layers_L],
                customdata=np.stack([load_LC, over_mean_LC], axis=2).astype(np.float32),
                coloraxis="coloraxis",
                hovertemplate=f"layer %{{y}}, rank %{{x}}: %{{customdata[0]:,.1f}} {what}, "
                "%{customdata[1]:.2f} times the mean<extra></extra>",
                row=row,
                col=column,
            )
            figure.update_xaxes(
                title="rank" if row == len(scenarios) else None,
                dtick=_tick(scenario),
                showgrid=False,
                row=row,
                col=column,
            )
            figure.update_yaxes(
                type="category",
                autorange="reversed",
                dtick=ceil(len(scenario.layers_L) / 12),
                showgrid=False,
                title="layer" if column == 1 else None,
                row=row,
                col=column,
            )
    figure.update_layout(
        margin={"t": 40, "b": 120},
        coloraxis=load_axis(extent, plot_px=plot_px),
    )
    busiest = "; ".join(
        f"{escape(s.name) + ': ' if len(scenarios) > 1 else ''}{s.report.token_imbalance:.2f} in rows, "
        f"{s.report.active_imbalance:.2f} in active experts"
        for s in scenarios
    )
    return plot(
        "loads",
        figure,
        "What each rank computes in a simulated layer, over the mean of the ranks. The busiest rank over the mean, "
        f"averaged over layers and steps: {busiest}.",
        height=plot_px + 160,
    )


def traffic_maps(scenarios: Sequence[SimulatedScenario]) -> str:
    """Bytes of a dispatch from rank to rank, a heat map for each scenario on one scale."""
    columns = min(2, len(scenarios))
    rows = ceil(len(scenarios) / columns)
    side_px = 430
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[figure_text(s.name) for s in scenarios] if len(scenarios) > 1 else None,
        vertical_spacing=0.25 / rows,
    )
    for place, scenario in enumerate(scenarios):
        at = {"row": place // columns + 1, "col": place % columns + 1}
        bytes_GC, ticks_C = _pooled(scenario.bytes_GG)
        bytes_CC = _pooled(bytes_GC.T)[0].T
        figure.add_heatmap(
            z=bytes_CC.astype(np.float32),
            x=ticks_C,
            y=ticks_C,
            coloraxis="coloraxis",
            hovertemplate="rank %{y} to rank %{x}: %{z:,.3s}B<extra></extra>",
            **at,
        )
        axis = figure.get_subplot(**at).xaxis.plotly_name.replace("axis", "")
        shared = {"dtick": _tick(scenario), "showgrid": False, "constrain": "domain", **at}
        figure.update_xaxes(title="to rank", **shared)
        figure.update_yaxes(title="from rank", autorange="reversed", scaleanchor=axis, **shared)
    figure.update_layout(
        margin={"t": 30},
        coloraxis={
            "colorscale": _TRAFFIC_COLOURS,
            "cmin": 0,
            "colorbar": {"title": {"text": "bytes a layer"}, "tickformat": ".2s", "ticksuffix": "B", "thickness": 14},
        },
    )
    tiers = "; ".join(
        f"{escape(s.name) + ': ' if len(scenarios) > 1 else ''}{_tiers(s.report) or 'nothing'}" for s in scenarios
    )
    pooled = " Neighbouring ranks share a cell, which shows the most of them." if _is_pooled(scenarios) else ""
    return plot(
        "traffic",
        figure,
        "Bytes from rank to rank in the dispatch of one layer, the mean over layers and steps; what a rank passes on "
        f"inside its node counts once for each leg.{pooled} Dispatch and combine of a step, all layers and ranks: "
        f"{tiers}.",
        height=rows * side_px + 90,
    )


def _tiers(report: Report) -> str:
    names = {"scale_up": "inside nodes", "scale_out": "between nodes"}
    return ", ".join(
        f"{value / GB:.3g} GB {names.get(tier, tier)}" for tier, value in report.bytes_by_tier.items() if value
    )


def _pooled(value_XG: NDArray[np.float64]) -> tuple[NDArray[np.float64], list[int]]:
    """The largest of as many neighbours as it takes to have no more than `_CELLS` of them, and the first of each."""
    ranks = value_XG.shape[1]
    size = ceil(ranks / _CELLS)
    first_C = np.arange(0, ranks, size)
    return np.maximum.reduceat(value_XG, first_C, axis=1), first_C.tolist()


def _tick(scenario: SimulatedScenario) -> int:
    """Ranks from one number on an axis to the next."""
    return ceil(scenario.cluster.ranks / 8)


def _is_pooled(scenarios: Sequence[SimulatedScenario]) -> bool:
    return any(s.cluster.ranks > _CELLS for s in scenarios)

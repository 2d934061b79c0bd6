"""HTML: what a trace says of its routers: who specialises, what is active, what a cache hits, what capacity wastes."""

from collections.abc import Sequence
from html import escape
from math import ceil
from pathlib import Path

import numpy as np
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from cost_models.units import GB
from router.waste import CLAIM, Waste
from traces.reuse import ActiveSet, ExpertCache
from traces.specialisation import SPECIALIST_LIFT, Specialisation
from tuner import html_page as h
from tuner.html_plot import figure_text, load_axis, log_load, plot, write_page
from tuner.trace_analysis import TraceAnalysis

_COLOURS = ("#0072b2", "#d55e00", "#00805e", "#8e4585", "#b8860b", "#1f2933")
_GREY = "#6b7785"
_MAPS = 4  # layers whose loads by domain are drawn
_SPECIALISTS = 12  # in the table


def write_trace_html(path: Path, analysis: TraceAnalysis) -> None:
    """Write the page of a trace."""
    trace, compute = analysis.trace, analysis.compute
    model = trace.model
    found = analysis.specialisation
    write_page(
        path,
        title=f"Routing of {model.name}",
        headline=h.paragraph(
            f"{trace.tokens:,} tokens in {analysis.stats.requests:,} requests. A token uses {model.top_k} of "
            f"{model.experts} experts in each of {model.layers} layers: {h.percent(compute.active_parameters)} of the "
            f"floating-point operations of all experts, {compute.sparse_flops / 1e6:,.1f} of "
            f"{compute.dense_flops / 1e6:,.1f} million."
        ),
        facts=(f"Trace: {trace.source}.", *(f"No {name}: {reason}." for name, reason in analysis.left_out.items())),
        sections={
            **({} if found is None else {"Specialisation by domain": _specialisation(found)}),
            "Active experts and reuse": _active(analysis.active, model.experts),
            "Expert cache": _cache(analysis.cache),
            "Wasted capacity": _waste(analysis.wastes),
        },
    )


def _specialisation(found: Specialisation) -> str:
    rows = [
        (escape(s.domain), f"layer {s.layer}, expert {s.expert}", h.percent(s.share), f"{s.lift:.2f}", f"{s.p:.3f}")
        for s in found.specialists[:_SPECIALISTS]
    ]
    head = ("Domain", "Expert", "Share of its tokens", "Lift", "p")
    many = f" The first {_SPECIALISTS}:" if len(found.specialists) > _SPECIALISTS else ""
    return (
        _distances(found)
        + _maps(found)
        + h.paragraph(
            f"Specialists: {len(found.specialists)}, by chance {found.specialists_chance:.1f}. At least "
            f"{SPECIALIST_LIFT:g} times as many of a specialist's tokens are from a domain as of all tokens (lift). "
            f"p is the share of permutations with as large a lift.{many}"
        )
        + (h.table(head, rows, words=2) if rows else "")
    )


def _distances(found: Specialisation) -> str:
    figure = make_subplots(cols=2, horizontal_spacing=0.12)
    layers = list(range(found.tv_DL.shape[1]))
    for number, (domain, tv_L, chance_L) in enumerate(zip(found.domains, found.tv_DL, found.tv_chance_DL, strict=True)):
        line: dict[str, object] = {"color": _COLOURS[number % len(_COLOURS)]}
        name = figure_text(domain)
        hover = f"{name}, layer %{{x}}: %{{y:.3f}}<extra></extra>"
        figure.add_scatter(
            x=layers, y=tv_L, name=name, legendgroup=name, line=line, mode="lines", hovertemplate=hover, row=1, col=1
        )
        figure.add_scatter(
            x=layers,
            y=chance_L,
            legendgroup=name,
            showlegend=False,
            line={**line, "dash": "dot", "width": 1.5},
            mode="lines",
            hovertemplate=hover.replace("layer", "by chance, layer"),
            row=1,
            col=1,
        )
    for name, value_L, dash in (
        ("information", found.information_L, "solid"),
        ("information by chance", found.information_chance_L, "dot"),
    ):
        figure.add_scatter(
            x=layers,
            y=value_L,
            name=name,
            line={"color": "#1f2933", "dash": dash},
            mode="lines",
            hovertemplate="layer %{x}: %{y:.4f} bits<extra></extra>",
            row=1,
            col=2,
        )
    figure.update_xaxes(title="layer", dtick=ceil(len(layers) / 12))
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title="total-variation distance", col=1)
    figure.update_yaxes(title="mutual information, bits", col=2)
    figure.update_layout(margin={"t": 70})
    return plot(
        "distances",
        figure,
        "Left: the distance of each domain's load from that of all tokens, 0 (the same experts) to 1 (none in common). "
        f"Right: what the expert of a pair tells of its domain, of {found.entropy_bits:.2f} bits. Dots: the mean over "
        f"{found.permutations} permutations of the domains of whole requests, of which there are {found.requests}; "
        "only what lies above is specialisation.",
        height=400,
    )


def _maps(found: Specialisation) -> str:
    above_L = found.information_above_chance_L
    layers = sorted(np.argsort(-above_L, kind="stable")[:_MAPS].tolist())
    experts = found.load_DLE.shape[2]
    each_px = max(60, 26 * len(found.domains))
    plot_px = len(layers) * each_px + (len(layers) - 1) * 40
    figure = make_subplots(
        rows=len(layers),
        subplot_titles=[f"layer {layer}" for layer in layers],
        shared_xaxes=True,
        vertical_spacing=40 / plot_px if len(layers) > 1 else None,
    )
    names = [figure_text(domain) for domain in found.domains]
    extent = 0.16
    for row, layer in enumerate(layers, 1):
        load_DE = found.load_DLE[:, layer]
        over_mean_DE = load_DE / load_DE.mean(axis=1, keepdims=True)
        log_DE = log_load(over_mean_DE)
        extent = max(extent, float(np.abs(log_DE).max()))
        gap_px = 1 if experts <= 64 else 0
        figure.add_heatmap(
            z=log_DE.astype(np.float32),
            x=list(range(experts)),
            y=names,
            customdata=over_mean_DE.astype(np.float32),
            coloraxis="coloraxis",
            xgap=gap_px,
            ygap=gap_px,
            hovertemplate=f"layer {layer}, expert %{{x}}, %{{y}}: %{{customdata:.2f}} times the mean<extra></extra>",
            row=row,
            col=1,
        )
    figure.update_xaxes(showgrid=False, dtick=ceil(experts / 16))
    figure.update_xaxes(title="expert", row=len(layers))
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    axis = load_axis(extent, plot_px=plot_px)
    axis["colorbar"]["title"]["text"] = "load over the mean of the domain's tokens in the layer"
    figure.update_layout(margin={"t": 30, "b": 120}, coloraxis=axis)
    caption = (
        f"Loads of experts by domain in the {len(layers)} layers where the expert tells most of the domain. An expert "
        "whose column is of one colour serves all domains alike."
    )
    return plot("domains", figure, caption, height=plot_px + 150)


def _active(active: ActiveSet, experts: int) -> str:
    figure = make_subplots(cols=2, horizontal_spacing=0.12)
    batch_B = list(active.batch_B)

    def means(values: Sequence[tuple[float, ...] | None]) -> list[float | None]:
        return [None if value_L is None else float(np.mean(value_L)) for value_L in values]

    curves = (
        ("recorded", means(active.active_BL), means(active.reuse_BL), {"color": _COLOURS[0]}),
        ("any other step", None, means(active.reuse_any_BL), {"color": _COLOURS[1]}),
        ("uniform routing", list(active.uniform_B), list(active.uniform_reuse_B), {"color": _GREY, "dash": "dash"}),
    )
    for name, active_B, reuse_B, line in curves:
        shared = {"x": batch_B, "name": name, "legendgroup": name, "line": line, "mode": "lines+markers"}
        if active_B is not None:
            hover = "%{x} tokens: %{y:.2f} experts<extra></extra>"
            figure.add_scatter(y=active_B, hovertemplate=hover, row=1, col=1, **shared)
        hover = "%{x} tokens: %{y:.1%} active before<extra></extra>"
        figure.add_scatter(y=reuse_B, hovertemplate=hover, showlegend=active_B is None, row=1, col=2, **shared)
    figure.update_xaxes(type="log", tickvals=batch_B, title="tokens in a step")
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title=f"active experts, of {experts}", col=1)
    figure.update_yaxes(title="share active in the step before", tickformat=".0%", col=2)
    return plot(
        "active",
        figure,
        "Streams in lockstep, the mean over layers and steps. Left: distinct experts in a step; uniform routing gives "
        "E (1 − (1 − K/E)<sup>B</sup>). Right: the share of them that were active in the step before, and in any "
        "other step of the same streams: what lies between the two is due to time, what lies between that and uniform "
        "routing to experts that are popular throughout.",
        height=380,
    )


def _cache(cache: ExpertCache) -> str:
    layers, experts = cache.hit_LM.shape
    share_M = [m / experts for m in range(1, experts + 1)]
    figure = go.Figure()
    for name, hit_M, line in (
        ("recorded", cache.hit_LM.mean(axis=0).tolist(), {"color": _COLOURS[0]}),
        ("tokens shuffled", cache.shuffled_LM.mean(axis=0).tolist(), {"color": _COLOURS[1]}),
        ("uniform routing", share_M, {"color": _GREY, "dash": "dash"}),
    ):
        hover = "%{x:.0%} of the experts resident: %{y:.1%} hits<extra></extra>"
        figure.add_scatter(x=share_M, y=hit_M, name=name, line=line, mode="lines", hovertemplate=hover)
    figure.update_xaxes(title="experts resident, share of a layer", tickformat=".0%", range=[0, 1])
    figure.update_yaxes(title="hits, share of pairs", tickformat=".0%", range=[0, 1.02])
    unit, unit_bytes = ("GB", GB) if cache.uncached_bytes >= GB else ("MB", 1e6)
    rows = [
        (
            f"{entry['slots']} of {experts}",
            h.percent(entry["hit"]),
            h.percent(entry["shuffled"]),
            h.percent(entry["uniform"]),
            _three_digits(entry["resident_bytes"] / unit_bytes),
            _three_digits(entry["loaded_bytes_per_token"] / unit_bytes),
            _three_digits(entry["saved_bytes_per_token"] / unit_bytes),
        )
        for entry in cache.to_json()["caches"]
    ]
    head = (
        "Resident a layer",
        "Hits",
        "Tokens shuffled",
        "Uniform routing",
        f"Cache, {unit}",
        f"Loaded a token, {unit}",
        f"Saved a token, {unit}",
    )
    return (
        plot(
            "cache",
            figure,
            "Hits of a least-recently-used cache of experts, one token at a time, requests one after another: the mean "
            "over layers. Shuffling the tokens leaves only what popular experts give.",
            height=380,
        )
        + h.table(head, rows, words=1)
        + h.paragraph(
            f"All {layers} layers together. Without a cache a token loads "
            f"{_three_digits(cache.uncached_bytes / unit_bytes)} {unit}."
        )
    )


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _waste(wastes: Sequence[Waste]) -> str:
    figure = go.Figure()
    factors = [f"{waste.capacity_factor:g}" for waste in wastes]
    curves: dict[str, Sequence[float | None]] = {
        "padding, all experts": [waste.padding for waste in wastes],
        "padding, active experts": [waste.active_padding for waste in wastes],
        "dropped pairs": [waste.dropped for waste in wastes],
        "wasted: padding and low gates": [waste.wasted for waste in wastes],
    }
    for number, (name, values) in enumerate(curves.items()):
        if values[0] is not None:
            hover = f"capacity factor %{{x}}: %{{y:.1%}} {name}<extra></extra>"
            line = {"color": _COLOURS[number], "dash": "dot" if number == 3 else "solid"}
            figure.add_scatter(x=factors, y=values, name=name, line=line, mode="lines+markers", hovertemplate=hover)
    figure.add_hline(y=CLAIM, line={"color": _GREY, "width": 1, "dash": "dash"}, annotation_text="claimed: up to 30%")
    figure.update_xaxes(title="capacity factor", type="category")
    figure.update_yaxes(title="share", tickformat=".0%", rangemode="tozero")
    figure.update_layout(margin={"t": 70})
    first = wastes[0]
    low = (
        "The trace has no gates, so that low ones are not counted."
        if first.below is None
        else f"{h.percent(first.below)} of pairs have a gate below {first.gate_threshold:g} of their token's gates; "
        "in the wasted share they count as empty places of active experts, and are taken to be dropped first."
    )
    return plot(
        "waste",
        figure,
        f"{first.steps} steps of {first.tokens_per_step} tokens on one rank, all layers, at the model's own top k. "
        "Padding: empty places over places, of all experts or of those that have a pair in the step. Dropped: pairs "
        f"beyond their expert's places over all pairs. {low} The line is what others claim of activated experts, not "
        "a measurement.",
        height=400,
    )

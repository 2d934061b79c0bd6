"""HTML: what simulations of one or more scenarios say, side by side, as one page that needs no network."""

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from cost_models.units import GB, US, human_seconds
from sim.report import PARTS, Report
from sim.timeline import Timeline
from tuner import html_page as h
from tuner.cluster_svg import cluster_svg
from tuner.html_plot import figure_text, plot, write_page
from tuner.simulated import SimulatedScenario
from tuner.simulation_maps import load_maps, traffic_maps

_SCENARIO_COLOURS = ("#4a5561", "#0072b2", "#d55e00", "#00805e", "#8e4585", "#8a6d00")
_SCENARIO_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
_PART_COLOURS = {
    "attention": "#8e4585",
    "gate": "#8a6d00",
    "dispatch": "#5aa5d0",
    "experts": "#d55e00",
    "combine": "#0072b2",
    "other": "#6b7785",
}


def write_simulation_html(path: Path, scenarios: Sequence[SimulatedScenario]) -> None:
    """Write the page to `path`, whole or not at all; nearly all of it is plotly.js."""
    several = len(scenarios) > 1
    write_page(
        path,
        title=" against ".join(s.name for s in scenarios) if len(scenarios) < 4 else f"{len(scenarios)} scenarios",
        headline="".join(_headline(s, several=several) for s in scenarios),
        facts=_facts_of_all(scenarios),
        sections={
            "Where the time of a step goes": _breakdown(scenarios) + _stages(scenarios),
            "One MoE layer": _one_layer(scenarios),
            "Critical ranks": _critical_ranks(scenarios),
            "Load of ranks": load_maps(scenarios),
            "Traffic between ranks": traffic_maps(scenarios),
            "Memory": _memory(scenarios),
            "Clusters" if len(_clusters(scenarios)) > 1 else "Cluster": _pictures(scenarios),
        },
    )


def _facts_of_all(scenarios: Sequence[SimulatedScenario]) -> list[str]:
    """Each fact once; with the scenario's name where it is not one of all."""
    facts = dict.fromkeys(fact for s in scenarios for fact in s.facts)
    of_all = [fact for fact in facts if all(fact in s.facts for s in scenarios)]
    return of_all + [f"{s.name}: {fact}" for s in scenarios for fact in s.facts if fact not in of_all]


def _headline(scenario: SimulatedScenario, *, several: bool) -> str:
    report = scenario.report
    low_s, high_s = report.interval_s or (0.0, 0.0)
    ends = f"{human_seconds(low_s)} to {human_seconds(high_s)}"
    interval = f" ({ends} with all costs at the ends of their 90% intervals)" if low_s < high_s else ""
    lost = f" {h.percent(report.lost_share)} of the kept pairs are lost with their rank." if report.lost_share else ""
    fits = "" if report.memory.fits else " <strong>It does not fit into the memory of a rank.</strong>"
    return (
        f'<p class="verdict {"yes" if report.memory.fits else "no"}">'
        f"{f'<strong>{escape(scenario.name)}:</strong> a' if several else 'A'}"
        f" step takes {human_seconds(report.step_s)}{interval}; {report.tokens_per_s_per_rank:,.0f} tokens/s a rank. "
        f"An average rank has nothing to do for {h.percent(report.waiting_s / report.step_s)} of it.{lost}{fits}</p>"
    )


def _breakdown(scenarios: Sequence[SimulatedScenario]) -> str:
    parts = [part for part in _PART_COLOURS if any(part in s.report.breakdown_s for s in scenarios)] + ["waiting"]
    figure = go.Figure()
    for scenario, colour in zip(scenarios, _colours(scenarios), strict=True):
        seconds = {**scenario.report.breakdown_s, "waiting": scenario.report.waiting_s}
        figure.add_bar(
            y=parts,
            x=[1e3 * seconds.get(part, 0.0) for part in parts],
            name=figure_text(scenario.name),
            orientation="h",
            marker={"color": colour},
            text=[human_seconds(seconds.get(part, 0.0)) for part in parts],
            textposition="auto",
            hovertemplate=f"{figure_text(scenario.name)}<br>%{{y}}: %{{x:.3f}} ms<extra></extra>",
        )
    figure.update_layout(barmode="group", bargap=0.25, showlegend=len(scenarios) > 1)
    figure.update_xaxes(title="time a step, mean rank (ms)")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return plot(
        "breakdown",
        figure,
        "All layers together. Where computation and communication overlap, the parts add up to more than the step. "
        "<i>Waiting</i> is what neither stream fills.",
        height=120 + len(parts) * (14 + 20 * len(scenarios)),
    )


def _stages(scenarios: Sequence[SimulatedScenario]) -> str:
    stages = list(dict.fromkeys(stage for s in scenarios for stage in s.report.stage_s))
    rows = [
        (escape(stage), PARTS.get(stage, "other"), *(_stage(s.report, stage) for s in scenarios)) for stage in stages
    ]
    steps = (
        f"<strong>{human_seconds(s.report.step_s)}</strong><small>bound {human_seconds(s.bound.step_s)}</small>"
        for s in scenarios
    )
    rows.append(("step", "", *steps))
    names = [s.name for s in scenarios] if len(scenarios) > 1 else ["Time"]
    return h.table(("Stage", "Part", *names), rows, words=2) + h.paragraph(
        "Time of an average rank in a step. Below it, where it applies: how long a rank stands at a collective until "
        "the last one comes (it may have something else to do meanwhile), and the share that is priced beyond what was "
        "measured. The bound is the analytic one."
    )


def _stage(report: Report, stage: str) -> str:
    if stage not in report.stage_s:
        return "–"
    waits_s, beyond = report.waits_s.get(stage, 0.0), report.extrapolated.get(stage, 0.0)
    notes = [f"waits {human_seconds(waits_s)}"] if waits_s else []
    notes += [f"{beyond:.0%} beyond"] if beyond else []
    return human_seconds(report.stage_s[stage]) + (f"<small>{', '.join(notes)}</small>" if notes else "")


def _one_layer(scenarios: Sequence[SimulatedScenario]) -> str:
    """What the rank that waits least and the one that waits most do while a layer in the middle runs."""
    figure = make_subplots(
        rows=len(scenarios),
        shared_xaxes=True,
        vertical_spacing=0.25 / len(scenarios),
        subplot_titles=[figure_text(s.name) for s in scenarios] if len(scenarios) > 1 else None,
    )
    shown: set[str] = set()
    layers = []
    for number, scenario in enumerate(scenarios, 1):
        layer, bars = _layer_bars(scenario.timeline)
        layers.append(layer)
        for (part, lane), bar in sorted(bars.items()):
            figure.add_bar(
                y=bar["y"],
                x=bar["x"],
                base=bar["base"],
                customdata=bar["customdata"],
                name=part,
                legendgroup=part,
                showlegend=part not in shown and lane == 0,
                orientation="h",
                marker={
                    "color": _PART_COLOURS[part],
                    "line": {"color": "white", "width": 0.5},
                    "pattern": {"shape": "/" if lane else "", "fgcolor": "white", "size": 6, "solidity": 0.2},
                },
                hovertemplate="%{customdata}<extra></extra>",
                row=number,
                col=1,
            )
            shown.add(part)
        figure.update_yaxes(
            categoryorder="array", categoryarray=_bar_rows(scenario.timeline)[::-1], showgrid=False, row=number, col=1
        )
    figure.update_layout(barmode="overlay", bargap=0.15)
    figure.update_annotations(x=1, xanchor="right")  # the legend is on the left
    figure.update_xaxes(title="time since the layer began (us)", row=len(scenarios), col=1)
    numbers = ", ".join(map(str, dict.fromkeys(layers)))
    hatched = " The second microbatch is hatched." if any(s.timeline.program.lanes > 1 for s in scenarios) else ""
    return plot(
        "one-layer",
        figure,
        f"Layer {numbers}, in the middle of the model, in the first step: the rank with the least and the one with the "
        f"most idle time.{hatched} The whole step of every rank is in <code>timeline.json</code>.",
        height=90 + 175 * len(scenarios),
    )


def _shown_ranks(timeline: Timeline) -> list[int]:
    """The rank with the least idle time and the one with the most, of those that are there to the end."""
    idle_G = timeline.idle_G()
    there = np.flatnonzero(~np.isnan(timeline.end_OG[-1]))
    if not there.size:
        there = np.arange(timeline.ranks)
    return list(dict.fromkeys([int(there[idle_G[there].argmin()]), int(there[idle_G[there].argmax()])]))


def _bar_rows(timeline: Timeline) -> list[str]:
    """The rows of a layer's picture, top to bottom."""
    return [f"rank {rank} {stream}" for rank in _shown_ranks(timeline) for stream in ("computes", "sends")]


def _layer_bars(timeline: Timeline) -> tuple[int, dict[tuple[str, int], dict[str, list[Any]]]]:
    """A layer in the middle and what runs in its time, by part of the step and lane."""
    program = timeline.program
    ranks = _shown_ranks(timeline)
    moves = np.array([stage.exchange is not None for stage in program.stages])[program.stage_O]
    layers = np.unique(program.layer_O[moves] if moves.any() else program.layer_O)
    layer = int(layers[len(layers) // 2])
    start_OG, end_OG = timeline.start_OG[:, ranks], timeline.end_OG[:, ranks]
    within = program.layer_O == layer
    first_s, last_s = float(np.nanmin(start_OG[within])), float(np.nanmax(end_OG[within]))
    bars: dict[tuple[str, int], dict[str, list[Any]]] = {}
    for o, column in zip(*np.nonzero((end_OG > first_s) & (start_OG < last_s)), strict=True):
        start_s, end_s = max(float(start_OG[o, column]), first_s), min(float(end_OG[o, column]), last_s)
        name, lane = program.name_O[o], int(program.lane_O[o])
        bar = bars.setdefault((PARTS.get(name, "other"), lane), {"y": [], "x": [], "base": [], "customdata": []})
        bar["y"].append(f"rank {ranks[column]} {('computes', 'sends')[program.stream_O[o]]}")
        bar["x"].append((end_s - start_s) / US)
        bar["base"].append((start_s - first_s) / US)
        microbatch = f" of microbatch {'AB'[lane]}" if program.lanes > 1 else ""
        whole = human_seconds(float(end_OG[o, column] - start_OG[o, column]))
        bar["customdata"].append(f"{figure_text(name)}{microbatch}, layer {program.layer_O[o]}: {whole}")
    return layer, bars


def _critical_ranks(scenarios: Sequence[SimulatedScenario]) -> str:
    figure = go.Figure()
    commonest = []
    styles = zip(scenarios, _colours(scenarios), cycle(_SCENARIO_SYMBOLS), strict=False)
    for scenario, colour, symbol in styles:
        ranks = scenario.report.critical_rank_by_layer
        figure.add_scatter(
            x=list(range(len(ranks))),
            y=list(ranks),
            name=figure_text(scenario.name),
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 8, "opacity": 0.85},
            hovertemplate=f"{figure_text(scenario.name)}<br>layer %{{x}}: rank %{{y}}<extra></extra>",
        )
        if ranks:
            rank, layers = Counter(ranks).most_common(1)[0]
            of = f"{escape(scenario.name)}: rank" if len(scenarios) > 1 else "Rank"
            commonest.append(f"{of} {rank} in {layers} of {len(ranks)} layers")
    figure.update_layout(showlegend=len(scenarios) > 1)
    figure.update_xaxes(title="MoE layer", rangemode="tozero")
    most = max(s.cluster.ranks for s in scenarios)
    figure.update_yaxes(title="rank", range=[-0.03 * most - 0.5, 1.03 * most - 0.5], tickformat="d")
    sampled = " Where layers are sampled, several show what was found for one." if _sampled(scenarios) else ""
    return plot(
        "critical",
        figure,
        f"The rank that comes last to the layer's last exchange. Most often: {'; '.join(commonest)}.{sampled}",
        height=340,
    )


def _sampled(scenarios: Sequence[SimulatedScenario]) -> bool:
    return any(len(s.layers_L) < len(s.report.critical_rank_by_layer) for s in scenarios)


def _memory(scenarios: Sequence[SimulatedScenario]) -> str:
    rows = [
        (
            escape(s.name),
            *(
                f"{value / GB:.2f}"
                for value in (
                    memory.expert_bytes,
                    memory.other_weight_bytes,
                    memory.kv_cache_bytes,
                    memory.buffer_bytes,
                    memory.total_bytes,
                )
            ),
            "not known" if memory.capacity_bytes is None else f"{memory.capacity_bytes / GB:.2f}",
            "fits" if memory.fits else "<strong>does not fit</strong>",
        )
        for s in scenarios
        for memory in [s.report.memory]
    ]
    head = ("GB on the fullest rank", "Experts", "Other weights", "KV cache", "Buffers", "Sum", "Memory", "")
    return h.table(head, rows, words=1)


def _clusters(scenarios: Sequence[SimulatedScenario]) -> dict[str, str]:
    """Pictures by the names of the scenarios that run there."""
    names: dict[str, list[str]] = {}
    for scenario in scenarios:
        names.setdefault(cluster_svg(scenario.cluster), []).append(scenario.name)
    return {", ".join(named): picture for picture, named in names.items()}


def _pictures(scenarios: Sequence[SimulatedScenario]) -> str:
    pictures = _clusters(scenarios)
    return "".join(
        f"{f'<h3>{escape(names)}</h3>' if len(pictures) > 1 else ''}{_fitting(picture)}\n"
        for names, picture in pictures.items()
    )


def _fitting(picture: str) -> str:
    """As wide as the page at most."""
    return picture.replace("<svg ", '<svg style="max-width:100%;height:auto" ', 1)


def _colours(scenarios: Sequence[SimulatedScenario]) -> Iterator[str]:
    only = _SCENARIO_COLOURS[1:2]
    for number in range(len(scenarios)):
        yield (_SCENARIO_COLOURS if len(scenarios) > 1 else only)[number % len(_SCENARIO_COLOURS)]

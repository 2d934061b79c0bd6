"""HTML: a placement beside the one that runs now, as one page that needs no network."""

from html import escape
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from cost_models.units import human_seconds
from tuner import html_page as h
from tuner.html_plot import load_axis, log_load, plot, write_page
from tuner.placing.answer import Answer, Balance
from tuner.placing.gain import Gain

_BEFORE, _AFTER = "#d55e00", "#0072b2"
_LAYER_PX, _LEAST_PX, _MOST_PX = 12, 110, 520


def write_placement_html(path: Path, answer: Answer) -> None:
    """Write the page to `path`, whole or not at all; nearly all of it is plotly.js."""
    after = answer.after
    write_page(
        path,
        title=f"Placement of {after.experts} experts on {after.ranks} ranks",
        headline=f'<p class="verdict {"yes" if answer.worth_it else "no"}">{escape(_sentence(answer.verdict))}</p>',
        facts=_facts(answer),
        sections={
            "Loads of ranks": _falling_loads(answer) + _load_maps(answer),
            "Before and after": _figures(answer),
            "What was tried": _candidates(answer),
        },
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _facts(answer: Answer) -> list[str]:
    after = answer.after
    slots = f"{after.slots} slots, {after.slots_per_rank} a rank"
    layers = f"{after.layers} layer{'s' if after.layers > 1 else ''}"
    what = f"{layers} of {after.experts} experts in {slots}; placed by {answer.chosen.plan.algorithm}."
    return [what, *answer.facts, *map(_sentence, answer.notes)]


def _over_mean(loads_LG: NDArray[np.float64]) -> NDArray[np.float64]:
    """Loads over the mean of their layer, 1 where it has none."""
    mean_L1 = loads_LG.mean(axis=1, keepdims=True)
    return np.asarray(np.divide(loads_LG, mean_L1, out=np.ones(loads_LG.shape), where=mean_L1 > 0))


def _falling_loads(answer: Answer) -> str:
    """The busiest rank of every layer, the second, and so on: their loads, the mean over layers."""
    figure = go.Figure()
    for name, colour, loads_LG in zip(("now", "planned"), (_BEFORE, _AFTER), answer.rank_loads_LG, strict=True):
        falling_G = -np.sort(-_over_mean(loads_LG), axis=1).mean(axis=0)
        figure.add_scatter(
            x=np.arange(1, falling_G.size + 1),
            y=falling_G,
            name=name,
            mode="lines+markers",
            line={"color": colour},
            marker={"size": 5},
            hovertemplate=f"{name}, rank %{{x}} by load: %{{y:.3f}} times the mean<extra></extra>",
        )
    ranks = answer.after.ranks
    figure.update_xaxes(
        title="ranks of each layer by falling load",
        range=[1 - 0.02 * ranks, 1.02 * ranks],
        tick0=1,
        dtick=ceil(ranks / 8),
    )
    figure.update_yaxes(title="load over the mean", rangemode="tozero")
    traffic = "later traffic than was planned on" if answer.gain is not None else "the traffic that was planned on"
    counts = ""
    if answer.steps is None:
        counts = " A layer ends when its busiest rank does, so what counts is how high a line starts."
    return plot(
        "falling",
        figure,
        f"Rows of ranks in {traffic}, where replicas share their expert's evenly.{counts}",
        height=320,
    )


def _load_maps(answer: Answer) -> str:
    """Loads by layer and rank, before and after, on one scale."""
    maps = [_over_mean(loads_LG) for loads_LG in answer.rank_loads_LG]
    logs = [log_load(over_mean_LG) for over_mean_LG in maps]
    extent = max(0.16, *(float(np.abs(log_LG).max()) for log_LG in logs))
    layers, ranks = maps[0].shape
    plot_px = min(_MOST_PX, max(_LEAST_PX, _LAYER_PX * layers))
    figure = make_subplots(rows=1, cols=2, subplot_titles=["now", "planned"], horizontal_spacing=0.08)
    for column, (over_mean_LG, log_LG) in enumerate(zip(maps, logs, strict=True), 1):
        figure.add_heatmap(
            z=log_LG.astype(np.float32),
            customdata=over_mean_LG.astype(np.float32),
            coloraxis="coloraxis",
            hovertemplate="layer %{y}, rank %{x}: %{customdata:.3f} times the mean<extra></extra>",
            row=1,
            col=column,
        )
        figure.update_xaxes(title="rank", dtick=ceil(ranks / 8), showgrid=False, row=1, col=column)
        figure.update_yaxes(
            title="layer" if column == 1 else None,
            autorange="reversed",
            dtick=ceil(layers / 12),
            showgrid=False,
            row=1,
            col=column,
        )
    figure.update_layout(margin={"t": 40, "b": 120}, coloraxis=load_axis(extent, plot_px=plot_px))
    return plot(
        "loads",
        figure,
        "The same by layer and rank, over the mean of the layer; colours by its logarithm.",
        height=plot_px + 160,
    )


def _figures(answer: Answer) -> str:
    rows = [_balance_row("Balancedness, tokens", answer.tokens)]
    if answer.active is not None:
        rows.append(_balance_row("Balancedness, active experts", answer.active))
    if answer.gain is not None:
        rows.append(_balance_row("Balancedness, tokens that were planned on", answer.planned))
    steps = answer.steps
    if steps is not None:
        rows.append(("Step (ms)", *map(h.ms, (steps.before_s, steps.after_s, steps.random_s)), ""))
        names = dict.fromkeys(part for parts in steps.parts_s for part in parts)
        rows += [
            (f"of it {escape(part)}, the mean rank (ms)", *(h.ms(of.get(part, 0.0)) for of in steps.parts_s), "", "")
            for part in names
        ]
        busiest = [f"{active:.2f}" for active in steps.busiest_active]
        rows.append(("Active experts of the busiest rank", *busiest[:2], "", busiest[2]))
        for tier, where in (("scale_up", "inside nodes"), ("scale_out", "between nodes")):
            sent = [of.get(tier, 0.0) / 1e6 for of in steps.bytes_by_tier]
            if any(sent):
                rows.append((f"MB {where}, a step", *(f"{mb:,.1f}" for mb in sent), "", ""))
    figures = h.table(("", "Now", "Planned", "Random", "Best possible"), rows, words=1)
    return figures + h.paragraph(_cost_in_words(answer))


def _balance_row(name: str, balance: Balance) -> tuple[str, ...]:
    figures = (balance.before, balance.after, balance.random, balance.upper_bound)
    return (name, *(f"{figure:.4f}" for figure in figures))


def _cost_in_words(answer: Answer) -> str:
    said = [
        "Balancedness is the mean load of ranks over the largest, averaged over layers.",
        f"{h.percent(answer.chosen.plan.moved_share)} of the slots take an expert that is not on their rank now.",
    ]
    if answer.gain is not None:
        said.append(f"The gain in {answer.gain_of} is {_gain_in_words(answer.gain)}.")
    if answer.steps is not None:
        over_random = _gain_in_words(answer.steps.gain_over_random)
        said.append(f"Over a random placement it is {over_random}.")
        said.append(f"Moving the weights takes {human_seconds(answer.steps.migration_s)}.")
    return " ".join(said)


def _gain_in_words(gain: Gain) -> str:
    if gain.interval is None:
        return f"{h.percent(gain.mean)}, of one window"
    low, high = map(h.percent, gain.interval)
    return f"{h.percent(gain.mean)}, 90% interval {low} to {high} over {gain.windows} windows"


def _candidates(answer: Answer) -> str:
    by_steps, by_active = answer.steps is not None, answer.active is not None
    head = ["Algorithm", "Planning (ms)", "Balancedness, tokens"]
    head += ["Active experts"] * by_active + ["Step (ms)"] * by_steps + ["Slots moved"]
    rows = []
    for candidate in answer.candidates:
        chosen = " <small>chosen</small>" if candidate is answer.chosen else ""
        row = [escape(candidate.plan.algorithm) + chosen, h.ms(candidate.plan.plan_s), f"{candidate.tokens:.4f}"]
        row += [f"{candidate.active:.4f}"] if candidate.active is not None else []
        row += [h.ms(candidate.step_s)] if candidate.step_s is not None else []
        rows.append([*row, h.percent(candidate.plan.moved_share)])
    by = "On the requests that choose between them, which come after those they were planned on and before those that "
    return h.table(head, rows, words=1) + (h.paragraph(f"{by}judge the chosen one.") if by_steps else "")

"""HTML: a study and its validation as one page that needs neither a server nor a network.

Text is escaped where a piece of HTML is made, in figures too, where plotly reads tags. Colours and
symbols: one a kind of policy in the front, one a role wherever runs are compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from cost_models.profile import Profile
from sim.report import Report
from traces.stats import TraceStats
from tuner import html_page as h
from tuner.html_plot import figure_text, load_axis, log_load, plot, write_page
from tuner.html_quality import KEPT_IN_SUMMARY, LOST_IN_SUMMARY, Quality
from tuner.study import StudyResult, Trial

if TYPE_CHECKING:  # loads torch, which a page needs nothing of
    from tuner.validate import ValidatedRun, Validation

_POLICY_COLOURS = ("#0072b2", "#d55e00", "#00805e", "#8e4585", "#8a6d00", "#4fa3d1", "#b03a48", "#5f6b76")
_POLICY_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross")
_LEGEND = 8  # kinds of policy with a colour of their own; the others share the last one
_ROLE_COLOURS = {"baseline": "#1f2933", "winner": "#0072b2", "random": "#6b7785"}
_BAR_COLOURS = (("#b3bac2", "#4a5561"), ("#8fc1e3", "#0072b2"))  # predicted and measured, of baseline and winner


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportPage:
    """What the page shows.

    `scenario`: lines that describe it. `validation`: None if nothing was measured. `loads_LE`: token counts of the
    trace as recorded. `rank_rows_LG`: the rows that each rank computes (`sim.replay.rows_by_rank`), of the baseline
    and of the winner it is compared with; the keys are names of validated runs, or without a validation `baseline`
    and the description of a trial's config. `profile`: None if costs come from a datasheet. `baseline`: its report
    in the study, whose first trial it is.
    """

    title: str
    scenario: tuple[str, ...]
    trace: TraceStats
    study: StudyResult
    validation: "Validation | None"
    loads_LE: NDArray[np.int64]
    rank_rows_LG: Mapping[str, NDArray[np.int64]]
    profile: Profile | None
    baseline: Report


def write_html(path: Path, page: ReportPage) -> None:
    """Write the page to `path`, whole or not at all; about 5 MB, nearly all of it plotly.js."""
    sections = {
        "Configurations": _configurations(page),
        "Step time against quality": _front(page),
        "Predicted against measured": _accuracy(page.validation),
        "Where the time of a step goes": _stages(page),
        "Load of experts and ranks": _expert_loads(page.loads_LE) + _rank_loads(page.rank_rows_LG),
        "Trace": _trace(page.trace),
        "Calibration": _calibration(page.profile, page.baseline.costs),
        "What these numbers are, and their limits": _limits(page),
    }
    write_page(path, title=page.title, headline=_headline(page), facts=page.scenario, sections=sections)


def _headline(page: ReportPage) -> str:
    if page.validation is None:
        return f'<p class="verdict">Not measured yet. {_prediction(page.study)}</p>'
    v = page.validation
    accuracy = (
        f"Over {len(v.runs)} configs, predicted step times are {h.percent(v.mape)} off the measured ones on average "
        f"and rank them with a Spearman correlation of {h.number(v.spearman, '.2f')}. "
    )
    verdict = escape(v.verdict[:1].upper() + v.verdict[1:])
    mark = "yes" if v.confirmed else "no"
    return f'<p class="verdict {mark}">{verdict}.</p>' + h.paragraph(accuracy + _prediction(page.study))


def _prediction(study: StudyResult) -> str:
    baseline, quality = study.trials[0], Quality.of(study)
    found = f"Of {len(study.trials)} trials, {len(study.front)} are on the front of step time against {quality.name}. "
    least = (1 + LOST_IN_SUMMARY) * baseline.quality if study.by_loss else KEPT_IN_SUMMARY
    keeping = [trial for trial in study.front if trial.quality >= least]
    if not keeping:
        return found
    speedup = baseline.step_s / keeping[0].step_s
    return found + (
        f"The fastest {quality.in_summary} is predicted at {speedup:.2f} times "
        f"the baseline's speed: {escape(keeping[0].config.describe())}."
    )


def _configurations(page: ReportPage) -> str:
    if page.validation is None:
        return _predicted_table(page.study)
    baseline = page.validation.runs[0]
    named = (
        "the loss that they add at most to the baseline's, each over that, in the study"
        if page.study.by_loss
        else "the gate mass that they keep at least in the study"
    )
    rows = [
        (
            _badge(number, run.role) + f'<span class="name">{escape(run.name)}</span>',
            h.lines(run.role, run.config),
            h.ms(run.predicted_step_s),
            h.ms(run.measured_step_s),
            f"{run.speedup_predicted:.2f}×",
            _speedup(run),
            h.percent(run.gate_mass),
            f"{run.experts_per_token:.2f}",
            "–" if run is baseline else h.interval(h.number(run.loss_delta, "+z.3f"), run.loss_delta_ci, "+z.3f"),
        )
        for number, run in enumerate(page.validation.runs, 1)
    ]
    head = (
        "Name",
        "What it is",
        "Step predicted, ms",
        "Step measured, ms",
        "Speed-up predicted",
        "Speed-up measured",
        "Gate mass kept",
        "Experts a token",
        "Loss change, nats a byte",
    )
    return h.table(head, rows, words=2) + h.paragraph(
        f"Speed-ups and loss changes are against the baseline, whose held-out loss is {baseline.loss:.3f} nats a byte. "
        "Brackets hold 95% intervals; a measured speed-up is bold where its whole interval is above 1. Winners are "
        f"named by {named}; random configs show whether predictions "
        "also hold where nothing was optimised." + h.NOTATION
    )


def _speedup(run: "ValidatedRun") -> str:
    if run.role == "baseline":
        return "1.00×"
    value = f"{run.speedup_measured:.2f}×"
    return h.interval(f"<strong>{value}</strong>" if run.speedup_ci[0] > 1 else value, run.speedup_ci, ".2f")


def _predicted_table(study: StudyResult) -> str:
    baseline, quality = study.trials[0], Quality.of(study)
    named = [("baseline", "baseline", baseline)]
    named += [(f"trial {trial.number}", "front", trial) for trial in study.front if trial is not baseline]
    rows = [
        (
            escape(name),
            h.lines(role, trial.config.describe()),
            h.ms(trial.step_s),
            f"{baseline.step_s / trial.step_s:.2f}×",
            quality.shown(trial),
            h.number(trial.report["experts_per_token"], ".2f"),
        )
        for name, role, trial in named
    ]
    head = ("Name", "What it is", "Step predicted, ms", "Speed-up predicted", quality.column, "Experts a token")
    return h.table(head, rows, words=2) + h.paragraph(
        "The baseline and the front, fastest first. Nothing here was measured; "
        "<code>moeroute validate</code> runs the best of them." + h.NOTATION
    )


def _front(page: ReportPage) -> str:
    study, baseline, quality = page.study, page.study.trials[0], Quality.of(page.study)
    on_front = {trial.number for trial in study.front}
    figure = go.Figure()
    styles = zip(cycle(_POLICY_COLOURS), cycle(_POLICY_SYMBOLS), strict=False)
    for (kind, trials), (colour, symbol) in zip(_by_kind(study).items(), styles, strict=False):
        figure.add_scatter(
            **_points(trials, quality),
            name=figure_text(kind),
            mode="markers",
            marker={
                "color": colour,
                "symbol": symbol,
                "size": [10 if trial.number in on_front else 7 for trial in trials],
                "opacity": [1.0 if trial.number in on_front else 0.6 for trial in trials],
            },
        )
    figure.add_scatter(
        x=[1e3 * trial.step_s for trial in study.front],
        y=[quality.value(trial) for trial in study.front],
        name="front",
        mode="lines",
        line={"shape": "hv", "color": "#1f2933", "width": 1.5},
        hoverinfo="skip",
    )
    figure.add_scatter(
        **_points([baseline], quality),
        name="baseline",
        mode="markers",
        marker={"symbol": "star", "size": 17, "color": "#1f2933", "line": {"color": "white", "width": 1}},
    )
    numbers = {} if page.validation is None else {run.config: n for n, run in enumerate(page.validation.runs, 1)}
    for trial in study.front:
        number = numbers.get(trial.config.describe())
        if number is not None and trial is not baseline:
            x_ms, label = 1e3 * trial.step_s, str(number)
            figure.add_annotation(x=x_ms, y=quality.value(trial), text=label, ax=-16, ay=-18, arrowwidth=1, arrowhead=0)
    figure.update_xaxes(title="predicted step time (ms)")
    figure.update_yaxes(title=quality.column.lower(), tickformat=quality.tick_format)
    caption = (
        f"Every trial of the study: further left is faster, {quality.better}. The line joins "
        "the trials that no other beats on both. Colours tell what a policy is made of; pointing at a trial tells all."
    )
    return plot("front", figure, caption + (" Numbers are those of the table." if numbers else ""), height=500)


def _by_kind(study: StudyResult) -> dict[str, list[Trial]]:
    """Trials by the names of their policy's parts, the kinds first that fill the front; the last ones as others."""
    kinds: dict[str, list[Trial]] = {}
    for trial in study.trials:
        kinds.setdefault(" + ".join(part.name for part in trial.config.routing_policy().parts), []).append(trial)
    on_front = {trial.number for trial in study.front}
    ranked = sorted(kinds, key=lambda kind: (-sum(t.number in on_front for t in kinds[kind]), -len(kinds[kind]), kind))
    shown = ranked if len(ranked) <= _LEGEND else ranked[: _LEGEND - 1]
    others = [trial for kind in ranked[len(shown) :] for trial in kinds[kind]]
    return {kind: kinds[kind] for kind in shown} | ({f"{len(ranked) - len(shown)} others": others} if others else {})


def _points(trials: Sequence[Trial], quality: Quality) -> dict[str, Any]:
    return {
        "x": [1e3 * trial.step_s for trial in trials],
        "y": [quality.value(trial) for trial in trials],
        "text": [f"trial {trial.number}<br>{figure_text(trial.config.describe())}" for trial in trials],
        "hovertemplate": f"%{{text}}<br>%{{x:.3f}} ms, {quality.hover}<extra></extra>",
    }


def _accuracy(validation: "Validation | None") -> str:
    if validation is None:
        return h.paragraph("Nothing was measured yet; <code>moeroute validate</code> does it.")
    numbered = list(enumerate(validation.runs, 1))
    times_ms = [1e3 * time_s for run in validation.runs for time_s in (run.predicted_step_s, run.measured_step_s)]
    ends_ms = [0.9 * min(times_ms), 1.05 * max(times_ms)]
    figure = go.Figure()
    figure.add_scatter(
        x=ends_ms,
        y=ends_ms,
        name="predicted = measured",
        mode="lines",
        line={"color": "#6b7785", "dash": "dash", "width": 1.5},
        hoverinfo="skip",
    )
    for role, colour in _ROLE_COLOURS.items():
        runs = [(number, run) for number, run in numbered if run.role == role]
        figure.add_scatter(
            x=[1e3 * run.predicted_step_s for _, run in runs],
            y=[1e3 * run.measured_step_s for _, run in runs],
            name=role,
            mode="markers+text",
            text=[str(number) for number, _ in runs],
            textfont={"color": "white", "size": 11},
            marker={"color": colour, "size": 18, "line": {"color": "white", "width": 1}},
            customdata=[f"{figure_text(run.name)}<br>{figure_text(run.config)}" for _, run in runs],
            hovertemplate="%{customdata}<br>predicted %{x:.3f} ms, measured %{y:.3f} ms<extra></extra>",
        )
    figure.update_xaxes(title="predicted step time (ms)")
    figure.update_yaxes(title="measured step time (ms)")
    caption = (
        f"Mean absolute error {h.percent(validation.mape)}, Spearman correlation "
        f"{h.number(validation.spearman, '.2f')}, over {len(numbered)} configs. Numbers are those of the table; "
        "points above the line took longer than predicted."
    )
    return plot("accuracy", figure, caption, height=460)


def _stages(page: ReportPage) -> str:
    stages_s = _compared_stages(page)
    names = list(dict.fromkeys(stage for seconds in stages_s.values() for stage in seconds))
    colours = [colour for pair in _BAR_COLOURS for colour in (pair if page.validation else pair[1:])]
    figure = go.Figure()
    for (label, seconds), colour in zip(stages_s.items(), cycle(colours), strict=False):
        figure.add_bar(
            y=names,
            x=[1e3 * seconds[name] if name in seconds else None for name in names],
            name=figure_text(label),
            orientation="h",
            marker={"color": colour},
            hovertemplate=f"{figure_text(label)}<br>%{{y}}: %{{x:.3f}} ms<extra></extra>",
        )
    figure.update_layout(barmode="group", bargap=0.25)
    figure.update_xaxes(title="time a step (ms)")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    caption = (
        "All layers together. A predicted stage is the mean over ranks, and what a rank waits for others stands apart "
        "as <i>waiting</i>."
    )
    if page.validation is not None:
        caption += (
            " A measured stage is the first rank's; its waiting is inside <i>counts</i>, <i>dispatch</i> and "
            "<i>return</i>, where ranks meet."
        )
    return plot("stages", figure, caption, height=150 + len(names) * (10 + 9 * len(stages_s)))


def _compared_stages(page: ReportPage) -> dict[str, dict[str, float]]:
    """Seconds by stage of the baseline and the winner, by the label of their bars."""
    if page.validation is not None:
        stages_s = {}
        for run in page.validation.runs:
            if run.name in page.rank_rows_LG:
                stages_s[f"{run.name}, predicted"] = _with_waiting(run.stages_predicted_s, run.predicted_step_s)
                stages_s[f"{run.name}, measured"] = run.stages_measured_s
        return stages_s
    stages_s = {"baseline": _with_waiting(page.baseline.stage_s, page.baseline.step_s)}
    for trial in page.study.trials[1:]:
        if trial.config.describe() in page.rank_rows_LG:
            stages_s[trial.config.describe()] = _with_waiting(trial.report["stage_s"], trial.step_s)
    return stages_s


def _with_waiting(stages_s: Mapping[str, float], step_s: float) -> dict[str, float]:
    return {**stages_s, "waiting": max(0.0, step_s - sum(stages_s.values()))}


def _expert_loads(loads_LE: NDArray[np.int64]) -> str:
    ratio_LE = _over_mean(loads_LE)
    layer, expert = (int(index) for index in np.unravel_index(ratio_LE.argmax(), ratio_LE.shape))
    caption = (
        "Tokens of each expert over the mean of its layer, as the trace was recorded: 1 is an even load, colours are "
        f"on a logarithmic scale. The busiest is expert {expert} of layer {layer}, with {ratio_LE.max():.2f} times the "
        "mean."
    )
    return "<h3>Experts</h3>" + _heat_maps({"": ratio_LE}, "expert", caption)


def _rank_loads(rank_rows_LG: Mapping[str, NDArray[np.int64]]) -> str:
    ratios_LG = {name: _over_mean(rows_LG) for name, rows_LG in rank_rows_LG.items()}
    busiest = ", ".join(
        f"{escape(name)} {ratios_LG[name].max(axis=1).mean():.2f} ({rows_LG.sum():,} rows in all)"
        for name, rows_LG in rank_rows_LG.items()
    )
    caption = (
        "Rows that each rank computes over the mean of the ranks in that layer. The busiest rank of a layer over the "
        f"mean, averaged over layers: {busiest}."
    )
    return "<h3>Ranks</h3>" + _heat_maps(ratios_LG, "rank", caption)


def _over_mean(loads_LX: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each load over the mean of its layer; 0 in a layer without any."""
    return np.asarray(loads_LX / np.maximum(loads_LX.mean(axis=1, keepdims=True), 1e-9), dtype=np.float64)


def _heat_maps(ratios_LX: Mapping[str, NDArray[np.float64]], columns: str, caption: str) -> str:
    """Ratios to 1 by layer and `columns`, side by side on one diverging logarithmic scale."""
    layers = max(ratio_LX.shape[0] for ratio_LX in ratios_LX.values())
    plot_px = min(600, max(120, 34 * layers))
    logs_LX = [log_load(ratio_LX) for ratio_LX in ratios_LX.values()]
    extent = max(0.16, *(float(np.abs(log_LX).max()) for log_LX in logs_LX))
    figure = make_subplots(
        cols=len(ratios_LX), subplot_titles=[figure_text(name) for name in ratios_LX], shared_yaxes=True
    )
    for index, (ratio_LX, log_LX) in enumerate(zip(ratios_LX.values(), logs_LX, strict=True), 1):
        gap_px = 1 if ratio_LX.shape[1] <= 64 else 0  # narrow cells would be mostly gap
        figure.add_heatmap(
            z=log_LX,
            text=[[f"{ratio:.2f}" for ratio in ratio_X] for ratio_X in ratio_LX],
            texttemplate="%{text}" if ratio_LX.shape[1] <= 4 else "",
            textfont={"color": "#1f2933"},
            coloraxis="coloraxis",
            xgap=gap_px,
            ygap=gap_px,
            hovertemplate=f"layer %{{y}}, {columns} %{{x}}: %{{text}} times the mean<extra></extra>",
            row=1,
            col=index,
        )
        figure.update_xaxes(title=columns, dtick=ceil(ratio_LX.shape[1] / 16), showgrid=False, ticks="", col=index)
    figure.update_yaxes(dtick=ceil(layers / 16), autorange="reversed", showgrid=False, ticks="")
    figure.update_yaxes(title="layer", col=1)
    figure.update_layout(
        margin={"t": 30 if any(ratios_LX) else 8, "b": 120},
        coloraxis=load_axis(extent, plot_px=plot_px),
    )
    return plot(f"{columns}-loads", figure, caption, height=plot_px + 140)


def _trace(stats: TraceStats) -> str:
    reuse = "–" if stats.reuse_L is None else h.percent(float(np.mean(stats.reuse_L)))
    rows = [
        ("All", h.mean_and_range(stats.max_over_mean_L), h.mean_and_range(stats.gini_L), reuse),
        *(
            (f"Domain {escape(name)}", f"{balance.max_over_mean:.2f}", f"{balance.gini:.2f}", "")
            for name, balance in stats.by_domain.items()
        ),
        (
            "Uniform random routing",
            f"{stats.uniform.max_over_mean:.2f}",
            f"{stats.uniform.gini:.2f}",
            h.percent(stats.uniform_reuse),
        ),
    ]
    return h.table(("Tokens", "Load, max over mean", "Load, Gini", "Reuse"), rows, words=1) + h.paragraph(
        f"{stats.tokens:,} tokens of {stats.requests:,} requests, {stats.top_k} experts a token. Means over layers, in "
        "brackets the lowest and highest layer. Max over mean is 1 and Gini 0 for an even load. Reuse is the share "
        "of a token's experts that the token before it also used. Uniform random routing of as many tokens shows "
        "what chance alone gives."
    )


def _calibration(profile: Profile | None, costs: str) -> str:
    if profile is None:
        return h.paragraph(f"None: costs are {escape(costs)}, which nothing has checked on this hardware.")
    rows = [
        (escape(name), h.percent(error.mape), h.percent(error.median_ape), str(error.cases))
        for name, error in sorted(profile.errors.items())
    ]
    before_s, after_s = profile.probe_s
    ranks = "1 rank" if profile.ranks == 1 else f"{profile.ranks} ranks"
    head = ("Operation", "Held-out error, mean", "Held-out error, median", "Cases")
    return h.table(head, rows, words=1) + h.paragraph(
        f"Measured on {escape(profile.device_name)}, {ranks}. Errors are absolute, as shares of the measured time, at "
        f"sizes that were not fitted; {h.percent(profile.mape)} over all cases. One fixed probe took "
        f"{after_s / before_s:.2f} times as long after the calibration as before it."
    )


def _limits(page: ReportPage) -> str:
    predictions = (
        f"Predictions replay the recorded trace ({escape(page.baseline.fidelity)} simulation); their costs are "
        f"{escape(page.baseline.costs)}."
    )
    v = page.validation
    return f"<ul>{h.LIMITS}<li>{predictions}</li>{'' if v is None else _limits_of_measurement(v)}</ul>"


def _limits_of_measurement(validation: "Validation") -> str:
    v = validation
    drift = "" if v.drift is None else f" A fixed probe took {v.drift:.2f} times what it took at calibration."
    return (
        f"<li>The measurement ran {len(v.runs)} configs in turn, {v.rounds} rounds on {v.ranks} ranks "
        f"({escape(v.device)}). The host's load average was {v.load_average:.1f}.{drift} Intervals are over those "
        "rounds: they say nothing about another machine, model or traffic.</li>"
        "<li>The table is about a third part of the trace, which the study never saw, so that its predictions differ a "
        "little from those of the front for the same config.</li>"
        f"<li>{_proxy(v)} another model may lose more or less.</li>"
    )


def _proxy(v: "Validation") -> str:
    """How well what the study went by orders the configs, and whose loss it is."""
    if v.study_loss_against_loss is not None:
        return (
            "The study's loss orders these configs as the loss on text that no part was chosen by does with a Spearman "
            f"correlation of {h.number(v.study_loss_against_loss, '.2f')}, where 1 is the same order. The loss is the "
            "scenario's own model's;"
        )
    assert v.gate_mass_against_loss is not None  # a study goes by one or the other
    return (
        "Gate mass orders these configs as held-out loss does with a Spearman correlation of "
        f"{h.number(v.gate_mass_against_loss, '.2f')}, where 1 is the same order. The loss is the reference model's;"
    )


def _badge(number: int, role: str) -> str:
    return f'<b class="badge" style="background:{_ROLE_COLOURS[role]}">{number}</b> '

"""HTML: what a profile was fitted to, what it says, and how far off it is where it has not looked."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from cost_models.kernel_profile import FittedKernel, KernelProfile, Series
from cost_models.profile import Point, Profile
from cost_models.units import US
from tuner import html_page as h
from tuner.html_plot import figure_text, plot, write_page

_COLOURS = ("#0072b2", "#d55e00", "#00805e", "#8e4585")
_GREY = "#6b7785"


def write_kernel_profile_html(path: Path, profile: KernelProfile) -> None:
    """Write the page of measured kernels: a table of errors, then for each kernel its fit and its residuals."""
    versions = sorted({f"{kernel.framework} {kernel.version}" for kernel in profile.kernels})
    rows = sum(kernel.rows for kernel in profile.kernels)
    write_page(
        path,
        title=f"{profile.gpu}: kernels of {profile.framework}",
        headline=h.paragraph(
            f"{len(profile.kernels)} fits to {rows:,} timings. Errors are those of shapes that the fit had not seen."
        ),
        facts=(f"Measurements: {profile.source}.", f"Versions: {', '.join(versions)}."),
        sections={
            "Errors on shapes held out": _errors(profile.kernels),
            **{
                f"{kernel.op}, {kernel.dtype} ({kernel.table})": _kernel(index, kernel)
                for index, kernel in enumerate(profile.kernels)
            },
        },
    )


def write_profile_html(path: Path, profile: Profile) -> None:
    """Write the page of this machine's calibration: a table of errors, then each operation's fit and residuals."""
    rows = [
        (escape(name), h.percent(error.mape), h.percent(error.median_ape), str(error.cases))
        for name, error in profile.errors.items()
    ]
    write_page(
        path,
        title=f"Calibration of {profile.device_name}",
        headline=h.paragraph(f"{profile.ranks} ranks; {h.percent(profile.mape)} off on average at sizes not fitted."),
        facts=(f"Load average {profile.load_average:.1f}.",),
        sections={
            "Errors on sizes held out": h.table(("Operation", "Mean", "Median", "Sizes"), rows, words=1),
            **{name: _points(index, points) for index, (name, points) in enumerate(profile.points.items())},
        },
    )


def _errors(kernels: Sequence[FittedKernel]) -> str:
    rows = [
        (
            h.lines(f"{kernel.op} {kernel.dtype}", kernel.table),
            error.holdout,
            f"{error.rows:,}",
            h.percent(error.median_ape),
            h.percent(error.mape),
            h.percent(error.p90_ape),
            h.percent(error.coverage90),
            "–" if error.mape_le8_tokens is None else h.percent(error.mape_le8_tokens),
            h.percent(error.physics_median_ape),
            h.percent(error.roofline_median_ape),
        )
        for kernel in kernels
        for error in kernel.errors
    ]
    head = (
        "Kernel",
        "Held out",
        "Rows",
        "Median",
        "Mean",
        "90th percentile",
        "In the 90% interval",
        "Mean, at most 8 tokens",
        "Median of physics alone",
        "Median of the roofline",
    )
    return h.table(head, rows, words=2) + h.paragraph(
        "Absolute errors as shares of the measured time. Physics alone is the fitted physical model without what was "
        "learned on top; the roofline is the datasheet's bound."
    )


def _kernel(index: int, kernel: FittedKernel) -> str:
    figure = make_subplots(rows=1, cols=2, column_widths=[0.55, 0.45], horizontal_spacing=0.12)
    for number, series in enumerate(kernel.sample.series):
        for trace in _curves(series, _COLOURS[number % len(_COLOURS)], f"shape {number + 1}", kernel.sample.size):
            figure.add_trace(trace, row=1, col=1)
    _residuals(
        figure, kernel.sample.measured_us, kernel.sample.predicted_us, ["held out"] * len(kernel.sample.measured_us)
    )
    figure.update_xaxes(type="log", dtick=1, title=kernel.sample.size, row=1, col=1)
    figure.update_yaxes(type="log", dtick=1, title="time, us", row=1, col=1)
    shapes = "; ".join(f"{number}: {escape(series.label)}" for number, series in enumerate(kernel.sample.series, 1))
    return plot(
        f"kernel-{index}",
        figure,
        "Left: some shapes as measured (points), as fitted with all rows (line), and as predicted while their fold was "
        f"held out (dots). {shapes}. Right: the residuals of {len(kernel.sample.measured_us)} rows "
        "drawn from all that were held out.",
        height=420,
    )


def _curves(series: Series, colour: str, name: str, size: str) -> list[go.Scatter]:
    hover = figure_text(series.label) + f"<br>{figure_text(size)} %{{x}}: %{{y:.4g}} us"
    shared = {"x": series.sizes, "legendgroup": name, "hovertemplate": hover}
    return [
        go.Scatter(
            y=series.measured_us,
            mode="markers",
            marker={"color": colour, "size": 7},
            name=name,
            **shared,
        ),
        go.Scatter(y=series.fitted_us, mode="lines", line={"color": colour}, showlegend=False, **shared),
        go.Scatter(
            y=series.held_out_us,
            mode="lines",
            line={"color": colour, "dash": "dot"},
            showlegend=False,
            **shared,
        ),
    ]


def _residuals(
    figure: go.Figure, measured_us: Sequence[float], predicted_us: Sequence[float], text: Sequence[str]
) -> None:
    figure.add_trace(
        go.Scatter(
            x=list(measured_us),
            y=[p / m - 1 for p, m in zip(predicted_us, measured_us, strict=True)],
            text=[figure_text(line) for line in text],
            mode="markers",
            marker={"color": _GREY, "size": 5, "opacity": 0.7},
            showlegend=False,
            hovertemplate="%{text}: %{x:.4g} us, %{y:+.1%}",
        ),
        row=1,
        col=2,
    )
    figure.add_hline(y=0, line={"color": "#1f2933", "width": 1}, row=1, col=2)
    figure.update_xaxes(type="log", dtick=1, title="measured, us", row=1, col=2)
    figure.update_yaxes(tickformat="+.0%", title="predicted / measured − 1", row=1, col=2)


def _points(index: int, points: Sequence[Point]) -> str:
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.12)
    for held_out, name in ((False, "fitted"), (True, "held out")):
        some = [point for point in points if point.held_out is held_out]
        figure.add_trace(
            go.Scatter(
                x=[point.measured_s / US for point in some],
                y=[point.predicted_s / US for point in some],
                text=[figure_text(point.label) for point in some],
                mode="markers",
                marker={"color": _COLOURS[held_out], "size": 8},
                name=name,
                hovertemplate="%{text}: measured %{x:.4g} us, predicted %{y:.4g} us",
            ),
            row=1,
            col=1,
        )
    ends = [min(p.measured_s for p in points) / US, max(p.measured_s for p in points) / US]
    figure.add_trace(go.Scatter(x=ends, y=ends, mode="lines", line={"color": _GREY}, showlegend=False), row=1, col=1)
    held_out_points = [point for point in points if point.held_out]
    _residuals(
        figure,
        [point.measured_s / US for point in held_out_points],
        [point.predicted_s / US for point in held_out_points],
        [point.label for point in held_out_points],
    )
    figure.update_xaxes(type="log", dtick=1, title="measured, us", row=1, col=1)
    figure.update_yaxes(type="log", dtick=1, title="predicted, us", row=1, col=1)
    caption = "Left: predicted against measured; on the line they are equal. Right: the residuals of what was held out."
    return plot(f"operation-{index}", figure, caption, height=380)

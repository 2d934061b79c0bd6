"""Plots and the page that holds them: one look for every report, one file that needs no network."""

from collections.abc import Mapping, Sequence
from html import escape
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from plotly import graph_objects as go
from plotly.offline import get_plotlyjs

from traces.files import write_text
from tuner import html_page as h


def write_page(path: Path, *, title: str, headline: str, facts: Sequence[str], sections: Mapping[str, str]) -> None:
    """Write a page to `path`, whole or not at all. `headline` and the bodies of `sections` are HTML, the rest text."""
    document = h.PAGE.substitute(
        title=escape(title),
        plotly=get_plotlyjs(),
        style=h.STYLE,
        headline=headline,
        scenario="".join(f"<li>{escape(fact)}</li>" for fact in facts),
        sections="".join(f"<section><h2>{escape(name)}</h2>{body}</section>\n" for name, body in sections.items()),
    )
    write_text(path, document)


# Loads over their mean, whose logarithm a heat map shows; all of its colours carry dark text.
_LOAD_COLOURS = ["#5aa5d0", "#a9d0e5", "#f7f7f7", "#f6b99d", "#e0745c"]
_LOAD_TICKS = (1 / 8, 1 / 4, 1 / 2, 2 / 3, 4 / 5, 9 / 10, 1, 10 / 9, 5 / 4, 3 / 2, 2, 4, 8)


def log_load(over_mean_X: NDArray[np.float64]) -> NDArray[np.float64]:
    """The logarithm (base 2) of loads over their mean, within what the colours can show."""
    return np.asarray(np.log2(np.clip(over_mean_X, _LOAD_TICKS[0], _LOAD_TICKS[-1])))


def load_axis(extent: float, *, plot_px: float) -> dict[str, Any]:
    """The colour axis of such heat maps from -`extent` to `extent`, its bar below a plot `plot_px` high."""
    ticks = [tick for tick in _LOAD_TICKS if tick == 1 or extent / 4 <= abs(log2(tick)) <= extent + 1e-9]
    return {
        "colorscale": _LOAD_COLOURS,
        "cmin": -extent,
        "cmax": extent,
        "colorbar": {
            "orientation": "h",
            "y": -56 / plot_px,
            "yanchor": "top",
            "thickness": 12,
            "len": 0.8,
            "title": {"text": "load over the mean of the layer", "side": "bottom"},
            "tickvals": [log2(tick) for tick in ticks],
            "ticktext": [f"{round(tick, 2):g}" for tick in ticks],
        },
    }


def plot(name: str, figure: go.Figure, caption: str, *, height: int) -> str:
    """A figure as HTML with its caption (HTML too)."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": "#1f2933"},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        hoverlabel={"align": "left"},
        dragmode=False,  # a finger that scrolls the page must not zoom a plot
    )
    figure.update_layout(
        margin={"l": 10, "r": 10, "t": figure.layout.margin.t or 40, "b": figure.layout.margin.b or 50}
    )
    figure.update_xaxes(automargin=True, linecolor="#9aa5b1", zeroline=False)
    figure.update_yaxes(automargin=True, linecolor="#9aa5b1", zeroline=False)
    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"plot-{name}",
        config={"displaylogo": False, "responsive": True},
        default_height=f"{height}px",
    )
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>\n"


def figure_text(text: str) -> str:
    """Escaped for plotly, which knows tags but not `&quot;`."""
    return escape(text, quote=False)

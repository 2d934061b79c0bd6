"""Plots and the page that holds them: one look for every report, one file that needs no network."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

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

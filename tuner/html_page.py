"""The page around the report's figures: its frame, its style, its fixed texts, and tables and numbers as HTML."""

from collections.abc import Iterable, Sequence
from html import escape
from math import isfinite
from string import Template

import numpy as np


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int) -> str:
    """A table whose first `words` columns are words, the others numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=words' if column < words else ''}>{cell}</{tag}>" for column, cell in enumerate(row)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    heads = cells("th", [escape(name) for name in head])
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>\n'


def paragraph(html: str) -> str:
    """A paragraph of HTML."""
    return f"<p>{html}</p>\n"


def lines(first: str, second: str) -> str:
    """Two lines of plain text, the second small."""
    return f"{escape(first)}<small>{escape(second)}</small>"


def interval(value: str, ends: tuple[float, float], format_spec: str) -> str:
    """A value with its interval below it."""
    low, high = (number(end, format_spec) for end in ends)
    return f"{value}<small>[{low}, {high}]</small>"


def mean_and_range(value_L: Sequence[float]) -> str:
    """The mean, and the least and the largest below it."""
    return f"{np.mean(value_L):.2f}<small>[{min(value_L):.2f}, {max(value_L):.2f}]</small>"


def ms(seconds: float) -> str:
    """Milliseconds with three digits or more."""
    ms = 1e3 * seconds
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:,.0f}"


def percent(fraction: float) -> str:
    """A fraction as a percentage."""
    return number(fraction, ".1%")


def number(value: float, format_spec: str) -> str:
    """Formatted, with a true minus; a dash if it is not a number."""
    return format(value, format_spec).replace("-", "−") if isfinite(value) else "–"


STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 70rem; color: #1f2933; background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: 1rem; border-top: 1px solid #d5dbe1; }
h3 { font-size: 1rem; margin: 1.5rem 0 0; }
p, ul, figcaption { max-width: 46rem; }
section p, figcaption { color: #465362; font-size: .9rem; }
.verdict { font-size: 1.15rem; padding: .6rem .9rem; background: #f3f5f7; border-left: 5px solid #6b7785; }
.verdict.yes { border-color: #00805e; }
.verdict.no { border-color: #c44900; }
.scenario { padding-left: 1.2rem; color: #465362; font-size: .9rem; }
figure { margin: .5rem 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { font-weight: 600; vertical-align: bottom; line-height: 1.25; color: #465362; border-bottom: 2px solid #9aa5b1; }
td { vertical-align: top; border-bottom: 1px solid #e4e8ec; }
th, td { text-align: right; padding: .4rem .5rem; }
.words { text-align: left; }
td:first-child { white-space: nowrap; position: sticky; left: 0; background: #fff; }
.name { white-space: nowrap; }
td small { display: block; font-size: .8rem; color: #5a6673; white-space: nowrap; }
td.words small { white-space: normal; min-width: 11rem; }
.badge { display: inline-block; min-width: 1.5em; padding: 0 .15em; border-radius: 1em; color: #fff; font-size: .8em;
  text-align: center; }
@media (max-width: 40rem) { th, td { padding: .4rem .3rem; } td:first-child { white-space: normal; } }
@media (hover: none) { .modebar { display: none; } }
code { font-size: .9em; }
li { margin: .4rem 0; }
"""

NOTATION = """ In a config, <code>cf</code> is the capacity factor, with what is dropped beyond it
(<code>position</code>: later tokens, <code>probs</code>: smaller weights). The placement comes last, with the number of
redundant slots and which replica computes a pair."""

LIMITS = """
<li>A step is the MoE layers of the model and nothing else. Attention, dense layers, sampling and the host's gaps are
not in it, so that a whole model gains less than these speed-ups.</li>
<li>Gate mass kept is the router's score of the pairs that are computed, as a share of what the model's own choice has.
It stands in for quality; only a loss on held-out text shows quality itself.</li>
<li>Placements are planned on one part of the trace and configs chosen on another, so that no config is judged on what
it was fitted to.</li>
"""

# The policy forbids the page to load anything: whoever opens it tells nobody.
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>$title</title>
<style>$style</style>
<script>$plotly</script>
</head>
<body>
<header>
<h1>$title</h1>
$headline
<ul class="scenario">$scenario</ul>
</header>
<main>
<noscript><p>The figures need JavaScript; the tables do not.</p></noscript>
$sections</main>
</body>
</html>
""")

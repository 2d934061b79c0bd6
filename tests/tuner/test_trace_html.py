"""The page of a trace: every part that the trace has, the reason for what it has not, and nothing that runs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from traces.presets import preset
from traces.synthetic import synthetic_trace
from traces.trace import RoutingTrace
from tuner.trace_analysis import analyse
from tuner.trace_html import write_trace_html

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    made = synthetic_trace(preset("mixtral-8x7b"), tokens=1024, zipf=0.8, seed=1, tokens_per_request=64)
    return replace(made, domains=("prose", HOSTILE), domain_T=(made.request_T % 2).astype(np.uint8), source=HOSTILE)


def page_of(trace: RoutingTrace, folder: Path) -> str:
    write_trace_html(folder / "page.html", analyse(trace, capacity_factors=(1.0, 2.0)))
    return (folder / "page.html").read_text()


def test_a_page_shows_every_part(trace: RoutingTrace, tmp_path: Path) -> None:
    page = page_of(trace, tmp_path)
    for plot in ("distances", "domains", "active", "cache", "waste"):
        assert f'id="plot-{plot}"' in page
    assert "25.0% of the floating-point operations" in page
    analysis = analyse(trace)
    assert f"{analysis.cache.hit(4):.1%}" in page
    assert analysis.left_out == {}


def test_names_from_a_file_are_text(trace: RoutingTrace, tmp_path: Path) -> None:
    page = page_of(trace, tmp_path)
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize("tokens", [1, 2, 300])
def test_what_a_trace_lacks_is_left_out_with_its_reason(trace: RoutingTrace, tmp_path: Path, tokens: int) -> None:
    bare = replace(
        trace.take(np.arange(tokens)),
        gates_TLC=None,
        domain_T=None,
        domains=(),
        request_T=np.zeros(tokens, np.int32),
        position_T=np.arange(tokens, dtype=np.int32),
        score_kind="none",
    )
    page = page_of(bare, tmp_path)
    assert 'id="plot-distances"' not in page
    assert "has no domains; record text of several kinds" in page
    assert "No gates below a threshold: the trace has no gates." in page
    assert ("No reuse between steps" in page) == (tokens == 1)
    assert 'id="plot-waste"' in page


def test_one_domain_is_left_out(trace: RoutingTrace) -> None:
    alone = analyse(replace(trace, domain_T=np.zeros(trace.tokens, np.uint8)))
    assert alone.specialisation is None
    assert "16 requests of 1 domains" in alone.left_out["specialisation"]

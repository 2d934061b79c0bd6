"""The page of a placement: what it shows, and that it needs nothing else."""

import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from traces.loads import Loads
from traces.presets import preset
from traces.progress import quiet
from traces.synthetic import synthetic_trace
from tuner.placement_html import write_placement_html
from tuner.placing.answer import Answer
from tuner.placing.loads import place_by_loads
from tuner.placing.request import PlacingRequest
from tuner.placing.serving_setup import ServingSetup
from tuner.placing.trace import place_by_trace

HOSTILE = "<script>alert('&')</script>"


@pytest.fixture(scope="module")
def of_trace() -> Answer:
    model = replace(preset("mixtral-8x7b"), layers=2)
    trace = synthetic_trace(model, tokens=1280, zipf=1.0, seed=3, tokens_per_request=64, phase="decode")
    request = PlacingRequest(ranks=4, slots=12, algorithm="balanced")
    return place_by_trace(request, trace, ServingSetup(costs=("datasheet",), tokens_per_rank=8), quiet)


@pytest.fixture(scope="module")
def of_loads() -> Answer:
    loads_LE = np.array([[9.0, 1, 2, 3], [0, 0, 0, 0]])
    return place_by_loads(PlacingRequest(ranks=2), Loads(loads_LE=loads_LE, steps_WLE=None, source="by hand"))


def page(tmp_path: Path, answer: Answer) -> str:
    """The page without plotly.js."""
    path = tmp_path / "placement.html"
    write_placement_html(path, answer)
    text = path.read_text()
    assert get_plotlyjs() in text
    return text.replace(get_plotlyjs(), "")


def test_a_page_has_the_verdict_and_every_section(tmp_path: Path, of_trace: Answer) -> None:
    text = page(tmp_path, of_trace)
    assert re.findall("<h2>(.*?)</h2>", text) == ["Loads of ranks", "Before and after", "What was tried"]
    verdict = of_trace.verdict[:1].upper() + of_trace.verdict[1:]
    assert f'<p class="verdict {"yes" if of_trace.worth_it else "no"}">{verdict}.</p>' in unescape(text)
    for name in ("falling", "loads"):
        assert f'id="plot-{name}"' in text
    for shown in (
        "Step (ms)",
        "MB inside nodes, a step",
        "Active experts of the busiest rank",
        "of it waiting, the mean rank (ms)",
        "4 ranks on 1 node. Now: contiguous",
        "balanced <small>chosen</small>",
        "random",
    ):
        assert shown in text


def test_one_node_sends_nothing_between_nodes(tmp_path: Path, of_trace: Answer) -> None:
    assert "MB between nodes" not in page(tmp_path, of_trace)


def test_loads_alone_show_no_steps(tmp_path: Path, of_loads: Answer) -> None:
    text = page(tmp_path, of_loads)
    assert "Step (ms)" not in text
    assert "what counts is how high a line starts" in text
    assert "Loads: by hand." in text
    assert "Layer 1 has no load: placed as if every expert had the same." in text


def test_the_page_loads_nothing_and_escapes_what_others_wrote(tmp_path: Path, of_loads: Answer) -> None:
    text = page(tmp_path, replace(of_loads, notes=(HOSTILE,), verdict=HOSTILE))
    assert HOSTILE not in text
    assert not re.findall(r'(?:src|href)="?(?:https?:)?//', text)
    assert "default-src 'none'" in text


def test_a_page_is_the_same_twice(tmp_path: Path, of_trace: Answer) -> None:
    assert page(tmp_path, of_trace) == page(tmp_path, of_trace)

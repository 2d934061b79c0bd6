"""The page of simulations: what it shows, that it needs nothing else, and that it is the same twice."""

import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from cost_models.kernels.token_traffic import bytes_between_ranks
from tuner.replays import Replays
from tuner.scenario import parse_scenario
from tuner.simulated import SimulatedScenario
from tuner.simulation_html import write_simulation_html

HOSTILE = "<script>alert('&')</script>"
SECTIONS = (
    "Where the time of a step goes",
    "One MoE layer",
    "Critical ranks",
    "Load of ranks",
    "Traffic between ranks",
    "Memory",
    "Cluster",
)
PLOTS = ("breakdown", "one-layer", "critical", "loads", "traffic")
SCENARIO: dict[str, Any] = {
    "version": 1,
    "name": "small",
    "trace": {"model": "mixtral-8x7b", "tokens": 1024, "zipf": 0.8},
    "cluster": {"device": "h100_sxm", "ranks": 4},
    "batch": {"phase": "decode", "tokens_per_rank": 8, "steps": 2, "kv_tokens_per_rank": 4096},
    "config": {"policy": "top_k", "parameters": {"k": 2}},
    "sampled_layers": 3,
}


def simulated(name: str = "small", **changes: Any) -> SimulatedScenario:
    replays = Replays.of(parse_scenario({**SCENARIO, **changes}, source="test"))
    config = replays.scenario.config
    bound, _, _ = replays.run(config, fidelity="analytic")
    report, timelines, works = replays.run(config, fidelity="event")
    return SimulatedScenario.of(name, replays, report, bound, timelines, works)


def page(tmp_path: Path, *scenarios: SimulatedScenario) -> str:
    """The page without plotly.js."""
    path = tmp_path / "report.html"
    write_simulation_html(path, scenarios)
    text = path.read_text()
    assert get_plotlyjs() in text
    return text.replace(get_plotlyjs(), "")


def test_a_page_of_one_scenario_has_every_section_and_figure(tmp_path: Path) -> None:
    text = page(tmp_path, simulated())
    assert tuple(unescape(name) for name in re.findall("<h2>(.*?)</h2>", text)) == SECTIONS
    for name in PLOTS:
        assert f'id="plot-{name}"' in text
    assert text.count("<svg") == 1
    assert "A step takes" in text
    assert len(text) < 200_000


def test_a_page_loads_nothing(tmp_path: Path) -> None:
    text = page(tmp_path, simulated())
    assert "default-src 'none'" in text
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)


def test_scenarios_stand_side_by_side(tmp_path: Path) -> None:
    text = page(
        tmp_path,
        simulated("alone"),
        simulated("overlapped", execution={"overlap": "two_batch"}),
        simulated("slow", cluster={**SCENARIO["cluster"], "degrade": ["gpu2=0.5"]}),
    )
    assert "alone against overlapped against slow" in text
    for column in ("alone", "overlapped", "slow"):
        assert f">{column}</th>" in text
    # Two clusters: one picture for the two scenarios that share one.
    assert text.count("<svg") == 2
    assert "<h3>alone, overlapped</h3>" in text
    assert "second microbatch is hatched" in text
    assert "slow: rank 2 in 32 of 32 layers" in text


def test_the_same_simulation_gives_the_same_bytes(tmp_path: Path) -> None:
    assert page(tmp_path, simulated()) == page(tmp_path, simulated())


def test_names_are_escaped(tmp_path: Path) -> None:
    text = page(tmp_path, simulated(HOSTILE), simulated("other"))
    assert HOSTILE not in text
    assert "<script>alert" not in text


def test_a_lost_rank_is_no_hindrance(tmp_path: Path) -> None:
    text = page(tmp_path, simulated(disturbance={"faults": ["rank1=lost@0.0001"]}))
    assert "NaN" not in text
    assert "of the kept pairs are lost with their rank" in text
    assert "rank 1 computes" not in text  # it is not there for most of the step


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    text = page(tmp_path, simulated(cluster={"device": "h100_sxm", "ranks": 1}))
    assert "verdict no" in text
    assert text.count("does not fit") == 2  # in the headline and in the table


def test_traffic_is_the_mean_over_the_models_layers() -> None:
    shown = simulated()
    replays = Replays.of(parse_scenario(SCENARIO, source="test"))
    _, _, works = replays.run(replays.scenario.config)
    expected_GG = np.zeros((4, 4))
    for (work,) in works:
        bytes_LGG = bytes_between_ranks(work.exchange("dispatch"))
        expected_GG += bytes_LGG[work.row_of_layer].mean(axis=0) / len(works)
    np.fill_diagonal(expected_GG, 0)
    assert shown.bytes_GG == pytest.approx(expected_GG)
    # Dispatch and combine of bfloat16 move the same bytes: twice 32 layers of these are what the report counts.
    assert 2 * 32 * shown.bytes_GG.sum() == pytest.approx(shown.report.network_bytes_per_step)


def test_rows_are_all_kept_pairs() -> None:
    shown = simulated(execution={"overlap": "two_batch"})
    assert shown.layers_L.tolist() == [5, 16, 26]
    assert shown.rows_LG.sum(axis=1) == pytest.approx([4 * 8 * 2] * 3)  # ranks, tokens, experts a token
    assert (shown.active_LG <= 2).all()  # of 8 experts on 4 ranks


def test_many_ranks_share_cells(tmp_path: Path) -> None:
    text = page(
        tmp_path,
        simulated(
            trace={"model": "deepseek-v3", "tokens": 2048, "zipf": 0.6},
            cluster={"device": "h100_sxm", "ranks": 256},
            batch={**SCENARIO["batch"], "tokens_per_rank": 2, "steps": 1},
            execution={"extent": "moe"},
            sampled_layers=2,
        ),
    )
    assert "Neighbouring ranks share a cell" in text
    assert len(text) < 600_000

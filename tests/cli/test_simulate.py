"""`moeroute simulate` as a stranger meets it: one scenario or several, parts that are slow or fail, what is written."""

import json
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from typer.testing import CliRunner, Result

from moeroute.cli.app import app

SCENARIO: dict[str, Any] = {
    "version": 1,
    "name": "small",
    "trace": "trace.parquet",
    "cluster": {"device": "h100_sxm", "ranks": 4},
    "batch": {"phase": "prefill", "tokens_per_rank": 64, "steps": 2},
    "config": {"policy": "top_k", "parameters": {"k": 2}},
    "sampled_layers": 2,
}


def run(*arguments: object, cwd: Path) -> Result:
    """Run a command in this process, which has its compiled loops loaded."""
    with chdir(cwd):
        return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small trace and scenarios that fit it."""
    folder = tmp_path_factory.mktemp("simulate")
    done = run(
        *("trace", "synth", "--model", "mixtral-8x7b", "--tokens", 4096, "--candidates", 4, "-o", "."), cwd=folder
    )
    assert done.exit_code == 0, done.stderr
    write(folder, "scenario.yaml")
    write(folder, "lpt.yaml", name="packed", config={**SCENARIO["config"], "placement": {"algorithm": "lpt"}})
    write(folder, "too_large.yaml", name="too large", cluster={"device": "h100_sxm", "ranks": 1})
    return folder


def write(folder: Path, file: str, **changes: Any) -> None:
    (folder / file).write_text(yaml.safe_dump({**SCENARIO, **changes}))


def simulated(folder: Path, *arguments: object, out: str, code: int = 0) -> Any:
    """The JSON document of a run, which is also what it wrote."""
    done = run("simulate", *arguments, "-o", out, "--json", cwd=folder)
    assert done.exit_code == code, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads((folder / out / "report.json").read_text())
    return document


def refused(done: Result) -> str:
    """The one line that a refused command says."""
    assert done.exit_code == 2, (done.stdout, done.stderr)
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    return line


def line_with(words: str, text: str) -> str:
    """The one line of a table that holds these words."""
    (line,) = (line for line in text.splitlines() if words in line)
    return line


def processes(timeline: Path) -> list[str]:
    events = json.loads(timeline.read_text())["traceEvents"]
    return [event["args"]["name"] for event in events if event["name"] == "process_name"]


def test_the_report_breaks_the_step_down(folder: Path) -> None:
    report = simulated(folder, "scenario.yaml", out="one")["event"]
    assert set(report["breakdown_s"]) == {"attention", "gate", "dispatch", "experts", "combine", "other"}
    assert sum(report["breakdown_s"].values()) == pytest.approx(sum(report["stage_s"].values()))
    assert set(report["waits_s"]) <= set(report["stage_s"])
    assert len(report["critical_rank_by_layer"]) == 32
    assert set(report["bytes_by_tier"]) == {"scale_up", "scale_out"}
    assert report["bytes_by_tier"]["scale_out"] == 0  # four ranks of one node
    memory = report["memory"]
    parts = ("expert_bytes", "other_weight_bytes", "kv_cache_bytes", "buffer_bytes")
    assert sum(memory[part] for part in parts) == pytest.approx(report["memory_bytes"])
    assert report["fits"] is True
    assert report["lost_share"] == 0


def test_people_read_the_same_in_tables(folder: Path) -> None:
    done = run("simulate", "scenario.yaml", "-o", "tables", "--draw", cwd=folder)
    assert done.exit_code == 0, done.stderr
    for words in (
        "attention",
        "combine",
        "waiting for the last rank",
        "critical rank",
        "bytes inside nodes",
        "KV cache",
    ):
        assert words in done.stdout
    assert {path.name for path in (folder / "tables").iterdir()} == {
        "cluster.svg",
        "report.html",
        "report.json",
        "timeline.json",
    }
    assert ElementTree.parse(folder / "tables" / "cluster.svg").getroot().tag.endswith("svg")


def test_what_is_seldom_is_shown_where_there_is_some(folder: Path) -> None:
    moving = {"factor": 1.0, "reroute": "any", "pad": True}
    write(folder, "moving.yaml", name="moving", config={**SCENARIO["config"], "capacity": moving})
    done = run("simulate", "moving.yaml", "-o", "moving", cwd=folder)
    assert done.exit_code == 0, done.stderr
    report = json.loads((folder / "moving" / "report.json").read_text())["event"]
    assert report["rerouted_share"] > 0
    assert report["padding_share"] > 0
    assert f"{report['rerouted_share']:.1%}" in line_with("pairs rerouted", done.stdout)
    assert f"{report['padding_share']:.1%}" in line_with("rows of padding", done.stdout)
    assert "Pairs rerouted" in (folder / "moving" / "report.html").read_text()
    plain = run("simulate", "scenario.yaml", "-o", "plain", cwd=folder)
    both = run("simulate", "scenario.yaml", "moving.yaml", "--compare", "-o", "both", cwd=folder)
    for words in ("pairs rerouted", "rows of padding"):
        assert words not in plain.stdout
        assert line_with(words, both.stdout).count("%") == 2
    assert "completed" not in plain.stdout


def test_a_completed_trace_is_named(folder: Path) -> None:
    write(folder, "completed.yaml", name="completed", candidates=6)
    done = run("simulate", "completed.yaml", "-o", "completed", cwd=folder)
    assert done.exit_code == 0, done.stderr
    assert "completed by a model" in line_with("candidates beyond the recorded ones", done.stdout)
    assert (
        "Candidates beyond the recorded ones were completed by a model."
        in (folder / "completed" / "report.html").read_text()
    )


def test_without_html_no_page_is_written(folder: Path) -> None:
    simulated(folder, "scenario.yaml", "--no-html", out="plain")
    assert {path.name for path in (folder / "plain").iterdir()} == {"report.json", "timeline.json"}


def test_simulating_twice_gives_the_same_bytes(folder: Path) -> None:
    simulate = [sys.executable, "-m", "moeroute", "simulate", "scenario.yaml", "lpt.yaml", "--compare", "--draw", "-o"]
    for out in ("first", "second"):
        subprocess.run([*simulate, out], cwd=folder, capture_output=True, check=True)
    for file in ("report.json", "timeline.json", "report.html", "cluster.svg"):
        assert (folder / "first" / file).read_bytes() == (folder / "second" / file).read_bytes()


def test_two_scenarios_are_compared_under_their_names(folder: Path) -> None:
    document = simulated(folder, "scenario.yaml", "lpt.yaml", "--compare", out="compared")
    assert list(document) == ["small", "packed"]
    assert {*document["small"]} == {"scenario", "cluster", "faults", "event", "analytic"}
    assert (document["small"]["scenario"], document["small"]["faults"]) == ("small", [])
    assert document["small"]["event"] == simulated(folder, "scenario.yaml", out="alone")["event"]
    assert processes(folder / "compared" / "timeline.json") == [
        f"{name}: rank {rank}" for name in ("small", "packed") for rank in range(4)
    ]
    page = (folder / "compared" / "report.html").read_text()
    assert "small against packed" in page


def test_a_comparison_gives_ratios_to_the_first(folder: Path) -> None:
    done = run("simulate", "scenario.yaml", "lpt.yaml", "--compare", "-o", "ratios", cwd=folder)
    assert done.exit_code == 0, done.stderr
    document = json.loads((folder / "ratios" / "report.json").read_text())
    ratio = document["packed"]["event"]["step_s"] / document["small"]["event"]["step_s"]
    (step,) = [line for line in done.stdout.splitlines() if line.startswith("│ step ")]
    assert f"({ratio:.2f}x)" in step


def test_scenarios_of_one_name_are_told_by_their_files(folder: Path) -> None:
    write(folder, "again.yaml")
    document = simulated(folder, "scenario.yaml", "again.yaml", "--compare", "--no-html", out="again")
    assert list(document) == ["scenario", "again"]


def test_several_scenarios_need_compare_and_compare_needs_several(folder: Path) -> None:
    for arguments in (("scenario.yaml", "lpt.yaml"), ("scenario.yaml", "--compare")):
        done = run("simulate", *arguments, cwd=folder)
        assert done.exit_code == 2
        assert "--compare" in done.stderr


def test_a_slow_gpu_slows_every_step(folder: Path) -> None:
    well = simulated(folder, "scenario.yaml", "--no-html", out="well")["event"]
    slow = simulated(folder, "scenario.yaml", "--no-html", "--degrade", "gpu3=0.5", out="slow")["event"]
    assert slow["step_s"] > well["step_s"]
    assert set(slow["critical_rank_by_layer"]) == {3}
    assert slow["bytes_by_tier"] == well["bytes_by_tier"]


def test_what_the_command_line_degrades_comes_on_top_of_the_scenario(folder: Path) -> None:
    write(folder, "degraded.yaml", cluster={**SCENARIO["cluster"], "degrade": ["gpu3=0.5"]})
    of_file = simulated(folder, "degraded.yaml", "--no-html", out="degraded")
    assert of_file == simulated(folder, "scenario.yaml", "--no-html", "--degrade", "gpu3=0.5", out="the-same")
    done = run("simulate", "degraded.yaml", "--degrade", "gpu3=0.5", cwd=folder)
    assert "gpu3 is named twice" in refused(done)


def test_a_rank_that_fails_takes_its_pairs_with_it(folder: Path) -> None:
    report = simulated(folder, "scenario.yaml", "--no-html", "--fail", "rank3=lost@0.0001", out="failed")["event"]
    assert 0 < report["lost_share"] < 1
    assert report["step_s"] > 0.1  # the others notice after a tenth of a second


def test_overlap_replaces_the_scenarios(folder: Path) -> None:
    write(folder, "two_batch.yaml", execution={"overlap": "two_batch"})
    of_file = simulated(folder, "two_batch.yaml", "--no-html", out="two_batch")
    assert of_file == simulated(folder, "scenario.yaml", "--no-html", "--overlap", "two_batch", out="overlapped")
    assert of_file != simulated(folder, "two_batch.yaml", "--no-html", "--overlap", "none", out="not")


def test_what_does_not_fit_is_said_with_its_numbers(folder: Path) -> None:
    done = run("simulate", "too_large.yaml", "-o", "too_large", "--no-html", cwd=folder)
    assert done.exit_code == 1
    # 32 layers of 8 experts of 3 * 4096 * 14336 weights, 2 bytes each, are 90.2 GB.
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("does not fit: experts 90.2 GB + other weights 3.21 GB + KV cache ")
    assert "= 93.4 GB of 85.9 GB: use more ranks, weights of fewer bits" in last
    assert simulated(folder, "too_large.yaml", "--no-html", out="too_large", code=1)["event"]["fits"] is False


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--degrade", "gpu9=0.5"], "there is no gpu9; the ranks are gpu0 to gpu3"),
        (["--degrade", "gpu3"], "not of the form what=how"),
        (["--degrade", "gpu3=2"], "neither lost nor a share between 0 and 1"),
        (["--degrade", "gpu3=lost"], "do not divide over 3 ranks"),
        (["--fail", "gpu3=lost"], "not of the form change@seconds"),
        (["--fail", "gpu9=lost@0.1"], "there is no gpu9"),
        (["--overlap", "both"], "'both' is not known; use none, single_batch, two_batch"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(folder: Path, arguments: list[str], says: str) -> None:
    assert says in refused(run("simulate", "scenario.yaml", *arguments, cwd=folder))


def test_of_several_the_scenario_that_cannot_be_is_named(folder: Path) -> None:
    write(folder, "three.yaml", name="on three", cluster={"device": "h100_sxm", "ranks": 3})
    said = refused(run("simulate", "scenario.yaml", "three.yaml", "--compare", cwd=folder))
    assert said.startswith("error: on three: 8 expert slots do not divide over 3 ranks")

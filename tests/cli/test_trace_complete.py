"""`moeroute trace complete` from outside: what it says, and what it never writes over."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeroute.cli.app import app
from traces.presets import preset
from traces.store import read_trace, write_trace
from traces.synthetic import synthetic_trace


def complete(*options: object) -> str:
    done = CliRunner().invoke(app, ["trace", "complete", *map(str, options)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.parquet"
    write_trace(path, synthetic_trace(preset("mixtral-8x7b"), tokens=2048, zipf=0.8, seed=0))
    return path


def test_requests_that_were_fitted_are_not_written(trace: Path, tmp_path: Path) -> None:
    said = json.loads(complete(trace, "--candidates", 4, "--fit-share", 0.5, "-o", tmp_path / "done", "--json"))
    done = read_trace(Path(said["file"]))
    assert (done.candidates, done.recorded_candidates, done.tokens) == (4, 2, 1024)
    assert said["hidden"]["rank"] == 2


def test_the_trace_that_is_read_is_never_written_over(trace: Path) -> None:
    before = trace.read_bytes()
    refused = CliRunner().invoke(app, ["trace", "complete", str(trace), "-o", str(trace.parent)])
    assert refused.exit_code == 2
    assert "would take the place of the trace that is read; give another folder with -o" in refused.output
    assert trace.read_bytes() == before

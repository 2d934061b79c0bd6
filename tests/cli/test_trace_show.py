"""`moeroute trace show`: its options, its document, and traces that lack something."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from moeroute.cli.trace import app
from traces.errors import InputError
from traces.presets import preset
from traces.store import write_trace
from traces.synthetic import synthetic_trace
from traces.trace import RoutingTrace


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    made = synthetic_trace(preset("mixtral-8x7b"), tokens=1024, zipf=0.8, seed=1, tokens_per_request=64)
    return replace(made, domains=("prose", "code"), domain_T=(made.request_T % 2).astype(np.uint8))


@pytest.fixture(scope="module")
def file(trace: RoutingTrace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "trace.parquet"
    write_trace(path, trace)
    return path


def run(file: Path, *options: str) -> Result:
    done = CliRunner().invoke(app, ["show", str(file), *options], catch_exceptions=False)
    assert done.exit_code == 0
    return done


def show(file: Path, *options: str) -> str:
    return run(file, *options).stdout


def test_the_document_has_every_part(file: Path) -> None:
    options = ("--json", "--capacity-factor", "2", "--tokens-per-step", "64", "--gate-threshold", "0.2")
    shown = json.loads(show(file, *options, "--gpu", "h100_sxm"))
    assert shown["waste"]["capacity_factor"] == 2
    assert shown["waste"]["places"] == 64 * 2 // 8 * 2
    assert shown["waste"]["steps"] == 1024 // 64
    assert shown["waste"]["gate_threshold"] == 0.2
    assert shown["specialisation"]["domains"] == ["prose", "code"]
    assert np.sum(shown["specialisation"]["load_DLE"]) == 1024 * 2 * 32
    assert shown["active_set"]["batch_B"][-1] == 256
    assert shown["flops"]["active_parameters"] == 0.25
    assert shown["left_out"] == {}
    for cache in shown["reuse"]["caches"]:
        # The datasheet of an H100 gives 64 GB/s from the host.
        assert cache["load_s_per_token"] == pytest.approx(cache["loaded_bytes_per_token"] / 64e9)


def test_the_tables_say_the_same_as_the_document(file: Path) -> None:
    shown, tables = json.loads(show(file, "--json")), show(file)
    for title in ("specialisation", "mutual information", "reuse and active set", "expert cache", "compute", "wasted"):
        assert title in tables
    assert f"{shown['waste']['wasted']:.1%}" in tables
    assert f"{shown['reuse']['caches'][1]['hit']:.3f}" in tables


def test_pictures_add_capacity_factors_but_no_figures(file: Path, tmp_path: Path) -> None:
    with_page = json.loads(show(file, "--json", "--html", str(tmp_path / "page.html")))
    assert with_page == json.loads(show(file, "--json"))
    assert "plot-waste" in (tmp_path / "page.html").read_text()


def test_a_trace_without_domains_and_gates_says_so(trace: RoutingTrace, tmp_path: Path) -> None:
    bare = replace(trace, gates_TLC=None, score_kind="none", domain_T=None, domains=())
    write_trace(tmp_path / "bare.parquet", bare)
    shown = json.loads(show(tmp_path / "bare.parquet", "--json"))
    assert shown["specialisation"] is None
    assert set(shown["left_out"]) == {"specialisation", "gates below a threshold"}
    done = run(tmp_path / "bare.parquet")
    assert "compute in the MoE layers" in done.stdout
    assert "no specialisation: " in done.stderr
    assert "no gates below a threshold: the trace has no gates" in done.stderr


def test_bad_options_are_refused(file: Path) -> None:
    for options, match in (
        (("--gpu", "none"), "none"),
        (("--capacity-factor", "0"), "capacity factor 0"),
        (("--tokens-per-step", "4096"), "4096 tokens"),
    ):
        with pytest.raises(InputError, match=match):
            show(file, *options)

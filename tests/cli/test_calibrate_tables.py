"""`moeroute calibrate` on measured tables, as a stranger would run it."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moeroute.cli.app import app

sys.path.append(str(Path(__file__).parents[1] / "cost_models"))
from measured import gemm_columns, write_table

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")


def run(*arguments: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    write_table(folder / "h100_sxm_gemm_trtllm.parquet", gemm_columns(dtypes=("bfloat16", "fp8")))
    return folder


def test_cross_validation_prints_the_agreed_keys(tables: Path) -> None:
    document = json.loads(run("calibrate", "--tables", tables, "--cv", "--json").stdout)
    rows = document["tables"]
    assert [(row["op"], row["gpu"], row["framework"], row["dtype"]) for row in rows] == [
        ("gemm", "h100_sxm", "trtllm", "bfloat16"),
        ("gemm", "h100_sxm", "trtllm", "fp8"),
    ]
    for row in rows:
        assert row["table"] == "h100_sxm_gemm_trtllm"
        assert (row["rows"], row["folds"]) == (350, 5)
        assert 0 < row["median_ape"] < 0.05
        assert row["median_ape"] < row["roofline_median_ape"]
        assert {"mape", "p90_ape", "coverage90", "mape_le8_tokens"} <= row.keys()


def test_fit_then_show(tables: Path, tmp_path: Path) -> None:
    printed = run("calibrate", "--tables", tables, "-o", tmp_path).stdout
    assert "gemm bfloat16" in printed
    profile = tmp_path / "h100_sxm_trtllm.json"
    assert profile.exists()
    shown = run("calibrate", "show", profile, "-o", tmp_path, "--json").stdout
    assert json.loads(shown)["page"] == str(tmp_path / "h100_sxm_trtllm.html")
    page = (tmp_path / "h100_sxm_trtllm.html").read_text()
    assert "h100_sxm: kernels of trtllm" in page
    assert "gemm, fp8 (h100_sxm_gemm_trtllm)" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tables", "nowhere"], "nowhere: no such folder of measured tables"),
        (["--tables", "TABLES", "--gpu", "h900"], "no tables of gpu 'h900'; known are h100_sxm"),
        (["--tables", "TABLES", "--framework", "vllm"], "no tables of framework 'vllm'; known are trtllm"),
        (["show", "nowhere.json"], "nowhere.json: no such profile"),
    ],
)
def test_bad_input_is_one_line_with_the_mend(tables: Path, arguments: list[str], message: str) -> None:
    result = run("calibrate", *[str(tables) if a == "TABLES" else a for a in arguments], code=2)
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_options_of_tables_need_tables() -> None:
    assert "go with --tables or --gpu" in run("calibrate", "--cv", code=2).output


def test_what_nothing_can_be_held_out_of_is_said_and_left_out(tables: Path, tmp_path: Path) -> None:
    columns = gemm_columns()
    one_shape = (columns["n"] == 512) & (columns["k"] == 512)
    few = {name: np.asarray(values)[one_shape] for name, values in columns.items()}
    write_table(tmp_path / "a100_sxm_gemm_trtllm.parquet", few)
    assert "nothing to fit in" in run("calibrate", "--tables", tmp_path, "--cv", code=2).stderr
    shutil.copy(tables / "h100_sxm_gemm_trtllm.parquet", tmp_path)
    result = run("calibrate", "--tables", tmp_path, "--cv", "--json")
    assert (
        "a100_sxm_gemm_trtllm.parquet: gemm in bfloat16 has one shape only: nothing could be held out" in result.stderr
    )
    assert {row["gpu"] for row in json.loads(result.stdout)["tables"]} == {"h100_sxm"}

"""Measured tables: what is read, and what is refused with the file, the row and the column."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from measured import gemm_columns, write_table

from cost_models.tables import choose_tables, find_tables, read_parts, source_of
from traces.errors import InputError


def gemm(folder: Path, **changes: Any) -> Path:
    return write_table(folder / "h100_sxm_gemm_trtllm.parquet", gemm_columns(**changes))


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as refused:
        [read_parts(file) for file in find_tables(folder)]
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_part_for_each_dtype_in_seconds(tmp_path: Path) -> None:
    gemm(tmp_path, dtypes=("bfloat16", "fp8"))
    parts = read_parts(find_tables(tmp_path)[0])
    assert [(p.table, p.op, p.dtype, p.framework, p.device.name) for p in parts] == [
        ("h100_sxm_gemm_trtllm", "gemm", "bfloat16", "trtllm", "h100_sxm"),
        ("h100_sxm_gemm_trtllm", "gemm", "fp8", "trtllm", "h100_sxm"),
    ]
    assert len(parts[0].seconds_N) == 14 * 25
    assert parts[1].row_N[0] == 14 * 25
    np.testing.assert_allclose(parts[0].seconds_N, parts[0].columns["latency"] * 1e-3)


def test_a_dtype_that_nobody_knows_is_left_out(tmp_path: Path) -> None:
    gemm(tmp_path, dtypes=("bfloat16", "int3"))
    assert [part.dtype for part in read_parts(find_tables(tmp_path)[0])] == ["bfloat16"]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_names_its_row(tmp_path: Path, value: float) -> None:
    latency = gemm_columns()["latency"]
    latency[17] = value
    path = gemm(tmp_path, latency=latency)
    assert refusal(tmp_path).startswith(f"{path}: row 17, column 'latency': {value} is not a time")


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    columns = gemm_columns()
    del columns["k"]
    path = write_table(tmp_path / "h100_sxm_gemm_trtllm.parquet", columns)
    assert refusal(tmp_path).startswith(f"{path}: no column 'k'; a gemm_trtllm table needs")


@pytest.mark.parametrize("factor", [1e3, 1e-3], ids=["microseconds", "seconds"])
def test_another_unit_is_noticed(tmp_path: Path, factor: float) -> None:
    path = gemm(tmp_path, latency=gemm_columns()["latency"] * factor)
    message = refusal(tmp_path)
    assert message.startswith(f"{path}: row ")
    assert "column 'latency'" in message
    assert message.endswith("is the column in another unit?")


def test_one_key_with_two_times_is_refused(tmp_path: Path) -> None:
    columns = gemm_columns()
    for name in ("m", "n", "k"):
        columns[name][9] = columns[name][4]
    columns["latency"][9] = 3 * columns["latency"][4]
    path = write_table(tmp_path / "h100_sxm_gemm_trtllm.parquet", columns)
    message = refusal(tmp_path)
    assert message.startswith(f"{path}: rows 4 and 9, columns kernel_source, gemm_dtype, m, n, k: the same key")
    assert "3.0 times apart" in message


def test_a_repeated_measurement_may_stand(tmp_path: Path) -> None:
    columns = gemm_columns()
    for name in ("m", "n", "k"):
        columns[name][9] = columns[name][4]
    columns["latency"][9] = 1.01 * columns["latency"][4]
    write_table(tmp_path / "h100_sxm_gemm_trtllm.parquet", columns)
    assert len(read_parts(find_tables(tmp_path)[0])[0].seconds_N) == 350


def test_an_unknown_gpu_or_kind_names_those_known(tmp_path: Path) -> None:
    path = gemm(tmp_path)
    path.rename(tmp_path / "h900_gemm_trtllm.parquet")
    assert "a table's name starts with its gpu, one of a100_sxm, h100_sxm" in refusal(tmp_path)
    (tmp_path / "h900_gemm_trtllm.parquet").rename(tmp_path / "h100_sxm_gemmm.parquet")
    assert "unknown kind of table 'gemmm'; known are moe_trtllm, " in refusal(tmp_path)


def test_a_folder_without_tables_and_a_file_that_is_none(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere").endswith("no such folder of measured tables")
    assert "no measured tables" in refusal(tmp_path)
    (tmp_path / "h100_sxm_gemm_trtllm.parquet").write_text("text")
    assert "not a Parquet file" in refusal(tmp_path)


def test_tables_are_chosen_by_gpu_and_framework(tmp_path: Path) -> None:
    gemm(tmp_path)
    write_table(tmp_path / "a100_sxm_gemm_trtllm.parquet", gemm_columns())
    files = find_tables(tmp_path)
    assert [file.device.name for file in choose_tables(files, gpu="a100_sxm", framework="trtllm")] == ["a100_sxm"]
    with pytest.raises(InputError, match="no tables of gpu 'gb200'; known are a100_sxm, h100_sxm"):
        choose_tables(files, gpu="gb200")
    with pytest.raises(InputError, match="no tables of framework 'vllm'; known are trtllm"):
        choose_tables(files, framework="vllm")


def test_where_a_table_is_from(tmp_path: Path) -> None:
    gemm(tmp_path / "mine")
    assert source_of(find_tables(tmp_path / "mine")[0]) == "mine"


def test_a_column_that_early_tables_lack_is_what_held_for_all_of_them(tmp_path: Path) -> None:
    rows = 4
    columns: dict[str, Any] = dict.fromkeys(("kernel_source", "version"), ["x"] * rows)
    columns |= dict.fromkeys(("attn_dtype", "kv_cache_dtype"), ["bfloat16"] * rows)
    columns |= {"num_heads": [8, 8, 16, 16], "num_key_value_heads": [8] * rows, "head_dim": [128] * rows}
    columns |= {"batch_size": [1, 2, 1, 2], "isl": [512] * rows, "step": [0] * rows, "latency": [0.03] * rows}
    write_table(tmp_path / "h100_sxm_attention_context.parquet", columns)
    part = read_parts(find_tables(tmp_path)[0])[0]
    assert part.columns["window_size"].tolist() == [0] * rows

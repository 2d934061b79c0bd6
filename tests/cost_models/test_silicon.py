"""Tables in the layout of the package that holds more of them."""

from pathlib import Path

import pytest
from measured import gemm_columns, write_table

from cost_models.silicon import find_silicon
from cost_models.tables import read_parts
from traces.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for gpu, framework, version in (
        ("l40s", "trtllm", "1.3.0rc9"),
        ("l40s", "trtllm", "1.3.0rc10"),
        ("l40s", "sglang", "0.5.6"),
        ("h100_sxm", "trtllm", "1.0.0"),
        ("b60", "trtllm", "1.0.0"),  # no datasheet of it here
    ):
        write_table(tmp_path / gpu / "gemm" / framework / version / "gemm_perf.parquet", gemm_columns())
    write_table(tmp_path / "l40s" / "gemm" / "trtllm" / "1.3.0rc10" / "other_perf.parquet", gemm_columns())
    return tmp_path


def test_the_newest_version_of_each_framework(folder: Path) -> None:
    files = find_silicon(folder, "l40s")
    assert [(file.name, file.path.parts[-2], file.framework) for file in files] == [
        ("l40s_gemm_sglang", "0.5.6", "sglang"),
        ("l40s_gemm_trtllm", "1.3.0rc10", "trtllm"),
    ]
    parts = read_parts(files[0])
    assert (parts[0].table, parts[0].framework, parts[0].device.name) == ("l40s_gemm_sglang", "sglang", "l40s")


def test_one_framework_in_one_version(folder: Path) -> None:
    files = find_silicon(folder, "l40s", framework="trtllm", version="1.3.0rc9")
    assert [file.path.parts[-3:-1] for file in files] == [("trtllm", "1.3.0rc9")]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"gpu": "b60"}, "no measured tables of gpu 'b60'; those with tables and a datasheet are h100_sxm, l40s"),
        ({"gpu": "l40s", "framework": "vllm"}, "no tables of framework 'vllm' on l40s; known are sglang, trtllm"),
        ({"gpu": "l40s", "version": "9"}, "no tables of version '9' on l40s; known are 0.5.6, 1.3.0rc9, 1.3.0rc10"),
    ],
)
def test_what_there_is_not_is_named_with_what_there_is(folder: Path, choice: dict[str, str], message: str) -> None:
    with pytest.raises(InputError) as refused:
        find_silicon(folder, **choice)  # type: ignore[arg-type]
    assert str(refused.value) == message

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from traces.errors import InputError
from traces.loads import read_loads


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def written(document: Any) -> Path:
        path = tmp_path / "counts.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return path

    return written


def test_one_count_a_layer_and_expert(write: Any) -> None:
    path = write({"logical_count": [[1, 2, 3], [4, 5, 6.5]]})
    loads = read_loads(path)
    assert loads.loads_LE.tolist() == [[1, 2, 3], [4, 5, 6.5]]
    assert (loads.layers, loads.experts, loads.source) == (2, 3, str(path))
    assert loads.steps_WLE is None
    assert loads.skipped == ()


def test_steps_are_kept_and_summed(write: Any) -> None:
    loads = read_loads(write({"logical_count": [[[1, 2], [3, 4]], [[10, 0], [0, 1]]]}))
    assert loads.loads_LE.tolist() == [[11, 2], [3, 5]]
    assert loads.steps_WLE is not None
    assert loads.steps_WLE.tolist() == [[[1, 2], [3, 4]], [[10, 0], [0, 1]]]
    assert loads.steps_WLE.dtype == np.int64


def test_what_is_left_out_is_said(write: Any) -> None:
    loads = read_loads(write({"rank": 0, "logical_count": [[[0, 0]], [[1, 2]], [[0, 0]]]}))
    assert loads.steps_WLE is not None
    assert loads.steps_WLE.tolist() == [[[1, 2]]]
    assert loads.skipped == (
        "left out: key 'rank', which is no count of logical experts",
        "left out: 2 of 3 steps, which have no row in any layer",
    )


def test_averages_are_no_steps(write: Any) -> None:
    loads = read_loads(write({"logical_count": [[[0.5, 1]], [[1, 2]]]}))
    assert loads.loads_LE.tolist() == [[1.5, 3]]
    assert loads.steps_WLE is None
    assert loads.skipped == ("left out: single steps, whose counts are no whole rows, so that only the sum is used",)


@pytest.mark.parametrize("counts", [[[0, 0], [1, 2]], [[0, 0], [0, 0]], [[[0, 0], [0, 0]]]])
def test_a_layer_without_load_is_read_as_it_is(write: Any, counts: Any) -> None:
    loads = read_loads(write({"logical_count": counts}))
    assert loads.loads_LE[0].tolist() == [0, 0]
    assert loads.skipped == ()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "not a JSON file (Expecting property name"),
        ("[" * 100_000, "not a JSON file ("),
        ([[1, 2]], "holds a JSON list, not an object; give"),
        ({"counts": [[1]], "rank": 0}, "no key 'logical_count' (its keys: 'counts', 'rank'); give"),
        ({}, "no key 'logical_count' (its keys: none); give"),
        ({"logical_count": 3}, "logical_count is 3, not a list of layers"),
        ({"logical_count": []}, "logical_count is empty"),
        ({"logical_count": [[]]}, "logical_count: layer 0 is empty"),
        ({"logical_count": [[[]]]}, "logical_count: step 0, layer 0 is empty"),
        ({"logical_count": [1, 2]}, "logical_count: layer 0 is 1, not a list of experts"),
        ({"logical_count": [[1, 2], 3]}, "logical_count: layer 1 is 3, not a list of experts"),
        ({"logical_count": [[1, 2], [3]]}, "logical_count: layer 1 has 1 experts, where the first has 2; give all as"),
        ({"logical_count": [[[1], [2]], [[3]]]}, "logical_count: step 1 has 1 layers, where the first has 2"),
        ({"logical_count": [[[1, 2]], [[3]]]}, "logical_count: step 1, layer 0 has 1 experts, where the first has 2"),
        ({"logical_count": [[1, 2], [3, -4]]}, "layer 1, expert 1 is -4, which is negative; give counts of 0 or more"),
        ({"logical_count": [[1, -(10**400)]]}, "0..., which is not a finite number"),
        ({"logical_count": [[[1, float("nan")]]]}, "step 0, layer 0, expert 1 is NaN, which is not a finite number"),
        ({"logical_count": [[float("inf")]]}, "layer 0, expert 0 is Infinity, which is not a finite number"),
        ({"logical_count": [[10**400]]}, "layer 0, expert 0 is 1000"),
        ({"logical_count": [[1, "2"]]}, 'layer 0, expert 1 is "2", which is not a number'),
        ({"logical_count": [[1, True]]}, "layer 0, expert 1 is true, which is not a number"),
        ({"logical_count": [[1, None]]}, "layer 0, expert 1 is null, which is not a number"),
        ({"logical_count": [[1, [2]]]}, "layer 0, expert 1 is a list, which is not a number"),
        ({"logical_count": [[[[1]]]]}, "step 0, layer 0, expert 0 is a list, which is not a number"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(write: Any, document: Any, message: str) -> None:
    path = write(document)
    with pytest.raises(InputError) as refused:
        read_loads(path)
    text = str(refused.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert "\n" not in text


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: no such file; give one of"):
        read_loads(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        read_loads(tmp_path)
    torch_file = tmp_path / "counts.pt"
    torch_file.write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="a torch file, which is not read; write its logical_count as JSON"):
        read_loads(torch_file)

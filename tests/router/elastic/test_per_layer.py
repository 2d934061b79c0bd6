import json
from pathlib import Path
from typing import Any

import pytest

from router.elastic.per_layer import PerLayer
from router.subnetwork import SubNetwork
from traces.errors import InputError


def test_what_a_part_writes_is_read(tmp_path: Path) -> None:
    part = SubNetwork(layers_L=(0, 2), experts_LE=((0, 1), (0, 3)), top_k_L=(2, 1))
    path = tmp_path / "layers.json"
    path.write_text(json.dumps(part.to_json()))
    assert PerLayer.read(path) == PerLayer(layers=part.layers_L, top_k=part.top_k_L, experts=part.experts_LE)


def test_what_is_left_out_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    path.write_text('{"top_k": [4, 1]}')
    assert PerLayer.read(path) == PerLayer(top_k=(4, 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "layers.json: no JSON"),
        ([0, 1], "an object of layers, top_k, experts is needed"),
        ({}, "an object of layers, top_k, experts is needed"),
        ({"depth": 2}, "depth: unknown key; known are layers, top_k, experts"),
        ({"top_k": 2}, "top_k is 2; give a list of whole numbers"),
        ({"top_k": [2, 1.5]}, r"top_k is \[2, 1.5\]; give a list of whole numbers"),
        ({"layers": []}, r"layers is \[\]; give a list"),
        ({"experts": 3}, "experts is 3; give a list of ids for each layer"),
        ({"experts": [[0, 1], 2]}, "experts.1 is 2; give a list"),
        ({"experts": [[0, 1], None]}, "experts.1 is None; give a list"),
    ],
)
def test_what_is_something_else_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "layers.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message):
        PerLayer.read(path)

from typing import Any

import pytest

from traces.errors import InputError
from traces.model import ModelSpec
from traces.presets import PRESETS

TINY: dict[str, Any] = {"name": "tiny", "layers": 1, "experts": 4, "top_k": 2, "hidden": 8, "expert_hidden": 16}


@pytest.mark.parametrize(
    "changes",
    [{}, {"gate": "sigmoid", "renormalise": False}, {"null_experts": 3, "null_kind": "mixed", "top_k": 7}],
)
def test_a_spec_is_read_back_as_written(changes: dict[str, Any]) -> None:
    spec = ModelSpec(**{**TINY, **changes})
    assert ModelSpec(**spec.to_json()) == spec


def test_a_file_from_before_null_experts_is_still_read() -> None:
    written = {field: value for field, value in ModelSpec(**TINY).to_json().items() if "null" not in field}
    del written["gate"]
    spec = ModelSpec(**written)
    assert (spec.gate, spec.null_experts, spec.all_experts) == ("softmax", 0, 4)


def test_null_experts_cost_nothing_and_count_among_the_choices() -> None:
    spec = ModelSpec(**{**TINY, "null_experts": 2, "top_k": 6})
    assert spec.all_experts == 6
    assert spec.flops_per_token(2.0) == ModelSpec(**TINY).flops_per_token(2.0) == 2 * 2 * 3 * 8 * 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, r"top_k 5 is more than its 4 experts; use top_k <= 4"),
        ({"top_k": 7, "null_experts": 2}, r"top_k 7 is more than its 4 experts and 2 null ones; use top_k <= 6"),
        ({"null_experts": -1}, r"null_experts is -1; it must be at least 0"),
        ({"null_kind": "idle"}, r"null_kind is 'idle'; use zero, copy, constant, mixed"),
        ({"gate": "relu"}, r"gate is 'relu'; use softmax, sigmoid"),
    ],
)
def test_impossible_specs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelSpec(**{**TINY, **changes})


def test_presets_know_their_gate() -> None:
    sigmoid = sorted(name for name, model in PRESETS.items() if model.gate == "sigmoid")
    assert sigmoid == ["deepseek-v3", "kimi-k2"]
    assert not any(model.null_experts for model in PRESETS.values())

from typing import Any

import pytest

from traces.errors import InputError
from traces.model import ModelSpec
from traces.presets import PRESETS, preset

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


def test_a_cut_model_loses_what_goes_with_its_layers_and_experts() -> None:
    # DBRX: 40 layers of 16 experts, 6144 wide; attention 6144 * 128 * (2 * 48 + 2 * 8) = 88,080,384 parameters a layer,
    # a router row 6144, embeddings and head 2 * 100352 * 6144; cache 2 * 2 * 8 * 128 = 4096 bytes a layer and token.
    whole, cut = preset("dbrx"), preset("dbrx").cut(layers=10, experts=4, top_k=2)
    assert (cut.layers, cut.experts, cut.top_k) == (10, 4, 2)
    assert whole.attention_parameters == 40 * 88_080_384
    assert cut.attention_parameters == 10 * 88_080_384
    assert cut.other_parameters == 10 * 88_080_384 + 10 * 4 * 6144 + 2 * 100_352 * 6144
    assert cut.kv_bytes_per_token == 10 * 4096 == whole.kv_bytes_per_token // 4
    assert cut.expert_bytes == whole.expert_bytes
    assert cut.flops_per_token(2.0) == whole.flops_per_token(2.0) / 4


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_model_cut_to_its_own_size_is_the_model(name: str) -> None:
    whole = preset(name)
    assert whole.cut(layers=whole.layers, experts=whole.experts, top_k=whole.top_k) == whole


def test_dense_layers_stay_when_others_are_cut() -> None:
    whole = preset("deepseek-v3")  # 3 dense layers and 58 others
    cut = whole.cut(layers=29, experts=256, top_k=8)
    assert cut.dense_layers == 3
    assert cut.attention_parameters == whole.attention_parameters - whole.attention_parameters * 29 // 61
    assert cut.kv_bytes_per_token == whole.kv_bytes_per_token * 32 // 61


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 41}, r"model dbrx: layers to keep are 41; use 1 to 40"),
        ({"experts": 0}, r"model dbrx: experts to keep are 0; use 1 to 16"),
        ({"experts": 2}, r"top_k 4 is more than its 2 experts"),
    ],
)
def test_impossible_cuts_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        preset("dbrx").cut(**{"layers": 40, "experts": 16, "top_k": 4, **changes})

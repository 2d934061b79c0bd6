import pytest

from traces.presets import PRESETS


@pytest.mark.parametrize(
    ("name", "published_parameters"),
    [
        ("gpt-oss-20b", 20.9e9),
        ("gpt-oss-120b", 116.8e9),
        ("mixtral-8x7b", 46.7e9),
        ("qwen3-30b-a3b", 30.5e9),
        ("qwen3-235b-a22b", 235e9),
        ("deepseek-v3", 671e9),
        ("olmoe-1b-7b", 6.92e9),
        ("flame-moe-290m", 1.3e9),
    ],
)
def test_preset_has_the_published_size(name, published_parameters):
    model = PRESETS[name]
    in_layers = model.layers * (model.experts * model.expert_parameters + model.shared_parameters)
    assert in_layers + model.other_parameters == pytest.approx(published_parameters, rel=2e-3)
    assert model.name == name


def test_quantised_experts_take_the_bytes_of_their_format():
    # 3 matrices of 2880 × 2880 elements at 4.25 bits
    assert PRESETS["gpt-oss-20b"].expert_bytes == 3 * 2880 * 2880 * 4.25 / 8
    assert PRESETS["deepseek-v3"].expert_bytes == 3 * 7168 * 2048

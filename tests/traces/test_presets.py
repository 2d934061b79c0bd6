import pytest

from traces.presets import PRESETS


@pytest.mark.parametrize(
    ("name", "published_parameters"),
    [
        ("gpt-oss-20b", 20.9e9),
        ("gpt-oss-120b", 116.8e9),
        ("mixtral-8x7b", 46.7e9),
        ("dbrx", 131.6e9),
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


@pytest.mark.parametrize(
    ("name", "attention", "layers", "dense_layers", "heads", "kv_heads", "head_dim", "vocab"),
    [
        ("mixtral-8x7b", "grouped", 32, 0, 32, 8, 128, 32000),
        ("qwen3-30b-a3b", "grouped", 48, 0, 32, 4, 128, 151936),
        ("gpt-oss-20b", "grouped", 24, 0, 64, 8, 64, 201088),
        ("deepseek-v3", "latent", 58, 3, 128, 0, 0, 129280),
        ("kimi-k2", "latent", 60, 1, 64, 0, 0, 163840),
        ("deepseek-v2", "", 59, 1, 128, 0, 0, 102400),  # latent attention 5120 wide: nobody has measured it
    ],
)
def test_preset_knows_what_surrounds_its_experts(
    name, attention, layers, dense_layers, heads, kv_heads, head_dim, vocab
):
    model = PRESETS[name]
    assert (model.attention, model.layers, model.dense_layers) == (attention, layers, dense_layers)
    assert (model.heads, model.kv_heads, model.head_dim, model.vocab) == (heads, kv_heads, head_dim, vocab)


def test_attention_parameters_by_hand():
    # Q and O of 32 heads, K and V of 8, 128 wide, on 4096, in 32 layers.
    assert PRESETS["mixtral-8x7b"].attention_parameters == 32 * 4096 * 128 * (32 + 32 + 8 + 8)
    # Down to 1536 and up to 128 heads of 128 + 64; down to 512 + 64 and up to 128 heads of 128 + 128; out again.
    deepseek = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    assert PRESETS["deepseek-v3"].attention_parameters == 61 * deepseek
    assert PRESETS["deepseek-v3"].kv_bytes_per_token == 2 * 61 * 576


def test_what_surrounds_4_bit_experts_is_in_16_bits():
    gpt_oss, deepseek = PRESETS["gpt-oss-20b"], PRESETS["deepseek-v3"]
    assert (gpt_oss.other_dtype, gpt_oss.other_weight_bytes) == ("bfloat16", 2)
    assert (deepseek.other_dtype, deepseek.other_weight_bytes) == ("fp8_block", 1)

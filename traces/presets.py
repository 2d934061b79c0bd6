"""Published model shapes, for traces that do not carry their model's `config.json`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from traces.errors import InputError
from traces.model import ModelSpec

_GPT_OSS = {
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_experts_per_tok": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
}
_QWEN3 = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "norm_topk_prob": True,
}

_DEEPSEEK_V3 = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
}

# By preset: the numbers of the model's config.json that its shape depends on, and where they are from.
_CONFIGS: dict[str, Mapping[str, Any]] = {
    # huggingface.co/openai/gpt-oss-20b
    "gpt-oss-20b": {**_GPT_OSS, "num_hidden_layers": 24, "num_local_experts": 32},
    # huggingface.co/openai/gpt-oss-120b
    "gpt-oss-120b": {**_GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128},
    # huggingface.co/databricks/dbrx-base, whose keys are those of its attn_config and ffn_config
    "dbrx": {
        "hidden_size": 6144,
        "intermediate_size": 10752,
        "num_hidden_layers": 40,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "vocab_size": 100352,
    },
    # huggingface.co/mistralai/Mixtral-8x7B-v0.1
    "mixtral-8x7b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    # huggingface.co/Qwen/Qwen3-30B-A3B
    "qwen3-30b-a3b": {
        **_QWEN3,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
    },
    # huggingface.co/Qwen/Qwen3-235B-A22B
    "qwen3-235b-a22b": {
        **_QWEN3,
        "hidden_size": 4096,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
    },
    # huggingface.co/deepseek-ai/DeepSeek-V3
    "deepseek-v3": {
        **_DEEPSEEK_V3,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_group": 8,
        "num_attention_heads": 128,
        "vocab_size": 129280,
    },
    # huggingface.co/moonshotai/Kimi-K2-Instruct
    "kimi-k2": {
        **_DEEPSEEK_V3,
        "first_k_dense_replace": 1,
        "n_routed_experts": 384,
        "num_attention_heads": 64,
        "vocab_size": 163840,
    },
    # huggingface.co/deepseek-ai/DeepSeek-V2-Chat
    "deepseek-v2": {
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60,
        "first_k_dense_replace": 1,
        "n_routed_experts": 160,
        "n_group": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 102400,
        "norm_topk_prob": False,
    },
    # huggingface.co/allenai/OLMoE-1B-7B-0924
    "olmoe-1b-7b": {
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 50304,
        "norm_topk_prob": False,
    },
    # CMU-FLAME/FLAME-MoE, its Megatron options for 290M-1.3B in Hugging Face's words (arXiv 2505.20225)
    "flame-moe-290m": {
        "hidden_size": 1024,
        "intermediate_size": 5472,
        "moe_intermediate_size": 704,
        "num_hidden_layers": 9,
        "first_k_dense_replace": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "num_attention_heads": 16,
        "vocab_size": 50304,
        "norm_topk_prob": False,
    },
}

# Published expert weights that are not bfloat16: bytes an element and format. MXFP4 is 4 bits and one 8-bit scale for
# 32 elements (OCP Microscaling v1.0): 4.25 bits. DeepSeek's 8-bit weights have a scale for each block of 128 x 128.
_WEIGHTS: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": {"weight_bytes": 4.25 / 8, "weight_dtype": "w4a16_mxfp4"},
    "gpt-oss-120b": {"weight_bytes": 4.25 / 8, "weight_dtype": "w4a16_mxfp4"},
    "deepseek-v3": {"weight_bytes": 1.0, "weight_dtype": "fp8_block"},
    "kimi-k2": {"weight_bytes": 1.0, "weight_dtype": "fp8_block"},
}

PRESETS: dict[str, ModelSpec] = {
    name: replace(ModelSpec.from_hf_config(config, name=name), **_WEIGHTS.get(name, {}))
    for name, config in _CONFIGS.items()
}
"""The model of each preset name."""


def preset(name: str) -> ModelSpec:
    """The published model called `name`; `InputError` lists the known ones."""
    if name not in PRESETS:
        raise InputError(f"unknown model {name!r}; known are {', '.join(PRESETS)}")
    return PRESETS[name]

"""Surroundings: the stages of a step around its MoE layers: attention, dense layers, embedding, head and sampling."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models.ops import Attention, Collective, DenseMlp, Gemm, MemoryCopy, Mla, Operation
from sim.execution import Execution
from sim.lower import Work
from sim.stages import Block, Pricing, Stage, once
from traces.context import Context
from traces.errors import InputError
from traces.model import ModelSpec

_LOGIT_BYTES = 4  # logits are sampled in float32
_SAMPLING_PASSES = 3  # scale, normalise and draw: each goes over the logits once
_ONCE = np.zeros(1, dtype=np.int64)


def attention_stages(
    pricing: Pricing, work: Work, context: Context, tokens_G: NDArray[np.int64], execution: Execution
) -> list[Stage]:
    """Norm, attention with its projections, the sum over ranks that share its heads, and the norm that follows."""
    model, tensor = work.model, work.layout.attention_tensor
    if model.heads % tensor:
        raise InputError(f"attention_tensor is {tensor}, which does not divide the {model.heads} heads; use a divisor")
    context = context.shared(tensor)
    group_tokens_1G = once(np.repeat(tokens_G.reshape(-1, tensor).sum(axis=1), tensor))
    norm = MemoryCopy(bytes_X=2.0 * group_tokens_1G * model.row_bytes)  # reads and writes both sums and values
    stages = pricing.compute("norm", norm)
    stages += pricing.compute("attention", *_attention(model, context, group_tokens_1G, tensor, execution))
    if tensor > 1:
        summed = Collective(
            kind="all_reduce",
            bytes_X=1.0 * group_tokens_1G * model.row_bytes,
            ranks_X=np.array(tensor),
        )
        stages += pricing.communicate("attention sum", summed, group=tensor)
    return stages + pricing.compute("norm", norm)


def _attention(
    model: ModelSpec, context: Context, tokens_1G: NDArray[np.int64], tensor: int, execution: Execution
) -> list[Operation]:
    dtype = execution.attention_dtype or model.other_dtype
    batch_1G = once(np.maximum(context.requests_G, 1))
    new_1G, cached_1G = once(context.new_tokens_G), once(context.cached_tokens_G)
    heads = model.heads // tensor
    if model.attention == "latent":
        return [
            Mla(
                batch_X=batch_1G,
                new_tokens_X=new_1G,
                cached_tokens_X=cached_1G,
                heads_X=heads,
                phase=context.phase,
                part="block",
                kv_dtype=execution.kv_dtype,
                gemm_dtype=dtype,
            )
        ]
    kv_heads = max(model.kv_heads // tensor, 1)
    columns = (heads + 2 * kv_heads) * model.head_dim
    return [
        Gemm(rows_X=tokens_1G, columns_X=columns, inner_X=model.hidden, dtype=dtype),
        Attention(
            batch_X=batch_1G,
            new_tokens_X=new_1G,
            cached_tokens_X=cached_1G,
            heads_X=heads,
            kv_heads_X=kv_heads,
            head_dim=model.head_dim,
            phase=context.phase,
            kv_dtype=execution.kv_dtype,
        ),
        Gemm(rows_X=tokens_1G, columns_X=model.hidden, inner_X=heads * model.head_dim, dtype=dtype),
    ]


def layers_before(
    pricing: Pricing, model: ModelSpec, attention: Sequence[Stage], tokens_G: NDArray[np.int64]
) -> list[Block]:
    """The embedding and the dense layers."""
    embed = pricing.compute("embed", MemoryCopy(bytes_X=1.0 * once(tokens_G) * model.row_bytes))
    blocks = [Block(stages=tuple(embed), row_of_layer=_ONCE)]
    if model.dense_layers:
        dense = pricing.compute("dense", dense_mlp(model, once(tokens_G), model.dense_hidden))
        stages = (*attention, *dense)
        blocks.append(Block(stages=stages, row_of_layer=np.zeros(model.dense_layers, dtype=np.int64)))
    return blocks


def head(pricing: Pricing, model: ModelSpec, rows_G: NDArray[Any], execution: Execution, *, last_layer: int) -> Block:
    """The logits of the tokens that get a successor, its choice, and what the host then does."""
    rows_1G = once(rows_G)
    stages = [
        *pricing.compute("head", Gemm(rows_X=rows_1G, columns_X=model.vocab, inner_X=model.hidden)),
        *pricing.compute("sample", *[MemoryCopy(bytes_X=rows_1G * model.vocab * _LOGIT_BYTES)] * _SAMPLING_PASSES),
    ]
    if execution.host_gap_s:
        gap_s_LG = np.full((pricing.layers, pricing.ranks), execution.host_gap_s)
        stages.append(Stage(name="host gap", stream="communication", seconds_LG=gap_s_LG))
    return Block(stages=tuple(stages), row_of_layer=_ONCE, first_layer=last_layer)


def dense_mlp(model: ModelSpec, tokens_1G: NDArray[np.int64], mlp_hidden: int) -> DenseMlp:
    """A dense MLP or the shared experts, on every rank whole."""
    return DenseMlp(
        rows_X=tokens_1G,
        hidden=model.hidden,
        mlp_hidden=mlp_hidden,
        matrices=model.expert_matrices,
        weight_bytes=model.other_weight_bytes,
        row_bytes=model.row_bytes,
        dtype=model.other_dtype,
    )

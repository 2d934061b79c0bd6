"""Blocks: what the layers of a microbatch's step do, stage by stage, priced by a cost model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.devices import Device
from cost_models.kernels.token_traffic import Direction
from cost_models.ops import (
    Combine,
    CostModel,
    CountExchange,
    CountGather,
    Experts,
    Gate,
    HostToDevice,
    Permute,
    Regroup,
    WeightTransfer,
)
from sim.execution import Execution, Overlap
from sim.lower import MODES, Work
from sim.stages import Block, Blocks, Pricing, Stage, once
from sim.surroundings import attention_stages, dense_mlp, head, layers_before
from traces.errors import InputError


def blocks_of(
    work: Work,
    costs: CostModel,
    execution: Execution | None = None,
    *,
    device: Device | None = None,
    resident_LS: NDArray[np.bool_] | None = None,
) -> Blocks:
    """The blocks of one microbatch, in order, priced by `costs`.

    `execution` None: as its defaults say. `device`: what computes, where communication takes multiprocessors from it.
    `resident_LS`: the placement's slots whose experts stay in memory, by layer of `work`; None: all. The others are
    loaded in every step that uses them, and before the layer's experts begin: nothing is kept or fetched ahead.

    Errors: `InputError` where the whole step is wanted but the model's attention or the requests are not known, or
    where `costs` cannot price an operation.
    """
    execution = execution or Execution()
    if device is not None and execution.comm_sms >= device.sms:
        raise InputError(
            f"comm_sms is {execution.comm_sms}, but a {device.name} has {device.sms} multiprocessors; leave it some"
        )
    sms = _Multiprocessors(
        taken=execution.comm_sms,
        share=execution.comm_sms / device.sms if device else 0.0,
        pace=execution.overlap_pace if device else 1.0,
    )
    if execution.extent == "moe":
        pricing = Pricing(costs, work.layers, work.ranks, launch_s=0.0)
        stages = _moe_stages(pricing, work, work.tokens_G, sms, execution.overlap, resident_LS)
        return (Block(stages=tuple(stages), row_of_layer=work.row_of_layer),)
    model, context = work.model, work.context
    if not model.attention:
        raise InputError(
            f"the attention of {model.name} is not known, or no cost model has it; simulate its MoE layers alone "
            "(extent: moe)"
        )
    if context is None:
        raise InputError("a whole step needs the context of its requests; give it, or simulate the MoE layers alone")
    bucket = execution.bucket(int(work.tokens_G.max())) if context.phase == "decode" else None
    tokens_G = work.tokens_G if bucket is None else np.full(work.ranks, bucket)
    if bucket is not None:
        context = context.padded(bucket)
    pricing = Pricing(costs, work.layers, work.ranks, launch_s=execution.launch_s if bucket is None else 0.0)
    attention = attention_stages(pricing, work, context, tokens_G, execution)
    rows_G = context.requests_G if context.phase == "prefill" else tokens_G
    moe = _moe_stages(pricing, work, tokens_G, sms, execution.overlap, resident_LS)
    return (
        *layers_before(pricing, model, attention, tokens_G),
        Block(
            stages=(*attention, *moe),
            row_of_layer=work.row_of_layer,
            first_layer=model.dense_layers,
        ),
        head(pricing, model, rows_G, execution, last_layer=model.dense_layers + len(work.row_of_layer)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Multiprocessors:
    """What a normal-mode exchange takes: so many, and the share of all; and the pace of both beside one another."""

    taken: int
    share: float
    pace: float


def _moe_stages(
    pricing: Pricing,
    work: Work,
    tokens_G: NDArray[np.int64],
    sms: _Multiprocessors,
    overlap: Overlap,
    resident_LS: NDArray[np.bool_] | None,
) -> list[Stage]:
    """The stages of an MoE layer; `tokens_G` are those that dense work runs on, the padding of a graph's bucket too."""
    model, ranks = work.model, work.ranks
    tokens_1G = once(tokens_G)
    regroup = Regroup(rows_X=work.received_LG, segments=work.rows_LGS.shape[2] * ranks, row_bytes=model.row_bytes)
    own_1G = once(work.tokens_G)
    route = replace(work.route, tokens_X=own_1G)
    mode = MODES[work.protocol]

    def exchange(name: str, direction: Direction) -> list[Stage]:
        tokens = work.exchange(direction)
        if mode == "low_latency":  # it sends and is done: the links work alone
            return pricing.communicate(name, tokens, exchange=tokens)
        tokens = replace(tokens, sms_X=np.array(sms.taken))
        return pricing.communicate(name, tokens, exchange=tokens, sms_share=sms.share, pace=sms.pace)

    first = [
        *pricing.compute("gate", Gate(tokens_X=tokens_1G, hidden=model.hidden, experts=model.all_experts)),
        *pricing.compute("route", route),
    ]
    permute = pricing.compute(
        "permute", Permute(pairs_X=own_1G * route.width, rows_X=work.packed_LG, row_bytes=model.row_bytes)
    )
    bytes_1GG = np.full((1, ranks, ranks), float(work.count_bytes))
    if work.counts_first:  # where rows go is known only when all counts are
        stages = [
            *first,
            *pricing.communicate("counts", CountGather(bytes_XGG=bytes_1GG)),
            *([] if work.experts_moved_LGG is None else _spill_weights(pricing, work, work.experts_moved_LGG)),
            *permute,
        ]
    else:
        stages = [*first, *permute, *pricing.communicate("counts", CountExchange(bytes_XGG=bytes_1GG))]
    shared = (
        pricing.compute("shared", dense_mlp(model, tokens_1G, model.shared_experts * model.shared_hidden))
        if model.shared_experts
        else []
    )
    experts = Experts(
        rows_XS=work.rows_LGS,
        hidden=model.hidden,
        expert_hidden=model.expert_hidden // work.layout.expert_tensor,
        matrices=model.expert_matrices,
        weight_bytes=model.weight_bytes,
        row_bytes=model.row_bytes,
        routed_tokens_X=work.routed_LG,
        top_k=work.route.width,
        mode=mode,
        dtype=model.dtype,
    )
    under_dispatch, computed, under_return = _beside(
        shared, pricing.compute("experts", experts), overlap, model.expert_matrices
    )
    return [
        *stages,
        *under_dispatch,
        *exchange("dispatch", "dispatch"),
        *pricing.compute("regroup", regroup),
        *([] if resident_LS is None else _load_experts(pricing, work, resident_LS)),
        *computed,
        *pricing.compute("ungroup", regroup),
        *under_return,
        *exchange("return", "combine"),
        *pricing.compute("combine", Combine(rows_X=work.sent_LG, tokens_X=own_1G, row_bytes=model.row_bytes)),
    ]


def _spill_weights(pricing: Pricing, work: Work, experts_LGG: NDArray[np.int64]) -> list[Stage]:
    """The weights of experts that rows are moved with; layers without any do not exchange them."""
    bytes_XGG = experts_LGG * (work.model.expert_bytes / work.layout.expert_tensor)
    moves_L1 = experts_LGG.sum(axis=(1, 2)).reshape(-1, 1) > 0
    transfer = WeightTransfer(bytes_XGG=bytes_XGG)
    return [_share(stage, moves_L1) for stage in pricing.communicate("spill weights", transfer)]


def _load_experts(pricing: Pricing, work: Work, resident_LS: NDArray[np.bool_]) -> list[Stage]:
    """The weights that ranks load from their host; guest places of a spill get theirs from another rank."""
    if resident_LS.all():
        return []
    groups, tensor = work.layout.expert_groups, work.layout.expert_tensor
    away_LGS = np.repeat(~resident_LS.reshape(work.layers, groups, -1), tensor, axis=1)
    used_LGS = work.rows_LGS[:, :, : away_LGS.shape[2]] > 0
    bytes_LG = (away_LGS & used_LGS).sum(axis=2) * (work.model.expert_bytes / tensor)
    return [_share(stage, bytes_LG > 0) for stage in pricing.compute("load experts", HostToDevice(bytes_X=bytes_LG))]


def _beside(
    shared: Sequence[Stage], experts: Sequence[Stage], overlap: Overlap, matrices: int
) -> tuple[list[Stage], list[Stage], list[Stage]]:
    """What runs beside the dispatch, between the two exchanges, and beside the return."""
    if overlap != "single_batch":
        return [replace(stage, under_next=True) for stage in shared], list(experts), []
    up = [_share(stage, (matrices - 1) / matrices) for stage in experts]
    down = [replace(_share(stage, 1 / matrices), name="experts down") for stage in experts]
    return [], up, [replace(stage, under_next=True) for stage in (*down, *shared)]


def _share(stage: Stage, share: float | NDArray[np.bool_]) -> Stage:
    """A part of a stage's time, the same in all layers, or by layer [L, 1] or layer and rank."""

    def part(value_LG: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
        return None if value_LG is None else value_LG * share

    return replace(
        stage, seconds_LG=stage.seconds_LG * share, low_s_LG=part(stage.low_s_LG), high_s_LG=part(stage.high_s_LG)
    )

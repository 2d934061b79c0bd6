"""Stages: a step's work as the ordered stages of its layers, priced. Both simulators walk this one list.

A compute stage takes each rank its own time. A communication stage is a rendezvous: it starts when the last rank
arrives and ends for all at once. What a cost model's kernels do inside others is no stage of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cost_models.ops import (
    Combine,
    CostModel,
    CountExchange,
    DenseMlp,
    Experts,
    Gate,
    Operation,
    Permute,
    Prediction,
    Regroup,
    TokenExchange,
)
from sim.lower import Hop, Protocol, Work
from traces.model import ModelSpec

Stream = Literal["compute", "communication"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of every layer: `seconds_LG` by layer and rank; communication takes all ranks the same.

    `low_s_LG` and `high_s_LG` are the ends of the cost model's 90% intervals, None where it has none;
    `extrapolated_LG`: priced beyond what was measured, None for nothing. `under_next`: a compute stage that the rank
    runs while the next communication stage is under way.
    """

    name: str
    stream: Stream
    seconds_LG: NDArray[np.float64]
    under_next: bool = False
    low_s_LG: NDArray[np.float64] | None = None
    high_s_LG: NDArray[np.float64] | None = None
    extrapolated_LG: NDArray[np.bool_] | None = None


def at_interval_ends(stages: Sequence[Stage]) -> tuple[list[Stage], list[Stage]]:
    """The stages with every time at the low end of its interval, and with every one at the high end."""
    return (
        [stage if stage.low_s_LG is None else replace(stage, seconds_LG=stage.low_s_LG) for stage in stages],
        [stage if stage.high_s_LG is None else replace(stage, seconds_LG=stage.high_s_LG) for stage in stages],
    )


_MODES: dict[Protocol, Literal["normal", "low_latency"]] = {"per_expert": "low_latency", "per_rank": "normal"}


def stages_of(work: Work, model: ModelSpec, costs: CostModel, *, nodes: int = 1) -> list[Stage]:
    """The stages of one microbatch on ranks of `nodes` nodes, in order, priced by `costs`."""
    layers, ranks = work.rows_LS.shape[0], work.ranks
    tokens_LG = np.broadcast_to(work.tokens_G, (layers, ranks))
    sent_LG, received_LG = work.pairs_LGG.sum(axis=2), work.pairs_LGG.sum(axis=1)
    stages: list[Stage] = []

    def compute(name: str, operation: Operation, *, under_next: bool = False) -> None:
        if type(operation) not in costs.included:
            predictions = [costs.predict(operation)]
            stages.append(_stage(name, "compute", predictions, (layers, ranks), under_next=under_next))

    def communicate(name: str, *operations: Operation) -> None:
        predictions = [costs.predict(o) for o in operations if type(o) not in costs.included]
        if predictions:
            stages.append(_stage(name, "communication", predictions, (layers, ranks)))

    def exchange(direction: Literal["dispatch", "combine"], hops: tuple[Hop, ...]) -> list[TokenExchange]:
        return [
            TokenExchange(
                tokens_X=np.full(layers, work.tokens_G.max()),
                hidden=model.hidden,
                top_k=work.route.width,
                experts=model.experts,
                ranks_X=np.array(ranks),
                nodes_X=np.array(nodes),
                direction=direction,
                mode=_MODES[work.protocol],
                dtype=work.dispatch_dtype,
                bytes_XGG=hop.bytes_LGG,
            )
            for hop in hops
        ]

    regroup = Regroup(rows_X=received_LG, segments=work.rows_LGS.shape[2] * ranks, row_bytes=model.row_bytes)
    pairs_LG = tokens_LG * work.route.width
    counts_LGG = np.full((layers, ranks, ranks), float(work.count_bytes))
    compute("gate", Gate(tokens_X=tokens_LG, hidden=model.hidden, experts=model.experts))
    compute("route", work.route)
    compute("permute", Permute(pairs_X=pairs_LG, rows_X=sent_LG, row_bytes=model.row_bytes))
    communicate("counts", CountExchange(bytes_XGG=counts_LGG))
    if model.shared_experts:
        shared = DenseMlp(
            rows_X=tokens_LG,
            hidden=model.hidden,
            mlp_hidden=model.shared_experts * model.shared_hidden,
            matrices=model.expert_matrices,
            weight_bytes=model.weight_bytes,
            row_bytes=model.row_bytes,
            dtype=model.dtype,
        )
        compute("shared", shared, under_next=True)
    communicate("dispatch", *exchange("dispatch", work.dispatch))
    compute("regroup", regroup)
    experts = Experts(
        rows_XS=work.rows_LGS,
        hidden=model.hidden,
        expert_hidden=model.expert_hidden,
        matrices=model.expert_matrices,
        weight_bytes=model.weight_bytes,
        row_bytes=model.row_bytes,
        routed_tokens_X=work.copies_LGG.sum(axis=1),
        top_k=work.route.width,
        mode=_MODES[work.protocol],
        dtype=model.dtype,
    )
    compute("experts", experts)
    compute("ungroup", regroup)
    communicate("return", *exchange("combine", work.combine))
    compute("combine", Combine(rows_X=sent_LG, tokens_X=tokens_LG, row_bytes=model.row_bytes))
    return stages


def _stage(
    name: str, stream: Stream, predictions: Sequence[Prediction], shape: tuple[int, int], *, under_next: bool = False
) -> Stage:
    """One stage of operations that follow one another: priced by layer and rank, or by layer for all ranks."""

    def total(values_X: Sequence[NDArray[Any] | None]) -> NDArray[np.float64] | None:
        by_rank = [_by_rank(value_X, stream, shape) for value_X in values_X if value_X is not None]
        return np.sum(by_rank, axis=0) if len(by_rank) == len(values_X) else None

    return Stage(
        name=name,
        stream=stream,
        seconds_LG=np.sum([_by_rank(p.seconds_X, stream, shape) for p in predictions], axis=0),
        under_next=under_next,
        low_s_LG=total([p.low_s_X for p in predictions]),
        high_s_LG=total([p.high_s_X for p in predictions]),
        extrapolated_LG=np.any([_by_rank(p.extrapolated_X, stream, shape) for p in predictions], axis=0),
    )


def _by_rank(value_X: NDArray[Any], stream: Stream, shape: tuple[int, int]) -> NDArray[Any]:
    return np.broadcast_to(value_X[..., None] if stream == "communication" else value_X, shape)

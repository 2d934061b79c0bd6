"""Wasted capacity: of the places that experts keep free, how many stay empty or hold a pair that hardly counts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.capacity import Capacity
from traces.batching import Phase, make_steps
from traces.errors import InputError
from traces.trace import DECODE, RoutingTrace

CLAIM = 0.30  # "up to 30%" of the capacity of activated experts is wasted: a claim that we have no measurement for
DEFAULT_STEP_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Waste:
    """What a capacity of `places` pairs an expert wastes in steps of `tokens_per_step` tokens, by layer.

    Shares of steps taken together. `padding_L`: empty places over all experts' places; `active_padding_L`: the same of
    experts that have a pair in the step. `dropped_L`: pairs beyond their expert's places over all pairs. `below_L`:
    pairs, dropped or not, whose gate is below `gate_threshold` times the sum of the gates of the token's pairs, over
    all pairs. `wasted_L`: empty places and places of pairs below the threshold, over the places of experts that have a
    pair; pairs below the threshold are taken to be dropped first. The last two are None without gates that can be
    compared. `idle_L`: experts without a pair over all experts. What null experts get takes no place: it is no pair
    here, but its gates count in the sum of a token's. Shares of nothing are 0.
    """

    capacity_factor: float
    gate_threshold: float
    tokens_per_step: int
    steps: int
    places: int
    padding_L: tuple[float, ...]
    active_padding_L: tuple[float, ...]
    idle_L: tuple[float, ...]
    dropped_L: tuple[float, ...]
    below_L: tuple[float, ...] | None
    wasted_L: tuple[float, ...] | None
    active_padding: float
    dropped: float
    below: float | None
    wasted: float | None

    @property
    def padding(self) -> float:
        """Of all layers, which have the same places each."""
        return float(np.mean(self.padding_L))

    def to_json(self) -> dict[str, Any]:
        """The figures as a JSON object, with the claim beside them."""
        return {**asdict(self), "padding": self.padding, "claimed_up_to": CLAIM}


def capacity_waste(
    trace: RoutingTrace,
    *,
    capacity_factors: Sequence[float],
    gate_threshold: float,
    tokens_per_step: int | None = None,
) -> list[Waste]:
    """The waste at each of `capacity_factors`, where tokens use the model's own top k on one rank.

    Steps are of decode where the trace has some, else of prefill; 256 tokens by default, or as many as there are.
    Gates are compared within a token, as recorded: probabilities of any kind; recorded logits go through a softmax
    over the token's pairs first. Errors: `InputError` for steps that the trace cannot fill, for a factor that is not
    above 0, or a threshold outside 0 to 1.
    """
    for factor in capacity_factors:
        if not 0 < factor < np.inf:
            raise InputError(f"capacity factor {factor:g}; use a finite one above 0, 1.25 say")
    if not 0 <= gate_threshold <= 1:
        raise InputError(f"gate threshold {gate_threshold:g}; it is a share of a token's gates: use 0 to 1")
    phase: Phase = "decode" if (trace.phase_T == DECODE).any() else "prefill"
    of_phase = int((trace.phase_T == DECODE).sum()) or trace.tokens
    size = min(DEFAULT_STEP_TOKENS, of_phase) if tokens_per_step is None else tokens_per_step
    steps = make_steps(trace, phase=phase, tokens_per_rank=size, ranks=1)
    tokens_JT = np.stack([step.tokens_T for step in steps])
    layers = [_counts(trace, layer, tokens_JT, gate_threshold) for layer in range(trace.model.layers)]
    return [_waste(trace, layers, factor, gate_threshold, tokens_JT.shape) for factor in capacity_factors]


def why_no_gates(trace: RoutingTrace) -> str | None:
    """Why pairs cannot be told by their gates, None if they can."""
    if trace.gates_TLC is None or trace.score_kind == "none":
        return "the trace has no gates"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counts:
    """Pairs of a layer by step and expert; of them those below the threshold."""

    pairs_JE: NDArray[np.int64]
    below_JE: NDArray[np.int64] | None


def _counts(trace: RoutingTrace, layer: int, tokens_JT: NDArray[np.int64], threshold: float) -> _Counts:
    k, experts = trace.model.top_k, trace.model.experts
    steps, size = tokens_JT.shape
    tokens_N = tokens_JT.reshape(-1)
    ids_NK = trace.expert_ids_TLC[tokens_N, layer, :k]
    work_NK = ids_NK < experts
    key_NK = np.repeat(np.arange(steps), size)[:, None] * experts + ids_NK

    def count(key_X: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.bincount(key_X, minlength=steps * experts).reshape(steps, experts)

    if why_no_gates(trace) or trace.gates_TLC is None:
        return _Counts(pairs_JE=count(key_NK[work_NK]), below_JE=None)
    gate_NK = trace.gates_TLC[tokens_N, layer, :k].astype(np.float64)
    if trace.score_kind == "logits":
        gate_NK = np.exp(gate_NK - gate_NK.max(axis=1, keepdims=True))
    low_NK = gate_NK < threshold * gate_NK.sum(axis=1, keepdims=True)
    return _Counts(pairs_JE=count(key_NK[work_NK]), below_JE=count(key_NK[work_NK & low_NK]))


def _waste(
    trace: RoutingTrace, layers: Sequence[_Counts], factor: float, threshold: float, steps_shape: tuple[int, ...]
) -> Waste:
    steps, size = steps_shape
    k, experts = trace.model.top_k, trace.model.experts
    places = Capacity(factor=factor).pairs_per_expert(tokens=size, k=k, experts=experts)
    pairs_L = [int(layer.pairs_JE.sum()) for layer in layers]
    over_L = [np.maximum(layer.pairs_JE - places, 0) for layer in layers]
    used_L = [int((layer.pairs_JE > 0).sum()) for layer in layers]
    dropped_L = [int(over_JE.sum()) for over_JE in over_L]
    kept_L = [pairs - dropped for pairs, dropped in zip(pairs_L, dropped_L, strict=True)]
    empty_used_L = [used * places - kept for used, kept in zip(used_L, kept_L, strict=True)]
    places_L = [used * places for used in used_L]
    low = [layer.below_JE for layer in layers if layer.below_JE is not None]
    low_L = [int(below_JE.sum()) for below_JE in low]
    wasted_L = [
        empty + int(np.maximum(below_JE - over_JE, 0).sum())
        for empty, below_JE, over_JE in zip(empty_used_L, low, over_L, strict=False)
    ]
    return Waste(
        capacity_factor=factor,
        gate_threshold=threshold,
        tokens_per_step=size,
        steps=steps,
        places=places,
        padding_L=tuple(1 - kept / (steps * experts * places) for kept in kept_L),
        active_padding_L=_shares(empty_used_L, places_L),
        idle_L=tuple(1 - used / (steps * experts) for used in used_L),
        dropped_L=_shares(dropped_L, pairs_L),
        below_L=_shares(low_L, pairs_L) if low else None,
        wasted_L=_shares(wasted_L, places_L) if low else None,
        active_padding=_share(empty_used_L, places_L),
        dropped=_share(dropped_L, pairs_L),
        below=_share(low_L, pairs_L) if low else None,
        wasted=_share(wasted_L, places_L) if low else None,
    )


def _shares(part_L: Sequence[int], of_L: Sequence[int]) -> tuple[float, ...]:
    return tuple(part / max(of, 1) for part, of in zip(part_L, of_L, strict=True))


def _share(part_L: Sequence[int], of_L: Sequence[int]) -> float:
    return sum(part_L) / max(sum(of_L), 1)

"""Synthetic traces: routing of a known unevenness, for tests, examples and what-ifs. They are labelled as such."""

import math

import numpy as np

from traces.batching import PHASE_CODES, Phase
from traces.errors import InputError
from traces.model import ModelSpec
from traces.trace import RoutingTrace


def synthetic_trace(
    model: ModelSpec,
    *,
    tokens: int,
    zipf: float,
    seed: int,
    candidates: int | None = None,
    tokens_per_request: int = 256,
    phase: Phase = "prefill",
) -> RoutingTrace:
    """A trace whose experts are popular by Zipf's law: the r-th of a layer in proportion to r ** -zipf.

    0 is uniform. Each layer has its own random order of experts, null ones among them. A token's candidates (`top_k` of
    the model by default) are drawn without replacement in proportion to popularity (Plackett-Luce), all at once by
    adding Gumbel noise to log popularity (arXiv 1903.06059); its gates are the softmax over all experts of those sums.
    Tokens and layers are independent of each other: unlike in recorded traces, a token says nothing of the next.
    """
    C = model.top_k if candidates is None else candidates
    if not model.top_k <= C <= model.all_experts:
        raise InputError(
            f"synthetic trace: {C} candidates a token; use {model.top_k} (top_k) to {model.all_experts} (experts)"
        )
    if tokens < 1 or tokens_per_request < 1:
        raise InputError(f"synthetic trace: {tokens} tokens, {tokens_per_request} a request; use at least 1 of each")
    if not (math.isfinite(zipf) and zipf >= 0):
        raise InputError(f"synthetic trace: zipf is {zipf}; use 0 (uniform) or more")
    rng = np.random.default_rng(seed)
    expert_ids_TLC = np.empty((tokens, model.layers, C), dtype=np.uint16)
    gates_TLC = np.empty((tokens, model.layers, C), dtype=np.float16)
    log_popularity_E = -zipf * np.log(np.arange(1, model.all_experts + 1))
    for layer in range(model.layers):
        scores_TE = rng.permutation(log_popularity_E) + rng.gumbel(size=(tokens, model.all_experts))
        ids_TC = np.argsort(-scores_TE, axis=1)[:, :C]
        probs_TE = np.exp(scores_TE - scores_TE.max(axis=1, keepdims=True))
        probs_TE /= probs_TE.sum(axis=1, keepdims=True)
        expert_ids_TLC[:, layer] = ids_TC
        gates_TLC[:, layer] = np.take_along_axis(probs_TE, ids_TC, axis=1)
    token_T = np.arange(tokens, dtype=np.int32)
    return RoutingTrace(
        model=model,
        expert_ids_TLC=expert_ids_TLC,
        gates_TLC=gates_TLC,
        request_T=token_T // tokens_per_request,
        position_T=token_T % tokens_per_request,
        phase_T=np.full(tokens, PHASE_CODES[phase], dtype=np.uint8),
        score_kind="softmax",
        source=f"synthetic zipf={zipf:g} seed={seed}",
    )

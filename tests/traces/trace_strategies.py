"""Small traces for tests: one by hand, and any that Hypothesis can think of."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from traces.model import ModelSpec
from traces.trace import RoutingTrace


def tiny_model(**changes: Any) -> ModelSpec:
    shape = {"layers": 2, "experts": 4, "top_k": 2, "hidden": 8, "expert_hidden": 16}
    return ModelSpec(name="tiny", **{**shape, **changes})


def trace_of(ids_TLC: Any, gates_TLC: Any = None, *, model: ModelSpec, **columns: Any) -> RoutingTrace:
    """A trace of one prefill request, unless `columns` say otherwise."""
    ids = np.asarray(ids_TLC, dtype=np.uint16)
    tokens = ids.shape[0]
    given = {
        "request_T": np.zeros(tokens, dtype=np.int32),
        "position_T": np.arange(tokens, dtype=np.int32),
        "phase_T": np.zeros(tokens, dtype=np.uint8),
        "score_kind": "none" if gates_TLC is None else "softmax",
        "source": "by hand",
        **columns,
    }
    gates = None if gates_TLC is None else np.asarray(gates_TLC, dtype=np.float16)
    return RoutingTrace(model=model, expert_ids_TLC=ids, gates_TLC=gates, **given)


def trace_of_requests(sizes: list[int], *, phases: list[int] | None = None) -> RoutingTrace:
    """A trace of requests of these lengths, on the tiny model; ids of requests are not in order."""
    request_T = np.repeat(np.arange(len(sizes))[::-1], sizes).astype(np.int32)
    position_T = np.concatenate([np.arange(size) for size in sizes]).astype(np.int32)
    phase_T = np.repeat(phases or [0] * len(sizes), sizes).astype(np.uint8)
    ids_TLC = np.broadcast_to(np.array([0, 1]), (request_T.size, 2, 2))
    return trace_of(ids_TLC, model=tiny_model(), request_T=request_T, position_T=position_T, phase_T=phase_T)


@st.composite
def traces(draw: st.DrawFn) -> RoutingTrace:
    """Any small trace: gates of few values, so that many tie, or none at all."""
    experts = draw(st.integers(2, 9))
    candidates = draw(st.integers(1, experts))
    layers, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    model = tiny_model(layers=layers, experts=experts, top_k=draw(st.integers(1, candidates)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids_TLC = rng.permuted(np.broadcast_to(np.arange(experts), (tokens, layers, experts)), axis=2)[:, :, :candidates]
    gates_TLC = -np.sort(-rng.integers(0, 4, ids_TLC.shape) / 8, axis=2) if draw(st.booleans()) else None
    domains = draw(st.sampled_from([(), ("prose",), ("prose", "Übung 数")]))
    return trace_of(
        ids_TLC,
        gates_TLC,
        model=model,
        request_T=rng.integers(0, 3, tokens).astype(np.int32),
        position_T=np.arange(tokens, dtype=np.int32),
        phase_T=rng.integers(0, 2, tokens).astype(np.uint8),
        domains=domains,
        domain_T=rng.integers(0, len(domains), tokens).astype(np.uint8) if domains else None,
        text={"files": ["a.txt"], "from": draw(st.integers(0, 9))},
    )

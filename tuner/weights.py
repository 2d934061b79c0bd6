"""Weights: a trace as of its model with weights in another format."""

from dataclasses import replace

from cost_models.devices import dtype_bytes
from traces.trace import RoutingTrace


def in_weights(trace: RoutingTrace, dtype: str | None) -> RoutingTrace:
    """The trace of the same model with weights of `dtype` (None: its own).

    Errors: `InputError` for an unknown one.
    """
    if dtype is None:
        return trace
    return replace(trace, model=replace(trace.model, weight_bytes=dtype_bytes(dtype), weight_dtype=dtype))

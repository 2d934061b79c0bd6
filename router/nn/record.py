"""Recording the reference model: its routing trace on held-out text, and each layer's inputs for a real run."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.nn.store import TrainedModel
from router.nn.threads import one_thread
from traces.capture import RouterCapture
from traces.errors import InputError
from traces.trace import PREFILL, RoutingTrace

# Sequences a step. Fixed, so that a rerun multiplies the same shapes and gets the same bits.
_STEP_SEQUENCES = 16


def record(reference: TrainedModel, *, tokens: int, seed: int) -> RoutingTrace:
    """Route `tokens` bytes of held-out text at the model's own policy and record all candidates of each.

    These are the E experts and the null ones. Each sequence of the context's length is one request; requests take the
    domains in turn. Errors: `InputError` where `tokens` is not a multiple of the context, or more than the held-out
    text gives.
    """
    context = reference.model.config.context
    if tokens < 1 or tokens % context:
        nearest = max(context, tokens // context * context)
        raise InputError(f"tokens is {tokens}; it must be a multiple of the model's context {context}: use {nearest}")
    sequences = tokens // context
    text_NS, domain_N = reference.corpus.sequences(sequences, context, seed, use="record")
    with RouterCapture([layer.gate for layer in reference.model.moe_layers]) as capture:
        _run(reference, text_NS)
    logits_LTX = torch.from_numpy(capture.logits_LTE())
    gates_TLC, ids_LTC = np.empty((tokens, *logits_LTX.shape[::2]), dtype=np.float16), []
    source_rank_T = torch.zeros(tokens, dtype=torch.int64)
    for layer, (moe, logits_TX) in enumerate(zip(reference.model.moe_layers, logits_LTX, strict=True)):
        candidates = moe.candidates(logits_TX, source_rank_T)
        gates_TLC[:, layer] = candidates.probs_TC.numpy()
        ids_LTC.append(candidates.ids_TC.numpy())
    return RoutingTrace(
        model=reference.spec,
        expert_ids_TLC=np.stack(ids_LTC, axis=1).astype(np.uint16),
        gates_TLC=gates_TLC,
        request_T=np.repeat(np.arange(sequences, dtype=np.int32), context),
        position_T=np.tile(np.arange(context, dtype=np.int32), sequences),
        phase_T=np.full(tokens, PREFILL, dtype=np.uint8),
        domain_T=np.repeat(domain_N, context),
        domains=reference.corpus.domains,
        score_kind=reference.spec.gate,
        source=f"{reference.spec.name} model {reference.key} on {tokens} bytes of held-out text",
        text={"corpus": reference.corpus.digest, "model": reference.key, "sequences": sequences, "seed": seed},
    )


def layer_inputs(reference: TrainedModel, trace: RoutingTrace) -> Tensor:
    """What entered each MoE layer for the tokens of `trace`: [L, T, D] float32.

    Errors: `InputError` if another model or corpus gave the trace.
    """
    for field, ours in (("model", reference.key), ("corpus", reference.corpus.digest)):
        if trace.text.get(field) != ours:
            raise InputError(
                f"trace {trace.source}: its {field} is {trace.text.get(field)}, the reference model's is {ours}; "
                "record the trace again"
            )
    context = reference.model.config.context
    text_NS, _ = reference.corpus.sequences(
        int(trace.text["sequences"]), context, int(trace.text["seed"]), use="record"
    )
    with RouterCapture([layer.gate for layer in reference.model.moe_layers], keep_hidden=True) as capture:
        _run(reference, text_NS)
    rows_T = trace.request_T.astype(np.int64) * context + trace.position_T
    return torch.from_numpy(capture.hidden_LTD())[:, rows_T]


def _run(reference: TrainedModel, text_NS: NDArray[np.uint8]) -> None:
    with one_thread():
        for text_BS in torch.split(torch.from_numpy(text_NS.astype(np.int64)), _STEP_SEQUENCES):
            reference.model.routed(text_BS, reference.model.config.policy)

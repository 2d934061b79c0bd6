"""What a part of a model costs and what it still knows: loss, parameters, FLOPs, seconds on this CPU."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from router.nn.evaluate import STEP_SEQUENCES, HeldOutLoss, part_loss
from router.nn.flops import forward_flops_per_token
from router.nn.lm import LanguageModel
from router.nn.store import TrainedModel
from router.nn.text import Corpus
from router.nn.threads import one_thread
from router.subnetwork import SubNetwork
from traces.errors import InputError

MEASURED_SEQUENCES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSize:
    """How much of a model a part is.

    `activation`: pairs of a token and an expert of its own, over all that the whole model has, L * E a token.
    `active_parameters`: those that a token meets; `parameters`: all of them. `flops_per_token`: forward, in a whole
    context. Shares are over the whole model's, as the whole model runs.
    """

    activation: float
    active_parameters: int
    parameters: int
    active_share: float
    total_share: float
    flops_per_token: float
    flops_share: float

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters, float32."""
        return 4 * self.parameters

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**asdict(self), "weight_bytes": self.weight_bytes}


def size_of(model: LanguageModel, part: SubNetwork) -> PartSize:
    """The size of a part of `model`. Errors: `InputError` for a model with null experts."""
    if model.config.null_experts:
        raise InputError(
            "the size of a part hangs on how often its tokens choose null experts; it is of models without"
        )
    whole = model.config.whole
    active, total = _parameters(model, part)
    all_active, all_total = _parameters(model, whole)
    flops = forward_flops_per_token(model.config, part)
    return PartSize(
        activation=sum(part.top_k_L) / (whole.depth * whole.experts),
        active_parameters=active,
        parameters=total,
        active_share=active / all_active,
        total_share=total / all_total,
        flops_per_token=flops,
        flops_share=flops / forward_flops_per_token(model.config),
    )


def size_in_whole(trained: TrainedModel) -> PartSize:
    """The size of a trained model beside that of the model that it was cut from, which need not be there."""
    with torch.device("meta"):  # shapes without weights
        whole = LanguageModel(trained.whole_config)
    return size_of(whole, trained.part)


def _parameters(model: LanguageModel, part: SubNetwork) -> tuple[int, int]:
    """(those that a token meets, all): of a part, without making it."""
    moe = model.moe_layers[0]
    expert = sum(weight[0].numel() for weight in (moe.w_gate_EFD, moe.w_up_EFD, moe.w_down_EDF))
    layer = sum(weight.numel() for weight in model.blocks[0].parameters()) - model.config.experts * expert
    outside = sum(weight.numel() for name, weight in model.named_parameters() if not name.startswith("blocks."))
    # The router has a row an expert.
    router = (model.config.experts - part.experts) * model.config.hidden
    around = outside + part.depth * (layer - router)
    return around + sum(part.top_k_L) * expert, around + part.depth * part.experts * expert


def measured_loss(
    model: LanguageModel, corpus: Corpus, part: SubNetwork, *, sequences: int = MEASURED_SEQUENCES
) -> HeldOutLoss:
    """The loss of a part on the held-out text that no part was chosen by."""
    return part_loss(model, corpus, part, sequences=sequences)


def k_curve(
    model: LanguageModel, corpus: Corpus, top_ks: Sequence[int], *, sequences: int = MEASURED_SEQUENCES
) -> list[HeldOutLoss]:
    """The loss with each number of experts a token in all layers, paired: all on the same text."""
    whole = model.config.whole
    return [
        measured_loss(model, corpus, replace(whole, top_k_L=(top_k,) * whole.depth), sequences=sequences)
        for top_k in top_ks
    ]


def step_seconds(
    model: LanguageModel, corpus: Corpus, parts: Sequence[SubNetwork], *, rounds: int, seed: int = 0
) -> NDArray[np.float64]:
    """CPU seconds of a step of each part, cut out and run on one thread: [R, J], a row a round.

    A step is 16 sequences of the context's length. Every round runs all parts, in an order of its own, so that a
    machine that drifts slows all alike; compare inside rounds.
    """
    text_NS, _ = corpus.sequences(STEP_SEQUENCES, model.config.context, seed, use="measure")
    text_BS = torch.from_numpy(text_NS.astype(np.int64))
    models = [model.extract(part) for part in parts]
    order = np.random.default_rng(seed)
    seconds_RJ = np.zeros((rounds, len(parts)))
    with one_thread():
        for part_model in models:
            part_model.routed(text_BS, part_model.config.policy)  # warm up
        for seconds_J in seconds_RJ:
            for index in order.permutation(len(parts)):
                start_s = time.process_time()
                models[index].routed(text_BS, models[index].config.policy)
                seconds_J[index] = time.process_time() - start_s
    return seconds_RJ

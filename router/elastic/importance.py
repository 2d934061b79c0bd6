"""Importance: which experts and which layers of a model matter, measured on recorded text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from cost_models.microbench.experts import expert_mlp
from router.context import RouteContext
from router.nn.evaluate import STEP_SEQUENCES, part_loss
from router.nn.lm import LanguageModel
from router.nn.text import Corpus
from router.nn.threads import one_thread
from router.subnetwork import SubNetwork
from traces.capture import RouterCapture
from traces.errors import InputError

Score = Literal["gate_mass", "reap"]
SCORES: tuple[Score, ...] = get_args(Score)
_SEED = 1
_SEQUENCES = 128
# Depth asks for a loss of each layer that is left, again and again; layers differ by more than this text leaves open.
_LAYER_SEQUENCES = 64


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class ExpertImportance:
    """How much each expert of L' layers matters for some text: [L', E'] each.

    `tokens_LE` that use it; `gate_mass_LE`: the weight that tokens give it, summed (heavy hitters, SEER-MoE, arXiv
    2404.05089); `reap_LE`: that weight times the size of its output, the mean over the tokens that use it (REAP, arXiv
    2510.13999), 0 where none does.
    """

    tokens_LE: NDArray[np.int64]
    gate_mass_LE: NDArray[np.float64]
    reap_LE: NDArray[np.float64]

    def score_LE(self, by: Score) -> NDArray[np.float64]:
        """The scores that `by` names."""
        return self.gate_mass_LE if by == "gate_mass" else self.reap_LE


def importance_text(corpus: Corpus, length: int, domain: str | None = None) -> torch.Tensor:
    """Held-out text to choose parts by, int64 [B, length]: of all domains alike, or of one.

    It is of the half that traces are recorded on; parts are judged on the other. Errors: `InputError` for a domain that
    the corpus lacks.
    """
    if domain is None:
        text_NS, _ = corpus.sequences(_SEQUENCES, length, _SEED, use="record")
        return torch.from_numpy(text_NS.astype(np.int64))
    if domain not in corpus.domains:
        raise InputError(f"no domain {domain!r} in the text; it has {', '.join(corpus.domains)}")
    smallest = min(text.size // 2 // length for text in corpus.held_out)
    each = min(_SEQUENCES, smallest)
    text_NS, domain_N = corpus.sequences(each * len(corpus.domains), length, _SEED, use="record")
    return torch.from_numpy(text_NS[domain_N == corpus.domains.index(domain)].astype(np.int64))


@torch.no_grad()
def expert_importance(model: LanguageModel, text_BS: torch.Tensor, part: SubNetwork) -> ExpertImportance:
    """What the experts of `part` do for `text_BS` when the part runs: [L', E'], experts as the part counts them."""
    gates = [model.moe_layers[layer].gate for layer in part.layers_L]
    with one_thread(), RouterCapture(gates, keep_hidden=True) as capture:
        for step_BS in torch.split(text_BS, STEP_SEQUENCES):
            model.routed(step_BS, part.policy, part=part)
    counts_LE, mass_LE, reap_LE = [], [], []
    cut = model.extract(part)
    for layer, (moe, x_TD) in enumerate(zip(cut.moe_layers, torch.from_numpy(capture.hidden_LTD()), strict=True)):
        context = RouteContext(layer=layer, ranks=1, renormalise=model.config.renormalise, top_k=part.top_k)
        candidates = moe.candidates(moe.gate(x_TD), torch.zeros(x_TD.shape[0], dtype=torch.int64))
        assignment, _ = part.policy.route(candidates, context, {})
        expert_N, order_N = torch.sort(assignment.ids_TK[assignment.kept_TK], stable=True)
        token_N = assignment.kept_TK.nonzero()[:, 0][order_N]
        weight_N = assignment.weights_TK[assignment.kept_TK][order_N].double()
        counts_E = torch.bincount(expert_N, minlength=part.experts)
        out_ND = expert_mlp(x_TD[token_N], counts_E.tolist(), moe.w_gate_EFD, moe.w_up_EFD, moe.w_down_EDF)
        size_N = weight_N * out_ND.double().norm(dim=1)
        counts_LE.append(counts_E.numpy())
        mass_LE.append(torch.bincount(expert_N, weights=weight_N, minlength=part.experts).numpy())
        total_E = torch.bincount(expert_N, weights=size_N, minlength=part.experts)
        reap_LE.append((total_E / counts_E.clamp(min=1)).numpy())
    return ExpertImportance(tokens_LE=np.stack(counts_LE), gate_mass_LE=np.stack(mass_LE), reap_LE=np.stack(reap_LE))


def losses_without(model: LanguageModel, corpus: Corpus, part: SubNetwork) -> list[float]:
    """The loss of `part` without each of its layers in turn, nats a byte, on the text that parts are chosen by."""
    return [
        recorded_loss(model, corpus, without(part, layer), sequences=_LAYER_SEQUENCES) for layer in range(part.depth)
    ]


def recorded_loss(model: LanguageModel, corpus: Corpus, part: SubNetwork, *, sequences: int = _SEQUENCES) -> float:
    """The loss of `part` on the text that parts are chosen by, nats a byte."""
    return part_loss(model, corpus, part, sequences=sequences, use="record").mean


def without(part: SubNetwork, place: int) -> SubNetwork:
    """The part without the layer at `place` among its layers.

    >>> without(SubNetwork.whole(3, 4, 2), 1).layers_L
    (0, 2)
    """
    return of_layers(part, [layer for layer in range(part.depth) if layer != place])


def of_layers(part: SubNetwork, places: Sequence[int]) -> SubNetwork:
    """The part with the layers at `places` among its layers, and no others."""
    return SubNetwork(
        layers_L=tuple(part.layers_L[place] for place in places),
        experts_LE=tuple(part.experts_LE[place] for place in places),
        top_k_L=tuple(part.top_k_L[place] for place in places),
    )

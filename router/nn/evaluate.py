"""Held-out loss of a model under a policy: the quality axis, measured on the same text for every policy."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from numpy.typing import NDArray

from router.context import State
from router.history import RoutingHistory
from router.nn.lm import LanguageModel
from router.nn.text import Corpus, Use
from router.nn.threads import one_thread
from router.policies import RoutingPolicy
from router.prices import RoutePrices
from router.subnetwork import SubNetwork
from traces.errors import InputError

_SEED = 0
_RESAMPLES = 4000
STEP_SEQUENCES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutLoss:
    """The loss of each of N sequences, and what the policy did to get it.

    `loss_N` float64 nats a byte; `domain_N` uint8, an index into `domains`; `chosen_LE` and `kept_LE` count the
    pairs each expert was chosen for and computed, `rerouted_LE` those of the computed ones that another expert was
    chosen for first; `tokens` is the number of tokens, the same in every layer. Null experts are in none of them.
    """

    domains: tuple[str, ...]
    loss_N: NDArray[np.float64]
    domain_N: NDArray[np.uint8]
    chosen_LE: NDArray[np.int64]
    kept_LE: NDArray[np.int64]
    rerouted_LE: NDArray[np.int64]
    tokens: int

    @property
    def mean(self) -> float:
        """Nats a byte over all sequences."""
        return float(self.loss_N.mean())

    @property
    def by_domain(self) -> dict[str, float]:
        """Nats a byte of each domain."""
        return {name: float(self.loss_N[self.domain_N == index].mean()) for index, name in enumerate(self.domains)}

    @property
    def experts_per_token(self) -> float:
        """Pairs computed, a token and layer."""
        return float(self.kept_LE.sum() / (self.tokens * self.kept_LE.shape[0]))

    @property
    def dropped_share(self) -> float:
        """The share of the chosen pairs that capacity dropped."""
        return self._share_of_chosen(self.chosen_LE - self.kept_LE)

    @property
    def rerouted_share(self) -> float:
        """The share of the chosen pairs that another expert computes than the policy chose first."""
        return self._share_of_chosen(self.rerouted_LE)

    def _share_of_chosen(self, pairs_LE: NDArray[np.int64]) -> float:
        """0 where nothing was chosen: every token may have gone to null experts."""
        return float(pairs_LE.sum() / max(self.chosen_LE.sum(), 1))


def held_out_loss(
    model: LanguageModel,
    corpus: Corpus,
    policy: RoutingPolicy,
    *,
    sequences: int,
    ranks: int,
    tokens_per_rank: int,
    history: RoutingHistory | None = None,
    prices: RoutePrices | None = None,
    part: SubNetwork | None = None,
    use: Use = "measure",
) -> HeldOutLoss:
    """Run `sequences` fixed held-out sequences through `model` in steps of `ranks` * `tokens_per_rank` tokens.

    A rank holds whole sequences, and each step the same number of each domain where it can. Every call reads the
    same text, so the losses of two policies are paired. `history` and `prices` are what a policy may ask for. `part`:
    only this much of the model is there; layers and experts then count what is. `use`: which half of the held-out text;
    what is chosen by a loss is chosen on `record`, and judged on `measure`.
    Errors: `InputError` where sequences do not fill ranks or steps evenly, or the corpus has too few.
    """
    context, part = model.config.context, part or model.config.whole
    if tokens_per_rank < 1 or tokens_per_rank % context:
        raise InputError(f"tokens_per_rank is {tokens_per_rank}; it must be a multiple of the context, {context}")
    sequences_per_step = ranks * tokens_per_rank // context
    if sequences < 1 or sequences % sequences_per_step:
        raise InputError(
            f"{sequences} sequences do not fill steps of {sequences_per_step} ({ranks} ranks of {tokens_per_rank} "
            f"tokens); use a multiple of {sequences_per_step}"
        )
    text_NS, domain_N = corpus.sequences(sequences, context + 1, _SEED, use=use)
    text = torch.from_numpy(text_NS.astype(np.int64))
    source_rank_T = torch.arange(ranks).repeat_interleave(tokens_per_rank)
    chosen_LE = np.zeros((part.depth, part.experts), dtype=np.int64)
    kept_LE, rerouted_LE = np.zeros_like(chosen_LE), np.zeros_like(chosen_LE)
    states: tuple[State, ...] | None = None
    losses = []
    for text_BS in torch.split(text, sequences_per_step):
        with one_thread():
            step = model.routed(
                text_BS[:, :-1],
                policy,
                source_rank_T=source_rank_T,
                ranks=ranks,
                states=states,
                history=history,
                prices=prices,
                part=part,
            )
        states = step.states
        loss_BS = F.cross_entropy(step.logits_BSV.mT, text_BS[:, 1:], reduction="none")
        losses.append(loss_BS.double().mean(dim=1).numpy())
        for layer, assignment in enumerate(step.assignments):
            for counts_LE, pairs_TK in (
                (chosen_LE, assignment.chosen_TK),
                (kept_LE, assignment.kept_TK),
                (rerouted_LE, assignment.rerouted_TK),
            ):
                ids_N = assignment.ids_TK[pairs_TK]
                counts_LE[layer] += torch.bincount(ids_N, minlength=part.experts).numpy()
    return HeldOutLoss(
        domains=corpus.domains,
        loss_N=np.concatenate(losses),
        domain_N=domain_N,
        chosen_LE=chosen_LE,
        kept_LE=kept_LE,
        rerouted_LE=rerouted_LE,
        tokens=sequences * context,
    )


def part_loss(
    model: LanguageModel, corpus: Corpus, part: SubNetwork, *, sequences: int, use: Use = "measure"
) -> HeldOutLoss:
    """The loss of a part with its own k, on one rank, in steps of `STEP_SEQUENCES`; errors as `held_out_loss`."""
    return held_out_loss(
        model,
        corpus,
        part.policy,
        sequences=sequences,
        ranks=1,
        tokens_per_rank=STEP_SEQUENCES * model.config.context,
        part=part,
        use=use,
    )


def paired_difference(
    first: HeldOutLoss, second: HeldOutLoss, *, confidence: float = 0.95
) -> tuple[float, float, float]:
    """How much higher the loss of `first` is than that of `second`: (mean, low, high), nats a byte.

    The interval is a percentile bootstrap over sequences, paired: both policies on the same resampled sequences.
    """
    difference_N = first.loss_N - second.loss_N
    random = np.random.default_rng(_SEED)
    drawn = random.integers(difference_N.size, size=(_RESAMPLES, difference_N.size))
    tail = (1 - confidence) / 2
    low, high = np.quantile(difference_N[drawn].mean(axis=1), (tail, 1 - tail))
    return float(difference_N.mean()), float(low), float(high)

"""Context: what the tokens of a step look back on, which is what attention costs."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from traces.batching import Phase, Step
from traces.errors import InputError
from traces.trace import RoutingTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The requests of one step on each of G ranks, as even ones that cost attention the same.

    `requests_G` requests of `new_tokens_G` tokens each, that look back on `cached_tokens_G` more: float, means.
    Requests of a rank differ, so the means are such that new tokens and (query, key) pairs add up to the real ones.
    """

    phase: Phase
    requests_G: NDArray[np.float64]
    new_tokens_G: NDArray[np.float64]
    cached_tokens_G: NDArray[np.float64]

    @classmethod
    def even(cls, phase: Phase, *, ranks: int, requests: float, new_tokens: float, cached_tokens: float) -> Self:
        """The same on all ranks."""
        return cls(
            phase=phase,
            requests_G=np.full(ranks, float(requests)),
            new_tokens_G=np.full(ranks, float(new_tokens)),
            cached_tokens_G=np.full(ranks, float(cached_tokens)),
        )

    @classmethod
    def of_step(cls, trace: RoutingTrace, step: Step, *, phase: Phase, ranks: int, kv_tokens_per_rank: int = 0) -> Self:
        """The context of a step of the trace.

        A token looks back on as many as its recorded position says, so that a later chunk of a prompt costs more than
        its first; at decode each token is a request of its own. `kv_tokens_per_rank`, if not 0, is what a rank has in
        its cache instead, spread evenly over its requests: recorded requests are often shorter than a deployment's.
        """
        position_T = trace.position_T[step.tokens_T].astype(np.float64)
        source_T = step.source_rank_T
        tokens_G = np.bincount(source_T, minlength=ranks).astype(np.float64)
        if phase == "decode":
            requests_G = tokens_G
        else:
            request_T = trace.request_T[step.tokens_T].astype(np.int64)
            pair_R = np.unique(source_T * (int(request_T.max(initial=0)) + 1) + request_T, return_index=True)[1]
            requests_G = np.bincount(source_T[pair_R], minlength=ranks).astype(np.float64)
        pairs_G = np.bincount(source_T, weights=position_T + 0.5, minlength=ranks)
        some_G = np.maximum(requests_G, 1)
        new_G = np.maximum(tokens_G / some_G, 1)
        cached_G = np.maximum(pairs_G / np.maximum(tokens_G, 1) - new_G / 2, 0)
        if kv_tokens_per_rank:
            cached_G = np.full(ranks, kv_tokens_per_rank / some_G)
        return cls(phase=phase, requests_G=requests_G, new_tokens_G=new_G, cached_tokens_G=cached_G)

    def shared(self, group: int) -> Self:
        """The context of ranks that work in groups of neighbours on the requests of all of them."""
        if group == 1:
            return self
        requests_XR = self.requests_G.reshape(-1, group)
        tokens_XR = requests_XR * self.new_tokens_G.reshape(-1, group)
        requests_X, tokens_X = requests_XR.sum(axis=1), tokens_XR.sum(axis=1)
        new_X = tokens_X / np.maximum(requests_X, 1)
        back_XR = (self.cached_tokens_G + self.new_tokens_G / 2).reshape(-1, group)
        cached_X = np.maximum((tokens_XR * back_XR).sum(axis=1) / np.maximum(tokens_X, 1) - new_X / 2, 0)
        return type(self)(
            phase=self.phase,
            requests_G=np.repeat(requests_X, group),
            new_tokens_G=np.repeat(np.maximum(new_X, 1), group),
            cached_tokens_G=np.repeat(cached_X, group),
        )

    def halved(self) -> Self:
        """The context of each of two microbatches: half the requests, or half of the only one.

        The second half of a request looks back on the first, so that a half looks back on a quarter more on average.
        """
        only_G = (self.requests_G < 2) & (self.new_tokens_G >= 2)
        return type(self)(
            phase=self.phase,
            requests_G=np.where(only_G, self.requests_G, self.requests_G / 2),
            new_tokens_G=np.where(only_G, self.new_tokens_G / 2, self.new_tokens_G),
            cached_tokens_G=self.cached_tokens_G + np.where(only_G, self.new_tokens_G / 4, 0),
        )

    def padded(self, tokens: int) -> Self:
        """At decode: `tokens` requests on every rank, those that pad it with nothing to look back on."""
        if self.phase != "decode":
            raise InputError("only decode steps run in buckets of a fixed size")
        return type(self)(
            phase=self.phase,
            requests_G=np.full_like(self.requests_G, tokens),
            new_tokens_G=self.new_tokens_G,
            cached_tokens_G=self.cached_tokens_G * self.requests_G / tokens,
        )

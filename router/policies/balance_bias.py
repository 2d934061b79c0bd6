"""Balance without an auxiliary loss: a bias on each expert's score, learned from the loads as they come."""

from dataclasses import dataclass, field
from typing import ClassVar

from router.backends import Array, bincount, marked, namespace, topk
from router.candidates import Candidates
from router.context import RouteContext, State
from router.parameters import number, whole
from router.part import Need
from router.policies.base import Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceBias(Selection):
    """Every token uses the `k` experts of the largest score plus bias; the weights are the scores alone.

    After each step the bias of an expert rises by `rate` if fewer tokens than average chose it and falls by `rate` if
    more did: b += rate * sign(mean load - load), from 0 at the start. Loads become even with no loss term and no tokens
    dropped, at the price of the gate mass that the bias overrules. The formula and the rate of 0.001 are those of
    general knowledge on DeepSeek-V3's training, where the bias moves with the weights; here it moves at inference, on
    scores that stand still, and a replay of few steps may ask for a larger rate. It needs more candidates than k, and
    sees only these: an expert that a trace did not record for a token cannot be raised into reach. In a real run
    each rank counts its own tokens and has biases of its own.
    """

    name: ClassVar[str] = "balance_bias"
    source: ClassVar[str] = "Wang et al., arXiv 2408.15664"
    needs: ClassVar[tuple[Need, ...]] = ("more candidates than k",)
    k: int = field(metadata=whole(1, 8, "experts a token"))
    rate: float = field(default=1e-3, metadata=number(1e-4, 0.05, "change of a bias in a step", log=True))

    @property
    def width(self) -> int:
        """K is k itself."""
        return self.k

    def choose(self, candidates: Candidates, context: RouteContext, state: State) -> tuple[Array, State]:
        """The k best by biased score (of equal ones those of the larger score); the state holds the biases [E]."""
        ids_TC, experts = candidates.ids_TC, candidates.all_experts
        xp = namespace(candidates.probs_TC)
        bias_E = state.get("bias_E")
        if bias_E is None:
            bias_E = xp.zeros(experts, dtype=xp.float64, device=candidates.probs_TC.device)
        _, columns_TK = topk(xp.astype(candidates.probs_TC, xp.float64) + bias_E[ids_TC], self.k)
        chosen_TK = xp.take_along_axis(ids_TC, columns_TK, axis=1)
        load_E = bincount(xp.reshape(chosen_TK, (-1,)), experts)
        under_E = xp.sign(candidates.tokens * self.k - experts * load_E)
        next_state = {"bias_E": bias_E + self.rate * xp.astype(under_E, xp.float64)}
        return marked(columns_TK, candidates.count), next_state

"""Candidates: what a router offers for one step of one layer, before a policy chooses."""

from dataclasses import dataclass, replace
from typing import Self

from router.backends import Array, namespace, topk
from traces.model import ScoreKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The best C experts of each of T tokens, best first.

    `ids_TC` integer expert ids; `probs_TC` their scores, descending, floating; `source_rank_T` the rank
    that holds each token before dispatch; `experts` is E; `score_kind` says what the scores are.
    """

    ids_TC: Array
    probs_TC: Array
    source_rank_T: Array
    experts: int
    score_kind: ScoreKind

    @property
    def tokens(self) -> int:
        """T."""
        return int(self.ids_TC.shape[0])

    @property
    def count(self) -> int:
        """C, the candidates a token."""
        return int(self.ids_TC.shape[1])

    @classmethod
    def from_logits(cls, logits_TE: Array, source_rank_T: Array) -> Self:
        """All experts as candidates, scored by softmax over `logits_TE` [T, E]."""
        xp = namespace(logits_TE)
        exp_TE = xp.exp(logits_TE - xp.max(logits_TE, axis=-1, keepdims=True))
        probs_TE = exp_TE / xp.sum(exp_TE, axis=-1, keepdims=True)
        probs_TC, ids_TC = topk(probs_TE, probs_TE.shape[1])
        return cls(
            ids_TC=ids_TC,
            probs_TC=probs_TC,
            source_rank_T=source_rank_T,
            experts=int(logits_TE.shape[1]),
            score_kind="softmax",
        )

    def best(self, count: int) -> Self:
        """The same step with only the best `count` candidates a token."""
        return replace(self, ids_TC=self.ids_TC[:, :count], probs_TC=self.probs_TC[:, :count])

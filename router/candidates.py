"""Candidates: what a router offers for one step of one layer, before a policy chooses."""

from dataclasses import dataclass, replace
from typing import Self

from router.backends import Array, namespace, on_host, topk
from traces.errors import InputError
from traces.model import GateKind, ScoreKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The best C experts of each of T tokens, best first.

    `ids_TC` integer expert ids; `probs_TC` their scores, descending, floating; `source_rank_T` the rank
    that holds each token before dispatch; `experts` is E; `score_kind` says what the scores are. Ids from E to
    E + `null_experts` - 1 are experts that do no work, in models that have such.

    Errors: `InputError` where a score is NaN (not looked for on a GPU, which would have to be waited for).
    """

    ids_TC: Array
    probs_TC: Array
    source_rank_T: Array
    experts: int
    score_kind: ScoreKind
    null_experts: int = 0

    def __post_init__(self) -> None:
        if on_host(self.probs_TC):
            nan_T = namespace(self.probs_TC).isnan(self.probs_TC).any(axis=1)
            if bool(nan_T.any()):
                token = nan_T.tolist().index(True)
                raise InputError(
                    f"token {token} of the step has a score that is NaN; its router overflowed or was recorded wrong"
                )

    @property
    def all_experts(self) -> int:
        """E and the null experts: as many candidates as a token can have."""
        return self.experts + self.null_experts

    @property
    def tokens(self) -> int:
        """T."""
        return int(self.ids_TC.shape[0])

    @property
    def count(self) -> int:
        """C, the candidates a token."""
        return int(self.ids_TC.shape[1])

    @classmethod
    def from_logits(
        cls, logits_TE: Array, source_rank_T: Array, *, gate: GateKind = "softmax", null_experts: int = 0
    ) -> Self:
        """All experts as candidates, scored by softmax or sigmoid of `logits_TE` [T, E + null experts]."""
        xp = namespace(logits_TE)
        if gate == "softmax":
            exp_TE = xp.exp(logits_TE - xp.max(logits_TE, axis=-1, keepdims=True))
            probs_TE = exp_TE / xp.sum(exp_TE, axis=-1, keepdims=True)
        else:
            probs_TE = 1 / (1 + xp.exp(-logits_TE))
        probs_TC, ids_TC = topk(probs_TE, probs_TE.shape[1])
        return cls(
            ids_TC=ids_TC,
            probs_TC=probs_TC,
            source_rank_T=source_rank_T,
            experts=int(logits_TE.shape[1]) - null_experts,
            score_kind=gate,
            null_experts=null_experts,
        )

    def best(self, count: int) -> Self:
        """The same step with only the best `count` candidates a token."""
        if count >= self.count:
            return self
        return replace(self, ids_TC=self.ids_TC[:, :count], probs_TC=self.probs_TC[:, :count])

"""Opportunistic expert activation: no expert is read for the sake of a token's later choices alone."""

from dataclasses import dataclass, field
from typing import ClassVar

from router.backends import Array, bincount, first_true, namespace
from router.candidates import Candidates
from router.context import RouteContext, State
from router.parameters import choice, whole
from router.policies.base import Adjustment
from router.policies.scope import Scope, scopes_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Opportunistic(Adjustment):
    """A token keeps, of its chosen experts, those that are among the best `k0` of some token of the step.

    The experts that are read are the union of every token's best `k0`; further choices ride along on what is read
    anyway. It helps at decode with few tokens in all, where an expert's time is the read of its weights and much of the
    model would be read for one token each; with many tokens the union of even the first choices is every expert, and
    nothing changes. It needs no more candidates than k and moves no token to an expert that it did not choose, as in
    its paper; the union is taken over `scope`. `k0` of k or more changes nothing.
    """

    name: ClassVar[str] = "opportunistic"
    source: ClassVar[str] = "opportunistic expert activation, arXiv 2511.02237"
    k0: int = field(metadata=whole(1, 8, "best experts of each token that are read in any case"))
    scope: Scope = field(default="source_rank", metadata=choice(("source_rank", "global"), "whose tokens it sees"))

    @property
    def passes(self) -> int:
        """To look at the step, and to choose."""
        return 2

    def adjust(
        self, used_TC: Array, candidates: Candidates, context: RouteContext, state: State
    ) -> tuple[Array, State]:
        """Those chosen that are in the union; null experts, which are never read, stay."""
        xp = namespace(used_TC)
        experts = candidates.all_experts
        scope_T, scopes = scopes_of(candidates.source_rank_T, context.ranks, self.scope)
        key_TC = scope_T[:, None] * experts + candidates.ids_TC
        read_N = bincount(key_TC[first_true(used_TC, self.k0)], scopes * experts) > 0
        kept_TC = used_TC & read_N[key_TC]
        if candidates.null_experts:
            kept_TC = kept_TC | (used_TC & (candidates.ids_TC >= candidates.experts))
        return xp.asarray(kept_TC), state

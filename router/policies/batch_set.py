"""One set of experts for a whole batch: the best ones under a budget for each rank."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from router.backends import Array, namespace, segment_sum
from router.candidates import Candidates
from router.context import RouteContext, State
from router.openings import in_units, serve_open, to_host
from router.parameters import choice, share
from router.part import Need
from router.policies.base import Adjustment
from router.policies.scope import Scope, by_scope


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSet(Adjustment):
    """Only some of each rank's experts are active in a step: those to which its tokens give most gate mass.

    Experts join the set in the order of the gate mass that all tokens' candidates give them, as long as each rank that
    holds them has fewer than `active_share` of its own experts in it, at least one. As the mass of a set is the sum
    over its experts, this greedy set is the best one where each expert is on one rank. Each token then takes as many
    experts as it chose, the best of the set among all its candidates, and its own first where it has none there. The
    time of a decode step falls with the budget, evenly over ranks. It needs candidates beyond k and a placement. Its
    paper's set counts routing scores of all experts; here those of the candidates that were recorded.
    """

    name: ClassVar[str] = "batch_set"
    source: ClassVar[str] = "after XShare, arXiv 2602.07265"
    needs: ClassVar[tuple[Need, ...]] = ("placement and prices", "more candidates than k")
    active_share: float = field(metadata=share(0.3, 1.0, "share of each rank's experts that a step may use"))
    scope: Scope = field(default="source_rank", metadata=choice(("source_rank", "global"), "whose tokens it sees"))

    @property
    def passes(self) -> int:
        """To look at the step, and to choose."""
        return 2

    def adjust(
        self, used_TC: Array, candidates: Candidates, context: RouteContext, state: State
    ) -> tuple[Array, State]:
        """The best of each token's candidates in the set of its scope."""
        xp = namespace(used_TC)
        holds_EG = context.prices_for(self.name).share_LEG[context.layer] > 0
        if self.active_share == 1 or not candidates.tokens:
            return used_TC, state
        limits_T = xp.sum(xp.astype(used_TC, xp.int64), axis=1)
        scores_TC = in_units(candidates.probs_TC)

        def best_in_set(rows: Any, source: int | None) -> Array:
            scope_TC, ids_TC = scores_TC[rows], candidates.ids_TC[rows]
            mass_E = segment_sum(xp.reshape(scope_TC, (-1,)), xp.reshape(ids_TC, (-1,)), candidates.all_experts)
            open_E = np.ones(candidates.all_experts, dtype=np.bool_)
            open_E[: candidates.experts] = self.best_set(to_host(mass_E)[: candidates.experts], holds_EG)
            sources_T = candidates.source_rank_T[rows]
            plan, _ = serve_open(scope_TC, ids_TC, limits_T[rows], sources_T, open_E=open_E, sources=context.ranks)
            return plan.used_TC

        return by_scope(best_in_set, used_TC, candidates.source_rank_T, context.ranks, self.scope), state

    def best_set(self, mass_E: NDArray[np.float64], holds_EG: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which experts are in the set; ties go to the lower expert."""
        room_G = np.maximum(np.floor(self.active_share * holds_EG.sum(axis=0) + 1e-9), 1)
        chosen_E = np.zeros(mass_E.size, dtype=np.bool_)
        for expert in np.argsort(-mass_E, kind="stable"):
            if (room_G[holds_EG[expert]] > 0).all():
                chosen_E[expert] = True
                room_G[holds_EG[expert]] -= 1
        return chosen_E

"""Cache-aware routing: experts whose weights are at hand get a bonus."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from router.backends import Array, best_of_row, bincount, namespace
from router.candidates import Candidates
from router.context import RouteContext, State
from router.openings import to_host
from router.parameters import number, share, whole
from router.part import Need
from router.policies.base import Adjustment

# Logarithms of two backends may differ in their last bit. In whole numbers of this unit they do not.
_LOG_UNIT = 2.0**-20
_SMALLEST = 2.0**-40  # a score under which logarithms say nothing more


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAware(Adjustment):
    """Experts that earlier steps left in a layer's cache get a bonus on their logarithmic score.

    The bonus is `bonus` times the running mean, over all tokens so far, of how far a token's logarithmic scores spread
    over its candidates, so that it means the same on every layer and model: at 1 an expert in the cache wins over
    almost any that is not. The best `protected` choices of a token stay, whatever the cache holds; then come the
    candidates of the largest score with bonus, as many as the token chose. The cache holds the `cache_share` of the
    layer's experts that were used last (LRU; of those used in one step, the ones with more rows, then the lower ids).
    It helps where weights are loaded from slower memory, and needs candidates beyond k. In its paper the router decides
    token by token on one device; here all tokens of a step see the cache as it was before the step. In a real run each
    rank remembers what its own tokens used.
    """

    name: ClassVar[str] = "cache_aware"
    source: ClassVar[str] = "Skliar et al., arXiv 2412.00099"
    needs: ClassVar[tuple[Need, ...]] = ("more candidates than k",)
    bonus: float = field(metadata=number(0, 1, "bonus of a cached expert, in mean spreads of the log scores"))
    cache_share: float = field(metadata=share(0.1, 0.9, "share of a layer's experts that the cache holds"))
    protected: int = field(default=1, metadata=whole(1, 4, "best choices of a token that stay", least=0))

    @property
    def passes(self) -> int:
        """To look at the step, and to choose."""
        return 2

    def adjust(
        self, used_TC: Array, candidates: Candidates, context: RouteContext, state: State
    ) -> tuple[Array, State]:
        """The best by score and bonus.

        The state: `last_E` the step in which each expert was last used (-1: never) and `rows_E` its rows then, `step`,
        the sum of `spreads` in units of 2**-20 and the `tokens` that it is of, and of the experts that steps used so
        far how many were `hits` in the cache and how many were `reads` in all.
        """
        xp = namespace(used_TC)
        experts = candidates.all_experts
        state = state or {
            "last_E": np.full(experts, -1, dtype=np.int64),
            "rows_E": np.zeros(experts, dtype=np.int64),
            "step": 0,
            "spreads": 0.0,
            "tokens": 0,
            "hits": 0,
            "reads": 0,
        }
        if not candidates.tokens:
            return used_TC, state
        probs_TC = xp.astype(candidates.probs_TC, xp.float64)
        log_TC = xp.round(xp.log(xp.where(probs_TC > _SMALLEST, probs_TC, _SMALLEST)) / _LOG_UNIT)
        spreads = state["spreads"] + float(xp.sum(log_TC[:, 0] - log_TC[:, -1]))
        tokens = state["tokens"] + candidates.tokens
        cached_E = self.cached(state["last_E"], state["rows_E"], candidates.experts)
        adjusted_TC = used_TC
        if self.bonus and cached_E.any():
            bonus = round(self.bonus * spreads / tokens)
            is_cached_TC = xp.asarray(cached_E, device=used_TC.device)[candidates.ids_TC]
            stays_TC = used_TC & (xp.cumulative_sum(xp.astype(used_TC, xp.int64), axis=1) <= self.protected)
            score_TC = xp.where(stays_TC, xp.inf, log_TC + bonus * xp.astype(is_cached_TC, xp.float64))
            adjusted_TC = best_of_row(score_TC, xp.sum(xp.astype(used_TC, xp.int64), axis=1))
        rows_E = to_host(bincount(candidates.ids_TC[adjusted_TC], experts))
        read_E = rows_E > 0
        return adjusted_TC, {
            "last_E": np.where(read_E, state["step"], state["last_E"]),
            "rows_E": np.where(read_E, rows_E, state["rows_E"]),
            "step": state["step"] + 1,
            "spreads": spreads,
            "tokens": tokens,
            "hits": state["hits"] + int((read_E & cached_E)[: candidates.experts].sum()),
            "reads": state["reads"] + int(read_E[: candidates.experts].sum()),
        }

    def cached(self, last_E: NDArray[np.int64], rows_E: NDArray[np.int64], experts: int) -> NDArray[np.bool_]:
        """Which experts the cache holds: of those ever used, the ones used last; never null experts."""
        order_E = np.lexsort((np.arange(experts), -rows_E[:experts], -last_E[:experts]))
        cached_E = np.zeros(last_E.size, dtype=np.bool_)
        cached_E[order_E[: int(self.cache_share * experts + 1e-9)]] = True
        return cached_E & (last_E >= 0)

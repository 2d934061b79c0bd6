"""Dynamic k that holds a budget: top-p whose share is moved until tokens use as many experts as they should."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from router.backends import Array, namespace, nth_largest
from router.candidates import Candidates
from router.context import RouteContext, State
from router.parameters import number, whole
from router.policies.base import Selection
from router.policies.top_p import reach

# The log odds of p stay within this: p from 0.00001 to 0.99999 of what scores can sum to.
_MOST_ODDS = 12.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldTopP(Selection):
    """A token uses its best experts until their scores reach p; p is moved so that tokens use `target` on average.

    Confident tokens use few experts and others more, as in `top_p`, but what a step costs is set in advance, in every
    layer, and stays when traffic changes. It needs nothing but scores; a `k_max` well over `target` leaves it something
    to trade. After each step a proportional-integral controller (`gain`, `integral_gain`) moves p by how far the step
    was off, as a share of the target. It steers the log odds of p, so that the same gains do for flat and for
    peaked routers (the paper steers p itself, at every training step; it also normalises scores in each layer, which is
    left out here). The first step, which has no p yet, takes the one that meets the target on its own tokens. While
    tokens already use one or `k_max` experts each and p can help no further, the integral stays (anti-windup). A target
    over `k_max` gives everybody `k_max`. In a real run each rank has a controller of its own, over its own tokens; on a
    GPU the count of experts is waited for.
    """

    name: ClassVar[str] = "held_top_p"
    source: ClassVar[str] = "DTop-p, arXiv 2512.13996"
    target: float = field(metadata=number(1.0, 6.0, "experts a token to hold", step=0.25, least=1.0))
    k_max: int = field(metadata=whole(2, 8, "most experts a token"))
    gain: float = field(default=0.2, metadata=number(0.0, 0.5, "answer to the last step's error", step=0.05))
    integral_gain: float = field(
        default=0.4, metadata=number(0.1, 0.8, "answer to the sum of errors", step=0.05, least=0.001)
    )

    @property
    def width(self) -> int:
        """K is k_max."""
        return self.k_max

    def choose(self, candidates: Candidates, context: RouteContext, state: State) -> tuple[Array, State]:
        """Those before which the sum is under p; the state holds p and the integral, the log odds without the gain."""
        probs_TK = candidates.best(self.k_max).probs_TC
        # Scores of a softmax sum to one over all experts; each of a sigmoid reaches one by itself.
        most_p = float(self.k_max) if candidates.score_kind == "sigmoid" else 1.0
        if candidates.tokens == 0:
            return reach(probs_TK, 0.0), state
        if not state:
            share = self._first_p(probs_TK, most_p) / most_p
            odds = _bounded(math.log(max(share, 1e-9) / max(1 - share, 1e-9)))
            state = {"p": most_p / (1 + math.exp(-odds)), "integral": odds}
        used_TK = reach(probs_TK, state["p"])
        xp = namespace(used_TK)
        mean_k = int(xp.sum(xp.astype(used_TK, xp.int64))) / candidates.tokens
        error = max(1 - mean_k / self.target, -1.0)
        stuck = mean_k >= self.k_max if error > 0 else mean_k <= 1
        integral = state["integral"] if stuck else _bounded(state["integral"] + self.integral_gain * error)
        odds = _bounded(integral + self.gain * error)
        return used_TK, {"p": most_p / (1 + math.exp(-odds)), "integral": integral}

    def _first_p(self, probs_TK: Array, most_p: float) -> float:
        """Midway from the sum before the last pair that makes `target` experts a token to that before the next."""
        xp = namespace(probs_TK)
        probs_TK = xp.astype(probs_TK, xp.float64)
        before_N1 = xp.reshape(xp.cumulative_sum(probs_TK, axis=1) - probs_TK, (-1, 1))
        all_N1, pairs = xp.zeros_like(before_N1, dtype=xp.int64), int(before_N1.shape[0])
        wanted = min(int(self.target * probs_TK.shape[0]), pairs)
        last = float(nth_largest(before_N1, all_N1, 1, pairs - wanted + 1)[0])
        if wanted == pairs:
            return (last + most_p) / 2
        return (last + float(nth_largest(before_N1, all_N1, 1, pairs - wanted)[0])) / 2


def _bounded(odds: float) -> float:
    return min(max(odds, -_MOST_ODDS), _MOST_ODDS)

"""Dynamic k by confidence: as many experts as it takes to reach a share of the gate mass."""

from dataclasses import dataclass
from typing import ClassVar

from router.backends import Array, namespace
from router.policies.base import Selection, check_count
from traces.errors import InputError

# Backends add in different orders. Recorded scores are good to three digits, so that a sum this near p has reached it.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class TopP(Selection):
    """A token uses its best experts until their scores reach `p` (arXiv 2403.07652), at most `k_max`.

    k_t = min{k : sum of the k best scores >= p}. Scores are taken as recorded, so on a model whose recorded
    scores sum to one over the chosen k, `p` is a share of those k, and the result is not comparable with
    a full softmax.
    """

    name: ClassVar[str] = "top_p"
    p: float
    k_max: int

    def __post_init__(self) -> None:
        check_count("top_p", "k_max", self.k_max)
        if not 0 <= self.p <= 1:
            raise InputError(f"policy top_p: p is {self.p}; it is a share, from 0 to 1")

    @property
    def width(self) -> int:
        """K is k_max."""
        return self.k_max

    def use(self, probs_TK: Array) -> Array:
        """Those before which the sum is still under p."""
        xp = namespace(probs_TK)
        probs_TK = xp.astype(probs_TK, xp.float64)
        before_TK = xp.cumulative_sum(probs_TK, axis=-1) - probs_TK
        used_TK = before_TK < self.p - _ROUNDING
        used_TK[:, 0] = True
        return used_TK

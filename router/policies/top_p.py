"""Dynamic k by confidence: as many experts as it takes to reach a share of the gate mass."""

from dataclasses import dataclass, field
from typing import ClassVar

from router.backends import Array, namespace
from router.parameters import share, whole
from router.policies.base import Selection

# Backends add in different orders. Recorded scores are good to three digits, so that a sum this near p has reached it.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class TopP(Selection):
    """A token uses its best experts until their scores reach `p`, at most `k_max`.

    k_t = min{k : sum of the k best scores >= p}: tokens whose router is sure use few experts, others many. It helps
    where tokens differ in how sure their router is; how many experts a step uses follows from its tokens and is not
    bounded (`held_top_p` holds it). The paper trains with it; here it meets a model of fixed k. Scores are taken as
    recorded, so on a model whose recorded scores sum to one over the chosen k, `p` is a share of those k, and the
    result is not comparable with a full softmax.
    """

    name: ClassVar[str] = "top_p"
    source: ClassVar[str] = "Huang et al., arXiv 2403.07652"
    p: float = field(metadata=share(0.3, 0.95, "gate mass to reach"))
    k_max: int = field(metadata=whole(2, 8, "most experts a token"))

    @property
    def width(self) -> int:
        """K is k_max."""
        return self.k_max

    def use(self, probs_TK: Array) -> Array:
        """Those before which the sum is still under p."""
        return reach(probs_TK, self.p)


def reach(probs_TK: Array, p: float) -> Array:
    """The best candidates before which the sum of scores is still under `p`, the first in any case: bool [T, K]."""
    xp = namespace(probs_TK)
    probs_TK = xp.astype(probs_TK, xp.float64)
    before_TK = xp.cumulative_sum(probs_TK, axis=-1) - probs_TK
    used_TK = before_TK < p - _ROUNDING
    used_TK[:, 0] = True
    return used_TK

"""Expert skipping: leave out the experts whose gate is small beside the token's best."""

from dataclasses import dataclass, field
from typing import ClassVar

from router.backends import Array
from router.parameters import number, whole
from router.policies.base import Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip(Selection):
    """Of its `k_max` best experts a token skips each whose score is under `threshold` times its best score.

    Tokens whose router is sure of its first expert do with few. It helps where scores fall steeply, needs nothing but
    scores, and does not bound what a step costs. One threshold for all layers, left to the tuner; `skip_by_ratio` sets
    one a layer from earlier traffic, as the paper does.
    """

    name: ClassVar[str] = "skip"
    source: ClassVar[str] = "after NAEE, arXiv 2402.14800"
    threshold: float = field(metadata=number(0.05, 0.9, "share of the best score under which an expert is skipped"))
    k_max: int = field(metadata=whole(2, 8, "most experts a token"))

    @property
    def width(self) -> int:
        """K is k_max."""
        return self.k_max

    def use(self, probs_TK: Array) -> Array:
        """Those not under the threshold."""
        return not_under(probs_TK, self.threshold)


def not_under(probs_TK: Array, threshold: float) -> Array:
    """The candidates of at least `threshold` times the best one's score, the first in any case: bool [T, K]."""
    used_TK = probs_TK >= threshold * probs_TK[:, :1]
    used_TK[:, 0] = True
    return used_TK

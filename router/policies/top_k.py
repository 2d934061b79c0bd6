"""Fixed k: the gate of nearly every deployed mixture of experts."""

from dataclasses import dataclass, field
from typing import ClassVar

from router.backends import Array, namespace
from router.parameters import whole
from router.policies.base import Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK(Selection):
    """Every token uses its `k` best experts.

    The gate that models are trained with, and the yardstick of every other policy. At run time `k` is a knob: fewer
    experts than in training cost quality, more rarely gain any.
    """

    name: ClassVar[str] = "top_k"
    source: ClassVar[str] = "Shazeer et al., arXiv 1701.06538"
    k: int = field(metadata=whole(1, 8, "experts a token"))

    @property
    def width(self) -> int:
        """K is k itself."""
        return self.k

    def use(self, probs_TK: Array) -> Array:
        """All k of them."""
        xp = namespace(probs_TK)
        return xp.ones_like(probs_TK, dtype=xp.bool)

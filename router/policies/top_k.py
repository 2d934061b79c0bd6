"""Fixed k: the gate of nearly every deployed mixture of experts."""

from dataclasses import dataclass
from typing import ClassVar

from router.backends import Array, namespace
from router.policies.base import Selection, check_count


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK(Selection):
    """Every token uses its `k` best experts (Shazeer et al., arXiv 1701.06538)."""

    name: ClassVar[str] = "top_k"
    k: int

    def __post_init__(self) -> None:
        check_count("top_k", "k", self.k)

    @property
    def width(self) -> int:
        """K is k itself."""
        return self.k

    def use(self, probs_TK: Array) -> Array:
        """All k of them."""
        xp = namespace(probs_TK)
        return xp.ones_like(probs_TK, dtype=xp.bool)

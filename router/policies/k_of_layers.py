"""Fixed k, given for every layer: what a sub-network was cut to."""

from dataclasses import dataclass
from typing import ClassVar

from router.backends import Array, namespace
from router.candidates import Candidates
from router.context import RouteContext, State
from router.policies.base import Selection
from router.policies.top_k import TopK
from traces.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class KOfLayers(Selection):
    """Every token uses its `k_L[l]` best experts in layer l.

    It is no policy to search: a sub-network brings it (`router.subnetwork`). To find the k of each layer under a
    budget is the business of `top_k_by_layer`.
    """

    name: ClassVar[str] = "top_k"
    source: ClassVar[str] = "M-MoE, arXiv 2509.26520"
    k_L: tuple[int, ...]

    @property
    def width(self) -> int:
        """K is the largest of them."""
        return max(self.k_L)

    def choose(self, candidates: Candidates, context: RouteContext, state: State) -> tuple[Array, State]:
        """The k_l best candidates of every token."""
        if context.layer >= len(self.k_L):
            raise InputError(f"top_k of {len(self.k_L)} layers was asked for layer {context.layer}; give one a layer")
        probs_TK = candidates.best(self.k_L[context.layer]).probs_TC
        xp = namespace(probs_TK)
        return xp.ones_like(probs_TK, dtype=xp.bool), state


def fixed_k(k_L: tuple[int, ...]) -> Selection:
    """Top-k of these layers: the plain `TopK` where all have the same."""
    return TopK(k=k_L[0]) if len(set(k_L)) == 1 else KOfLayers(k_L=k_L)

"""Null experts: experts that do no work compete with the real ones for a token's k places."""

from dataclasses import dataclass, field
from typing import ClassVar

from router.backends import Array, namespace
from router.candidates import Candidates
from router.parameters import whole
from router.part import Need
from router.policies.base import Selection
from traces.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class NullExperts(Selection):
    """Every token uses the `k` best of real and null experts together, and only the real ones cost anything.

    The gate of models that were trained with null experts, which return zero (AdaMoE) or also a copy of their input or
    a constant (MoE++): easy tokens take more of these, so that the number of real experts follows the token. A token
    may get none. It needs a model that has such experts, and candidates that name them; `top_k` on such a model is
    the same gate. The weights of the real experts are scaled among themselves where the model scales at all, as
    AdaMoE does.
    """

    name: ClassVar[str] = "null_experts"
    source: ClassVar[str] = "AdaMoE, arXiv 2406.13233; MoE++, arXiv 2410.07348"
    needs: ClassVar[tuple[Need, ...]] = ("null experts",)
    k: int = field(metadata=whole(1, 8, "experts a token, real and null ones"))

    @property
    def width(self) -> int:
        """K is k: a token may take no null expert."""
        return self.k

    def check(self, candidates: Candidates) -> None:
        """Raise `InputError` for a model without null experts."""
        if not candidates.null_experts:
            raise InputError(
                f"policy {self.name} needs null experts, and the model has only its {candidates.experts} real ones: "
                "use top_k, or a model that was trained with null experts"
            )
        Selection.check(self, candidates)

    def use(self, probs_TK: Array) -> Array:
        """All k of them, of either kind."""
        xp = namespace(probs_TK)
        return xp.ones_like(probs_TK, dtype=xp.bool)

"""Expert choice: experts take the tokens that score highest for them, so that all have the same load."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from router.backends import Array, first_true, largest_fitting, namespace, nth_largest
from router.candidates import Candidates
from router.context import RouteContext, State
from router.parameters import choice, number, whole
from router.part import Need
from router.policies.base import Selection

# How much of a running threshold is kept from step to step.
_KEPT = 0.9
# A float product such as 8 * 1.1 * 10 / 8 may pass the whole number it stands for by its last bit.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertChoice(Selection):
    """Each expert takes the C = ceil(T * factor / E) tokens of the step that score highest for it.

    So every expert has the same load and nothing is dropped, while tokens get few or many experts, `factor` on average:
    none at all where no expert asked for them. `k_max` is the most that one token uses; of more than these it keeps its
    best, and the places stay empty (the paper has a variant that fills them by solving a linear programme, not built).
    It needs full scores. `batch` is the paper's: a token's experts depend on which tokens stand in the step, later ones
    of its own text included, so that it is for evaluation only, never for a model that generates. `threshold` is
    causal: an expert takes each token that reaches its running threshold, which moves a tenth of the way to each step's
    own C-th highest score after it; only the first step, which has nothing to go by, uses its own scores. Loads are
    then even over time only, and steps with fewer tokens than E / factor, whose C cannot be under one, settle on more
    experts than `factor`. Of equal scores `batch` takes the earlier token, `threshold` both. The formula for C is
    general knowledge. In a real run each rank's tokens compete among themselves.
    """

    name: ClassVar[str] = "expert_choice"
    source: ClassVar[str] = "Zhou et al., arXiv 2202.09368"
    needs: ClassVar[tuple[Need, ...]] = ("full scores",)
    factor: float = field(metadata=number(1.0, 8.0, "experts a token on average", step=0.25, least=0.01))
    k_max: int = field(metadata=whole(2, 8, "most experts a token"))
    mode: Literal["batch", "threshold"] = field(
        default="threshold",
        metadata=choice(("batch", "threshold"), "by the whole step (evaluation only), or by running thresholds"),
    )

    @property
    def passes(self) -> int:
        """To look at the step, and to choose."""
        return 2

    @property
    def width(self) -> int:
        """K is k_max."""
        return self.k_max

    def choose(self, candidates: Candidates, context: RouteContext, state: State) -> tuple[Array, State]:
        """The candidates that took the token; the state holds the thresholds [E] of `threshold`."""
        probs_TC, ids_TC = candidates.probs_TC, candidates.ids_TC
        xp = namespace(probs_TC)
        tokens, experts = candidates.tokens, candidates.all_experts
        if tokens == 0:
            return xp.zeros_like(probs_TC, dtype=xp.bool), state
        places = min(math.ceil(tokens * self.factor / experts - _ROUNDING), tokens)
        if self.mode == "batch":
            places_E = xp.full((experts,), places, dtype=xp.int64, device=ids_TC.device)
            taken_N = largest_fitting(xp.reshape(ids_TC, (-1,)), places_E, xp.reshape(probs_TC, (-1,)))
            taken_TC = xp.reshape(taken_N, probs_TC.shape)
        else:
            last_E = xp.astype(nth_largest(probs_TC, ids_TC, experts, places), xp.float64)
            threshold_E = state.get("threshold_E", last_E)
            taken_TC = xp.astype(probs_TC, xp.float64) >= threshold_E[ids_TC]
            state = {"threshold_E": _KEPT * threshold_E + (1 - _KEPT) * last_E}
        return first_true(taken_TC, self.k_max), state

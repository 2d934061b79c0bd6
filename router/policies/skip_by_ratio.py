"""Expert skipping with a threshold of its own in every layer, set by earlier traffic."""

from dataclasses import dataclass, field
from typing import ClassVar

from router.backends import Array
from router.candidates import Candidates
from router.context import RouteContext, State
from router.parameters import share, whole
from router.part import Need
from router.policies.base import Selection
from router.policies.skip import not_under


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipByRatio(Selection):
    """Of its `k_max` best experts a token skips each whose score is under beta_l times its best score.

    beta_l is the `quantile` of the ratio of a token's second score to its best among earlier tokens of layer l; 0.5,
    the median, is the paper's. So every layer skips as the spread of its own scores allows, where `skip` asks all for
    the same ratio. It helps models of few experts a token most. The paper has two experts a token, of which the second
    may go, and half of the second ones do; with a larger `k_max` the same bound applies to every further expert, and
    since these lie lower, more than half of them go.
    """

    name: ClassVar[str] = "skip_by_ratio"
    source: ClassVar[str] = "NAEE, arXiv 2402.14800"
    needs: ClassVar[tuple[Need, ...]] = ("earlier traffic",)
    quantile: float = field(metadata=share(0.05, 0.95, "quantile of earlier ratios under which an expert is skipped"))
    k_max: int = field(metadata=whole(2, 8, "most experts a token"))

    @property
    def width(self) -> int:
        """K is k_max."""
        return self.k_max

    def choose(self, candidates: Candidates, context: RouteContext, state: State) -> tuple[Array, State]:
        """Those not under the layer's bound."""
        beta = context.history_for(self.name).best_ratio(context.layer, self.quantile)
        return not_under(candidates.best(self.k_max).probs_TC, beta), state

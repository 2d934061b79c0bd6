"""Group-limited routing: a token's experts come from few groups, so that it travels to few nodes."""

from dataclasses import dataclass, field
from typing import ClassVar

from router.backends import Array, best_in_groups, first_true, marked, namespace, topk
from router.candidates import Candidates
from router.context import RouteContext, State
from router.parameters import whole
from router.part import Need
from router.policies.base import Selection
from traces.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLimited(Selection):
    """Every token uses the `k` best experts of its `kept_groups` best groups.

    Experts stand in `groups` groups of neighbours, a group on each node where the placement keeps their order; a group
    counts as much as its best k / kept_groups experts (rounded down, one at least) together. So a token is sent to
    few nodes, for a little gate mass. It needs full scores: what a group is worth shows only in all its experts.
    DeepSeek-V2 scored a group by its single best expert, V3 by the best k / kept_groups, as here. Of equal groups the
    lower one is kept.
    """

    name: ClassVar[str] = "group_limited"
    source: ClassVar[str] = "DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3, arXiv 2412.19437"
    needs: ClassVar[tuple[Need, ...]] = ("full scores",)
    k: int = field(metadata=whole(1, 8, "experts a token"))
    groups: int = field(metadata=whole(2, 16, "groups of experts", experts=False))
    kept_groups: int = field(metadata=whole(1, 8, "groups that a token may use", experts=False))

    def __post_init__(self) -> None:
        Selection.__post_init__(self)
        if self.kept_groups > self.groups:
            raise InputError(
                f"policy {self.name}: kept_groups is {self.kept_groups} of {self.groups} groups; keep at most these"
            )

    @property
    def width(self) -> int:
        """K is k itself."""
        return self.k

    def check(self, candidates: Candidates) -> None:
        """Raise `InputError` where groups cannot be even or cannot hold a token's experts."""
        Selection.check(self, candidates)
        experts = candidates.all_experts
        if experts % self.groups:
            legal = ", ".join(str(groups) for groups in range(1, experts + 1) if experts % groups == 0)
            raise InputError(
                f"policy {self.name}: groups is {self.groups}, which does not divide the {experts} experts; use one of "
                f"{legal}"
            )
        size = experts // self.groups
        if self.k > size * self.kept_groups:
            raise InputError(
                f"policy {self.name}: k is {self.k}, but {self.kept_groups} groups hold {size * self.kept_groups} "
                f"experts; keep at least {-(-self.k // size)} groups"
            )

    def choose(self, candidates: Candidates, context: RouteContext, state: State) -> tuple[Array, State]:
        """The first k candidates that lie in kept groups."""
        xp = namespace(candidates.probs_TC)
        group_TC = candidates.ids_TC // (candidates.all_experts // self.groups)
        score_TX = best_in_groups(candidates.probs_TC, group_TC, self.groups, max(self.k // self.kept_groups, 1))
        _, kept_TX = topk(score_TX, self.kept_groups)
        allowed_TC = xp.take_along_axis(marked(kept_TX, self.groups), group_TC, axis=1)
        return first_true(allowed_TC, self.k), state

"""Capacity: the most pairs an expert computes in a step, and which pairs go, or go elsewhere, beyond it."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from router.assignment import Assignment
from router.backends import Array, bincount, first_fitting, largest_fitting, namespace
from router.candidates import Candidates
from router.context import RouteContext
from router.parameters import choice, number, whole
from router.part import Kind, Need, Part
from router.queues import DROPS, Drop, queue_order, queue_weights, turns
from router.reroute import Rooms, near_experts, reroute
from traces.errors import InputError

Rule = Literal["megatron", "tutel", "megablocks"]
Scope = Literal["source_rank", "global"]
Reroute = Literal["none", "same_rank", "any"]
_RULES = ("megatron", "tutel", "megablocks")
_ASKS: dict[Reroute, tuple[Need, ...]] = {
    "none": (),
    "any": ("more candidates than k",),
    "same_rank": ("more candidates than k", "placement and prices"),
}


class _Asked:
    """What a limit asks for: by its parameters on an instance, nothing on its class."""

    def __get__(self, limit: "Limit | None", owner: type | None = None) -> tuple[Need, ...]:
        return () if limit is None else limit.asks


class Limit(Part):
    """The last part of a policy: of the pairs that were chosen, it says which are computed, and where.

    `drop` says which pairs go first, `scope` over which tokens places are counted, `pad` whether experts compute all
    their places, empty ones too.
    """

    kind: ClassVar[Kind] = "capacity"
    needs = _Asked()

    @property
    @abstractmethod
    def drop(self) -> Drop:
        """Which pairs go first."""

    @property
    @abstractmethod
    def scope(self) -> Scope:
        """Over which tokens places are counted."""

    @property
    @abstractmethod
    def pad(self) -> bool:
        """Whether experts compute all their places."""

    @property
    def asks(self) -> tuple[Need, ...]:
        """What it needs, with these parameters."""
        return ()

    @abstractmethod
    def limit(self, assignment: Assignment, candidates: Candidates, context: RouteContext) -> Assignment:
        """The assignment with the pairs over the limit dropped, or moved to other experts."""

    @abstractmethod
    def places_of(self, assignment: Assignment, candidates: Candidates, context: RouteContext) -> tuple[int, ...]:
        """The places of each expert in each scope of this step, by source rank or one number for scope `global`.

        The same before and after `limit`. An expert that pads computes so many rows for each scope.
        """

    @abstractmethod
    def describe(self) -> str:
        """In a few words."""

    def check(self, candidates: Candidates, width: int, context: RouteContext) -> None:
        """Raise `InputError` where the candidates are too few, or nobody knows where experts are."""
        if "more candidates than k" in self.needs and candidates.count <= width < candidates.experts:
            raise InputError(
                f"policy {self.name} reroutes, and needs more candidates than the {width} that a token uses; the "
                f"trace recorded {candidates.count}: record more, or complete the trace (moeroute trace complete)"
            )
        if "placement and prices" in self.needs:
            context.prices_for(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity(Limit):
    """Each expert computes at most C pairs of a step; the rest are dropped, or rerouted.

    Bounds how long the busiest expert keeps the others waiting, and makes buffers static; what is dropped costs
    quality. T tokens in the scope, E experts, K the most experts a token can get:

    - rule `megatron`: C = ceil(T * K / E * factor), in the order that Megatron rounds;
    - rule `tutel`: C = K * int(factor * ceil(T / E)), which for few tokens and a factor below 1 is nothing at all.
      Factor 0: as many as the fullest expert of all scopes has, so that nothing is dropped. A negative one: the smaller
      of that and the C of the factor without its sign;
    - rule `megablocks`: the K choices go in K passes, each with a C = int(factor * (T / E)) of its own, as the
      library's first version did (later ones count all choices in one). A C of 0 means as many as the scope's fullest
      expert has.

    C is then rounded up to a multiple of `align`. `scope` says over which tokens: those of one `source_rank`, as
    Megatron and Tutel do, so that no communication is needed, or `global`, all of the step. `drop` says who queues
    first for the places: `position`, the earlier tokens, each with all its choices; `probs`, the larger weights;
    `first_choice`, every token's first choice before any second one (GShard, Switch); `batch_prioritised` the same,
    with the tokens of the largest best score first (V-MoE, arXiv 2106.05974, with the maximum as the token's score).
    Ties go to the earlier pair.

    `reroute` moves a pair that does not fit to its token's next best candidate that the token does not use and whose
    expert has a place left: `any`, or one on a rank that holds the expert it came from (`same_rank`). This goes in
    rounds: a token's first pair without a place asks for one; places go to those who ask in the order of `drop`, for
    `probs` by the score of the expert asked for; who comes too late asks elsewhere in the next round. A rerouted pair
    has the new expert's score and, in a model that scales weights to sum to one, its token's weights are scaled so
    anew over all it chose, dropped ones included. `pad`: experts compute all C rows.
    """

    name: ClassVar[str] = "capacity"
    source: ClassVar[str] = "GShard, arXiv 2006.16668; Switch, arXiv 2101.03961; Megatron-Core, Tutel, MegaBlocks"
    factor: float = field(metadata=number(0.75, 2.0, "places over an even share of the pairs", step=0.05, least=None))
    drop: Drop = field(default="probs", metadata=choice(DROPS, "which pairs queue first for places"))
    scope: Scope = field(
        default="source_rank", metadata=choice(("source_rank", "global"), "over which tokens places are counted")
    )
    rule: Rule = field(default="megatron", metadata=choice(_RULES, "how places are counted"))
    align: int = field(default=1, metadata=whole(1, 16, "places are a multiple of it", experts=False))
    reroute: Reroute = field(
        default="none", metadata=choice(("none", "same_rank", "any"), "where pairs beyond the places may go")
    )
    pad: bool = field(default=False, metadata=choice((False, True), "whether experts compute empty places too"))

    def __post_init__(self) -> None:
        Limit.__post_init__(self)
        if self.factor < 0 and self.rule != "tutel":
            raise InputError(
                f"policy {self.name}: factor is {self.factor:g}; only rule tutel takes a negative one, "
                f"rule {self.rule} one of at least 0"
            )
        if self.factor == 0 and self.rule == "megatron":
            raise InputError(
                f"policy {self.name}: factor is 0, which leaves no expert a place; use one above 0, or leave the "
                "capacity out to drop nothing"
            )

    @property
    def asks(self) -> tuple[Need, ...]:
        """What rerouting needs."""
        return _ASKS[self.reroute]

    @property
    def work(self) -> tuple[str, ...]:
        """Each drop has a cost of its own, and so has rerouting."""
        moves = () if self.reroute == "none" else (f"reroute {self.reroute}",)
        return (f"{self.name} {self.drop}", *moves)

    def describe(self) -> str:
        """In a few words: what is not as usual is named."""
        unusual = (
            (self.rule != "megatron", self.rule),
            (self.align != 1, f"align {self.align}"),
            (self.scope != "source_rank", self.scope),
            (self.reroute != "none", f"reroute {self.reroute}"),
            (self.pad, "pad"),
        )
        return " ".join((f"cf={self.factor:.4g}", self.drop, *(words for said, words in unusual if said)))

    def pairs_per_expert(self, tokens: int, k: int, experts: int) -> int:
        """C for `tokens` tokens in the scope, over all passes; `InputError` where it depends on the loads.

        >>> Capacity(factor=1.25).pairs_per_expert(tokens=64, k=2, experts=16)
        10
        """
        return sum(self.places(tokens, k, experts))

    def places(self, tokens: int, k: int, experts: int, fullest_P: Sequence[int] | None = None) -> tuple[int, ...]:
        """C in each pass for `tokens` tokens in the scope: one number, or k where each choice is a pass.

        `fullest_P`: the load of the fullest expert by pass, for rules that ask for it (`asks_loads`): of all scopes for
        tutel, of this one for megablocks.
        """
        if not self.asks_loads(tokens, experts):
            fullest_P = [0] * self.passes_of(k)
        elif fullest_P is None:
            raise InputError(
                f"policy {self.name}: with rule {self.rule} and factor {self.factor:g}, places for {tokens} tokens on "
                f"{experts} experts depend on the loads; use a larger factor"
            )
        if self.rule == "megatron":
            places_P = [math.ceil(tokens * k / experts * self.factor)]
        elif self.rule == "tutel":
            bound = k * int(abs(self.factor) * -(-tokens // experts))
            places_P = [bound if self.factor > 0 else min(fullest_P[0], bound) if self.factor else fullest_P[0]]
        else:
            each = int(self.factor * (tokens / experts))
            places_P = [each or fullest for fullest in fullest_P]
        return tuple(-(-places // self.align) * self.align for places in places_P)

    def passes_of(self, k: int) -> int:
        """In how many passes k choices queue."""
        return k if self.rule == "megablocks" else 1

    def asks_loads(self, tokens: int, experts: int) -> bool:
        """Whether places for `tokens` tokens depend on the experts' loads."""
        if self.rule == "tutel":
            return self.factor <= 0
        return self.rule == "megablocks" and tokens > 0 and int(self.factor * (tokens / experts)) == 0

    def places_of(self, assignment: Assignment, candidates: Candidates, context: RouteContext) -> tuple[int, ...]:
        """As every limit; passes add up."""
        return tuple(sum(places_P) for places_P in self._places_by_scope(assignment, candidates, context))

    def limit(self, assignment: Assignment, candidates: Candidates, context: RouteContext) -> Assignment:
        """Drop or reroute the kept pairs that exceed the capacity of their expert in their scope."""
        ids_TK, kept_TK = assignment.ids_TK, assignment.kept_TK
        xp = namespace(ids_TK)
        tokens, k = ids_TK.shape
        self.check(candidates, k, context)
        group_TK, groups = self._groups(assignment, candidates, context)
        places_SP = xp.asarray(self._places_by_scope(assignment, candidates, context), device=ids_TK.device)
        # Unused pairs queue in a group of their own, so that they fill nobody's capacity.
        places_X = xp.concat(
            [
                xp.reshape(xp.broadcast_to(places_SP[:, :, None], (*places_SP.shape, candidates.experts)), (-1,)),
                xp.full_like(places_SP[0, :1], tokens * k),
            ]
        )
        key_TK = xp.where(kept_TK, group_TK + ids_TK, xp.full_like(group_TK, groups))
        key_N = xp.reshape(key_TK, (-1,))
        order_N = queue_order(assignment, self.drop)
        if self.drop == "probs":
            fits_N = largest_fitting(key_N, places_X, queue_weights(assignment, renormalise=context.renormalise))
        else:
            fits_N = first_fitting(key_N, places_X, order_N)
        over_TK = kept_TK & ~xp.reshape(fits_N, (tokens, k))
        if self.reroute == "none" or not bool(xp.any(over_TK)):
            return assignment.drop(over_TK)
        taken_N = xp.where(fits_N, key_N, xp.full_like(key_N, groups))
        rooms = Rooms(
            group_TK=group_TK,
            left_X=places_X - bincount(taken_N, groups + 1),
            near_EE=self._near(context, ids_TK),
            turn_TK=None if self.drop == "probs" else turns(order_N, group_TK),
        )
        return reroute(assignment, over_TK, candidates, rooms, renormalise=context.renormalise)

    def _scopes(self, candidates: Candidates, context: RouteContext) -> tuple[Array, int]:
        """The scope of each token, and how many there are."""
        if self.scope == "source_rank":
            return candidates.source_rank_T, context.ranks
        return namespace(candidates.source_rank_T).zeros_like(candidates.source_rank_T), 1

    def _groups(self, assignment: Assignment, candidates: Candidates, context: RouteContext) -> tuple[Array, int]:
        """The group of expert 0 in each pair's scope and pass, others following: [T, K], and how many there are."""
        xp = namespace(assignment.ids_TK)
        scope_T, scopes = self._scopes(candidates, context)
        k = int(assignment.ids_TK.shape[1])
        passes = self.passes_of(k)
        group_TK = scope_T[:, None] * (passes * candidates.experts)
        if passes > 1:
            group_TK = group_TK + xp.arange(k, device=scope_T.device) * candidates.experts
        return xp.broadcast_to(group_TK, assignment.ids_TK.shape), scopes * passes * candidates.experts

    def _places_by_scope(
        self, assignment: Assignment, candidates: Candidates, context: RouteContext
    ) -> list[tuple[int, ...]]:
        """C by scope and pass."""
        xp = namespace(assignment.ids_TK)
        k, experts = int(assignment.ids_TK.shape[1]), candidates.experts
        scope_T, scopes = self._scopes(candidates, context)
        tokens_S = [int(count) for count in bincount(scope_T, scopes)]
        if not any(self.asks_loads(tokens, experts) for tokens in tokens_S):
            return [self.places(tokens, k, experts) for tokens in tokens_S]
        group_TK, groups = self._groups(assignment, candidates, context)
        load_X = bincount((group_TK + assignment.ids_TK)[assignment.chosen_TK], groups)
        fullest_SP = xp.max(xp.reshape(load_X, (scopes, self.passes_of(k), experts)), axis=2)
        if self.rule == "tutel":
            fullest_SP = xp.broadcast_to(xp.max(fullest_SP, axis=0, keepdims=True), fullest_SP.shape)
        return [
            self.places(tokens, k, experts, fullest_P)
            for tokens, fullest_P in zip(tokens_S, fullest_SP.tolist(), strict=True)
        ]

    def _near(self, context: RouteContext, like: Array) -> Array | None:
        """Which experts may take over from which: bool [E, E], None for all."""
        if self.reroute != "same_rank":
            return None
        share_EG = context.prices_for(self.name).share_LEG[context.layer]
        return namespace(like).asarray(near_experts(share_EG), device=like.device)

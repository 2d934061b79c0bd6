"""Capacity: the most pairs an expert computes in a step, and which pairs go when it is exceeded."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from router.assignment import Assignment
from router.backends import Array, bincount, namespace, rank_within_group
from router.candidates import Candidates
from router.context import RouteContext
from router.parameters import choice, number
from router.part import Kind, Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity(Part):
    """Each expert computes at most C = ceil(tokens * K / E * factor) pairs; the rest are dropped.

    K is the most experts a token can get, as Megatron counts it. `scope` says over which tokens: those of one
    `source_rank`, as Megatron and Tutel do, so that no communication is needed, or `global`, all of the step.
    `drop` says which pairs go first: `position`, the later tokens (GShard); `probs`, the smaller weights.
    """

    name: ClassVar[str] = "capacity"
    kind: ClassVar[Kind] = "capacity"
    source: ClassVar[str] = "GShard, arXiv 2006.16668; Switch, arXiv 2101.03961"
    factor: float = field(metadata=number(0.75, 2.0, "places over an even share of the pairs", step=0.05))
    drop: Literal["position", "probs"] = field(
        default="probs", metadata=choice(("position", "probs"), "which pairs go first")
    )
    scope: Literal["source_rank", "global"] = field(
        default="source_rank", metadata=choice(("source_rank", "global"), "over which tokens places are counted")
    )

    def describe(self) -> str:
        """In a few words."""
        return f"cf={self.factor:.4g} {self.drop}"

    def pairs_per_expert(self, tokens: int, k: int, experts: int) -> int:
        """C for `tokens` tokens in the scope.

        >>> Capacity(factor=1.25).pairs_per_expert(tokens=64, k=2, experts=16)
        10
        """
        return math.ceil(tokens * k / experts * self.factor)  # in the order that Megatron rounds

    def limit(self, assignment: Assignment, candidates: Candidates, context: RouteContext) -> Assignment:
        """Drop the kept pairs that exceed the capacity of their expert in their scope."""
        ids_TK, kept_TK = assignment.ids_TK, assignment.kept_TK
        xp = namespace(ids_TK)
        tokens, k = ids_TK.shape
        experts = candidates.experts
        if self.scope == "source_rank":
            source_T, scopes = candidates.source_rank_T, context.ranks
        else:
            source_T, scopes = xp.zeros_like(candidates.source_rank_T), 1
        limit_by_scope = xp.asarray(
            [self.pairs_per_expert(int(count), k, experts) for count in bincount(source_T, scopes)],
            device=ids_TK.device,
        )
        # Unused pairs queue in a group of their own, so that they fill nobody's capacity.
        unused_group = scopes * experts
        key_TK = xp.where(kept_TK, source_T[:, None] * experts + ids_TK, xp.full_like(ids_TK, unused_group))
        rank_N = rank_within_group(xp.reshape(key_TK, (-1,)), unused_group + 1, self._queue(assignment))
        return assignment.drop(kept_TK & (xp.reshape(rank_N, (tokens, k)) >= limit_by_scope[source_T][:, None]))

    def _queue(self, assignment: Assignment) -> Array | None:
        if self.drop == "position":
            return None
        xp = namespace(assignment.weights_TK)
        return xp.argsort(xp.reshape(assignment.weights_TK, (-1,)), descending=True, stable=True)

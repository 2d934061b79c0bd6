"""What a routing policy is, and when each of its parts is called.

A policy is made once from its parameters. For every step of every layer the simulator (numpy) or the real
MoE layer (torch) calls `route(candidates, context, state)` and gets the assignment and the next state.
The policies of this package select experts; `router.capacity.Capacity` then drops what does not fit;
`RoutingPolicy` (in `router.policies`) is the two together and what the rest of moeroute passes around.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from router.assignment import UNUSED, Assignment
from router.backends import Array, namespace
from router.candidates import Candidates
from router.context import RouteContext, State
from traces.errors import InputError


def check_count(policy: str, name: str, value: int) -> None:
    """Raise `InputError` unless a parameter that counts experts is a whole number of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise InputError(f"policy {policy}: {name} is {value}; it must be a whole number of at least 1")


class Selection(ABC):
    """Chooses experts for each token from its candidates; knows nothing of capacity."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def width(self) -> int:
        """K, the most experts a token can get; also the number of candidates the selection reads."""

    @abstractmethod
    def use(self, probs_TK: Array) -> Array:
        """Which of the best K candidates each token uses: bool [T, K]. The first is always used."""

    def route(self, candidates: Candidates, context: RouteContext, state: State) -> tuple[Assignment, State]:
        """Assign each token the candidates that `use` marks, weighted by their scores."""
        if candidates.count < self.width:
            raise InputError(
                f"policy {self.name} needs {self.width} candidates per token; the trace recorded {candidates.count}"
            )
        best = candidates.best(self.width)
        xp = namespace(best.probs_TC)
        used_TK = self.use(best.probs_TC)
        scores_TK = xp.where(used_TK, best.probs_TC, xp.zeros_like(best.probs_TC))
        weights_TK = scores_TK
        if context.renormalise:
            total_T1 = xp.sum(scores_TK, axis=-1, keepdims=True)
            # A sigmoid gate can be recorded as 0 for all of a token's experts; they then weigh nothing.
            weights_TK = scores_TK / xp.where(total_T1 > 0, total_T1, xp.ones_like(total_T1))
        ids_TK = xp.where(used_TK, best.ids_TC, xp.full_like(best.ids_TC, UNUSED))
        return Assignment(ids_TK=ids_TK, scores_TK=scores_TK, weights_TK=weights_TK, kept_TK=used_TK), state

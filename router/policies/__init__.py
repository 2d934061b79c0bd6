"""Routing policies by name, and the whole policy of a deployment: a selection and an optional capacity."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from router.assignment import Assignment
from router.candidates import Candidates
from router.capacity import Capacity
from router.context import RouteContext, State
from router.policies.base import Selection
from router.policies.skip import Skip
from router.policies.top_k import TopK
from router.policies.top_p import TopP
from traces.errors import InputError

SELECTIONS: dict[str, type[Selection]] = {kind.name: kind for kind in (TopK, TopP, Skip)}


def make_selection(name: str, parameters: dict[str, Any]) -> Selection:
    """The selection called `name`; `InputError` names an unknown name or parameter and the known ones."""
    if name not in SELECTIONS:
        raise InputError(f"unknown policy {name!r}; known are {', '.join(sorted(SELECTIONS))}")
    known = [field.name for field in fields(SELECTIONS[name])]  # type: ignore[arg-type]  # leaves are dataclasses
    if sorted(parameters) != sorted(known):
        given = ", ".join(sorted(parameters)) or "nothing"
        raise InputError(f"policy {name} takes {', '.join(known)}; got {given}")
    return SELECTIONS[name](**parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingPolicy:
    """Select, then limit: what a simulator and a real layer run at every step of every layer."""

    selection: Selection
    capacity: Capacity | None = None

    def route(self, candidates: Candidates, context: RouteContext, state: State) -> tuple[Assignment, State]:
        """The assignment of one step of one layer, and the state for the next step."""
        assignment, state = self.selection.route(candidates, context, state)
        if self.capacity is not None:
            assignment = self.capacity.limit(assignment, candidates, context)
        return assignment, state

    def describe(self) -> str:
        """The policy in a few words.

        >>> RoutingPolicy(selection=TopK(k=4), capacity=Capacity(factor=1.25)).describe()
        'top_k(k=4) cf=1.25 probs'
        """
        arguments = asdict(self.selection)  # type: ignore[call-overload]  # leaves are dataclasses
        inside = ", ".join(f"{name}={value:.4g}" for name, value in arguments.items())
        capacity = "" if self.capacity is None else f" cf={self.capacity.factor:.4g} {self.capacity.drop}"
        return f"{self.selection.name}({inside}){capacity}"

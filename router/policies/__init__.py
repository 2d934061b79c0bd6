"""Routing policies by name, and the whole policy of a deployment: selection, adjustment, capacity."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from inspect import getdoc
from typing import Any, Literal, TypeVar, get_args

from router.assignment import Assignment
from router.candidates import Candidates
from router.capacity import Capacity, Limit
from router.context import RouteContext, State
from router.parameters import parameters_of
from router.part import Part
from router.policies.balance_bias import BalanceBias
from router.policies.base import Adjustment, Selection, assign, trained_weights, widen
from router.policies.batch_set import BatchSet
from router.policies.cache_aware import CacheAware
from router.policies.capacity_aware import CapacityAware
from router.policies.expert_choice import ExpertChoice
from router.policies.group_limited import GroupLimited
from router.policies.hardware_aware import HardwareAware
from router.policies.held_top_p import HeldTopP
from router.policies.null_experts import NullExperts
from router.policies.opportunistic import Opportunistic
from router.policies.partners import Partners
from router.policies.skip import Skip
from router.policies.skip_by_ratio import SkipByRatio
from router.policies.top_k import TopK
from router.policies.top_k_by_layer import TopKByLayer
from router.policies.top_p import TopP
from router.policies.topology_aware import TopologyAware
from router.spill import Spill
from traces.errors import InputError

SELECTIONS: dict[str, type[Selection]] = {
    part.name: part
    for part in (
        TopK,
        TopKByLayer,
        TopP,
        HeldTopP,
        Skip,
        SkipByRatio,
        NullExperts,
        BalanceBias,
        GroupLimited,
        ExpertChoice,
        Partners,
    )
}
ADJUSTMENTS: dict[str, type[Adjustment]] = {
    part.name: part for part in (Opportunistic, BatchSet, CacheAware, TopologyAware, HardwareAware)
}
CAPACITIES: dict[str, type[Limit]] = {part.name: part for part in (Capacity, CapacityAware, Spill)}
POLICIES: Mapping[str, type[Part]] = {**SELECTIONS, **ADJUSTMENTS, **CAPACITIES}
Weights = Literal["renormalised", "trained"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
_P = TypeVar("_P", bound=Part)


def make_selection(name: str, parameters: Mapping[str, Any]) -> Selection:
    """The selection called `name`; `InputError` names an unknown name or parameter and the known ones."""
    return _make(SELECTIONS, name, parameters, "policy")


def make_adjustment(name: str, parameters: Mapping[str, Any]) -> Adjustment:
    """The adjustment called `name`; errors as `make_selection`."""
    return _make(ADJUSTMENTS, name, parameters, "adjustment")


def make_capacity(name: str, parameters: Mapping[str, Any]) -> Limit:
    """The capacity called `name`; errors as `make_selection`."""
    return _make(CAPACITIES, name, parameters, "capacity")


def _make(known: Mapping[str, type[_P]], name: str, parameters: Mapping[str, Any], what: str) -> _P:
    if name in POLICIES and name not in known:
        kind = POLICIES[name].kind
        form = f"policy: {name}" if kind == "selection" else f"{kind}: {{name: {name}, …}}"
        raise InputError(f"{name} is no {what}; write {form}")
    if name not in known:
        raise InputError(f"unknown {what} {name!r}; known are {', '.join(sorted(known))}")
    taken = [field for field in fields(known[name]) if field.init]  # type: ignore[arg-type]  # leaves are dataclasses
    required = [field.name for field in taken if field.default is MISSING]
    optional = [field.name for field in taken if field.default is not MISSING]
    if not set(required) <= set(parameters) <= {*required, *optional}:
        unknown = sorted(set(parameters) - {*required, *optional})
        missing = [parameter for parameter in required if parameter not in parameters]
        wrong = f"does not know {', '.join(unknown)}" if unknown else f"lacks {', '.join(missing)}"
        takes = ", ".join(required) or ("no parameters" if not optional else "nothing")
        or_more = f", and if you like {', '.join(optional)}" if optional else ""
        part = name if name == what else f"{what} {name}"
        raise InputError(f"{part} {wrong}; it takes {takes}{or_more}")
    return known[name](**parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingPolicy:
    """Select, adjust, then limit: what a simulator and a real layer run at every step of every layer.

    `weights` matter where the model scales them to one over its own top k. `renormalised`: over the experts that the
    policy chose, as engines do where k is set at run time; `trained`: over the model's own top k (`trained_weights`).
    """

    selection: Selection
    adjustment: Adjustment | None = None
    capacity: Limit | None = None
    weights: Weights = "renormalised"

    @property
    def width(self) -> int:
        """K, the most experts a token can get."""
        return self.selection.width

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that it has, in order."""
        return tuple(part for part in (self.selection, self.adjustment, self.capacity) if part is not None)

    @property
    def work(self) -> tuple[str, ...]:
        """What its parts do, as cost models tell it apart."""
        return tuple(name for part in self.parts for name in part.work)

    def needs(self, what: str) -> bool:
        """Whether any part asks for it."""
        return any(what in part.needs for part in self.parts)

    def route(self, candidates: Candidates, context: RouteContext, state: State) -> tuple[Assignment, State]:
        """The assignment of one step of one layer, and the state for the next step.

        Errors: `InputError` where the candidates or the context lack what a part needs.
        """
        self.selection.check(candidates)
        used_TC, selection_state = self.selection.choose(candidates, context, state.get("selection", {}))
        next_state: State = {"selection": selection_state} if selection_state else {}
        if self.adjustment is not None:
            self.adjustment.check(candidates, self.width)
            used_TC, adjustment_state = self.adjustment.adjust(
                widen(used_TC, candidates.count), candidates, context, state.get("adjustment", {})
            )
            next_state |= {"adjustment": adjustment_state} if adjustment_state else {}
        assignment = assign(candidates, used_TC, width=self.width, renormalise=context.renormalise)
        assignment = self._weighted(assignment, candidates, context)
        if self.capacity is not None:
            limited = self.capacity.limit(assignment, candidates, context)
            assignment = self._weighted(limited, candidates, context)
        return assignment, next_state

    def _weighted(self, assignment: Assignment, candidates: Candidates, context: RouteContext) -> Assignment:
        if self.weights == "renormalised" or not context.renormalise:
            return assignment
        return trained_weights(assignment, candidates, context.top_k_for("weights trained"))

    def describe(self) -> str:
        """The policy in a few words.

        >>> RoutingPolicy(selection=TopK(k=4), capacity=Capacity(factor=1.25)).describe()
        'top_k(k=4) cf=1.25 probs'
        """
        selection = _describe(self.selection)
        adjustment = "" if self.adjustment is None else f" {_describe(self.adjustment)}"
        capacity = "" if self.capacity is None else f" {self.capacity.describe()}"
        weights = "" if self.weights == "renormalised" else f" weights {self.weights}"
        return selection + adjustment + capacity + weights


def values_of(part: Part) -> dict[str, Any]:
    """The values of a part's parameters, by name."""
    return {field.name: getattr(part, field.name) for field in fields(part) if field.init}  # type: ignore[arg-type]


def _describe(part: Part) -> str:
    defaults = {field.name: field.default for field in fields(part)}  # type: ignore[arg-type]  # leaves are dataclasses
    inside = ", ".join(
        f"{name}={_in_words(value)}" for name, value in values_of(part).items() if value != defaults[name]
    )
    return f"{part.name}({inside})"


def _in_words(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(map(_in_words, value))
    return str(value) if isinstance(value, str | bool) else format(value, ".4g")


def needs_with(part: type[Part], parameter: str, value: Any) -> tuple[str, ...]:
    """What a part needs where one of its parameters has a value, for on this it may depend."""
    others = {
        name: declared.low
        for name, declared in parameters_of(part).items()
        if name != parameter and not declared.choices and _default(part, name) is None
    }
    return part(**others, **{parameter: value}).needs


def _needs_by_value(part: type[Part], parameter: str) -> dict[str, Any]:
    """What single choices of a parameter need, where any needs something that the part does not."""
    choices = parameters_of(part)[parameter].choices
    needs = {
        str(value): [need for need in needs_with(part, parameter, value) if need not in part.needs] for value in choices
    }
    return {"needs": needs} if any(needs.values()) else {}


def _default(part: type[Part], parameter: str) -> Any:
    """What a parameter is if left out; None where it must be given."""
    default = {field.name: field.default for field in fields(part)}[parameter]  # type: ignore[arg-type]
    return None if default is MISSING else default


def describe_policies() -> list[dict[str, Any]]:
    """Every policy as a JSON object: name, kind, source, parameters with their ranges, needs, and what it does.

    `default` of a parameter is None where it must be given; `needs` what single choices of it need beside the policy's.
    """
    return [
        {
            "name": part.name,
            "kind": part.kind,
            "source": part.source,
            "parameters": [
                {"name": name, **parameter.to_json(), "default": _default(part, name), **_needs_by_value(part, name)}
                for name, parameter in parameters_of(part).items()
            ],
            "needs": list(part.needs),
            "description": getdoc(part) or "",
        }
        for part in POLICIES.values()
    ]

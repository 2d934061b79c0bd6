"""Config: one point of the search, as a scenario writes it. What each part of a policy takes, the part itself says."""

import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from router.capacity import Limit
from router.parameters import Parameter, parameters_of
from router.part import Part
from router.placement import PLACEMENTS
from router.policies import (
    POLICIES,
    RoutingPolicy,
    Weights,
    make_adjustment,
    make_capacity,
    make_selection,
    values_of,
)
from router.policies.base import Adjustment
from router.replicas import ReplicaChoice
from router.splits import SPLITS


class Strict(BaseModel):
    """A section of a scenario: frozen, and with no keys but its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PlacementChoice(Strict):
    """Where experts go, how many slots beyond one an expert there are, and which replica computes a pair.

    `away_share`: of the redundant slots, so many may leave the node of their group (`soft_hierarchical` alone).
    `resident_share`: of each rank's experts, so many stay in its memory and the others are loaded from the host when
    they are used (`router.placement.residency`).
    """

    algorithm: str = "contiguous"
    redundant_slots: int = Field(default=0, ge=0)
    replica_choice: ReplicaChoice = "even"
    away_share: float = Field(default=1.0, ge=0, le=1)
    resident_share: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _known_algorithm(self) -> "PlacementChoice":
        if self.algorithm not in PLACEMENTS:
            raise ValueError(f"unknown placement {self.algorithm!r}; known are {', '.join(sorted(PLACEMENTS))}")
        return self

    def describe(self) -> str:
        """In a few words.

        >>> PlacementChoice(algorithm="lpt", redundant_slots=4, replica_choice="local").describe()
        'lpt+4 local'
        >>> PlacementChoice(algorithm="lpt", resident_share=0.5).describe()
        'lpt resident 50%'
        """
        replicas = f"+{self.redundant_slots} {self.replica_choice}" if self.redundant_slots else ""
        away = f" away {100 * self.away_share:.3g}%" if self.away_share < 1 else ""
        resident = f" resident {100 * self.resident_share:.3g}%" if self.resident_share < 1 else ""
        return self.algorithm + replicas + away + resident


class PartChoice(BaseModel):
    """A part of a policy: its `name`, and its parameters beside it.

    Left out parameters get the part's own defaults, so that two ways to write the same part are equal.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    default_name: ClassVar[str | None] = None
    example: ClassVar[str]
    make: ClassVar[Callable[[str, Mapping[str, Any]], Part]]

    name: str

    @model_validator(mode="before")
    @classmethod
    def _in_full(cls, document: Any) -> Any:
        if isinstance(document, cls):
            return document
        if not isinstance(document, dict):
            raise ValueError(f"write it as {cls.example}, or none")
        name = document.get("name", cls.default_name)
        if not isinstance(name, str):
            return document
        return {"name": name, **in_full(cls.make, name, {k: v for k, v in document.items() if k != "name"})}

    @property
    def parameters(self) -> dict[str, Any]:
        """Its parameters by name."""
        return dict(self.model_extra or {})


class AdjustmentChoice(PartChoice):
    """A batch- or hardware-aware adjustment, as `{name: opportunistic, k0: 2}`."""

    example = "{name: opportunistic, k0: 2}"
    make = make_adjustment

    def part(self) -> Adjustment:
        """The adjustment itself."""
        return make_adjustment(self.name, self.parameters)


class CapacityChoice(PartChoice):
    """A capacity, as `{factor: 1.25}`; the plain `capacity` needs no name."""

    default_name = "capacity"
    example = "{factor: 1.25}"
    make = make_capacity

    def part(self) -> Limit:
        """The capacity itself."""
        return make_capacity(self.name, self.parameters)


class Config(Strict):
    """One point of the search: a selection with its parameters, an adjustment, a capacity and a placement.

    `weights`: of the experts that a token uses, see `RoutingPolicy`; the search leaves it as it is by default.
    """

    policy: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    adjustment: AdjustmentChoice | None = None
    capacity: CapacityChoice | None = None
    weights: Weights = "renormalised"
    placement: PlacementChoice = PlacementChoice()

    @model_validator(mode="before")
    @classmethod
    def _in_full(cls, document: Any) -> Any:
        if not isinstance(document, dict) or not isinstance(document.get("policy"), str):
            return document
        parameters = document.get("parameters", {})
        if not isinstance(parameters, dict):
            raise ValueError(f"parameters are {parameters!r}; write them by name, as {{k: 4}}")
        none = {part: None for part in ("adjustment", "capacity") if document.get(part) == "none"}
        return {**document, **none, "parameters": in_full(make_selection, document["policy"], parameters)}

    @model_validator(mode="after")
    def _padding_knows_no_counts(self) -> "Config":
        choice = self.placement.replica_choice
        if (
            self.placement.redundant_slots
            and choice in SPLITS
            and self.capacity is not None
            and self.capacity.part().pad
        ):
            raise ValueError(
                f"placement.replica_choice {choice} needs the counts of all ranks, and the places of a capacity that "
                "pads are fixed before; use even, local or nearest, or pad: false"
            )
        return self

    def routing_policy(self) -> RoutingPolicy:
        """The policy as the simulator and the real layer run it."""
        return RoutingPolicy(
            selection=make_selection(self.policy, self.parameters),
            adjustment=None if self.adjustment is None else self.adjustment.part(),
            capacity=None if self.capacity is None else self.capacity.part(),
            weights=self.weights,
        )

    def key(self) -> str:
        """What tells it from other configs; the order in which parameters were written does not."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    def describe(self) -> str:
        """In a few words."""
        return f"{self.routing_policy().describe()} {self.placement.describe()}"


def in_full(make: Callable[[str, Mapping[str, Any]], Part], name: str, parameters: Mapping[Any, Any]) -> dict[str, Any]:
    """The parameters of a part as it holds them: checked, defaults filled in, numbers of the declared kind."""
    declared = parameters_of(POLICIES[name]) if name in POLICIES else {}
    read = {str(key): as_declared(declared.get(key), value) for key, value in parameters.items()}
    return values_of(make(name, read))


def as_declared(parameter: Parameter | None, value: Any) -> Any:
    """A value as YAML or JSON gave it, as the kind of number that the parameter is.

    >>> from router.policies.top_k import TopK
    >>> as_declared(parameters_of(TopK)["k"], 4.0)
    4
    """
    if parameter is None or isinstance(value, bool):
        return value
    if parameter.choices:
        return next((choice for choice in parameter.choices if choice == value), value)
    if isinstance(value, str):
        try:
            value = float(value)  # YAML takes 1e-3 for text
        except ValueError:
            return value
    if not isinstance(value, int | float):
        return value
    if parameter.whole:
        return int(value) if float(value).is_integer() else value
    return float(value)

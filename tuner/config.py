"""Config: one point of the search, as a scenario writes it. What each part of a policy takes, the part itself says."""

import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

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
from router.policies.base import Adjustment, Selection
from router.policies.k_of_layers import fixed_k
from router.policies.top_k import TopK
from router.replicas import ReplicaChoice
from router.splits import SPLITS
from traces.errors import InputError


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


class SubnetworkChoice(Strict):
    """How much of the scenario's `elastic` model runs: `depth` layers, `experts` a layer, `top_k` experts a token.

    What is left out is the model's own. `top_k` is one number, or one for each layer that stays. Which layers and
    experts stay is measured on the model (`router.elastic.extract.choose_part`).
    """

    depth: int | None = Field(default=None, ge=1)
    experts: int | None = Field(default=None, ge=1)
    top_k: int | tuple[int, ...] | None = None

    @field_validator("top_k", mode="before")
    @classmethod
    def _one_way_to_write_it(cls, top_k: Any, info: ValidationInfo) -> Any:
        if top_k is None:
            return None
        top_k_L = tuple(top_k) if isinstance(top_k, list | tuple) else (top_k,)
        if not top_k_L or not all(type(k) is int and k >= 1 for k in top_k_L):
            raise ValueError("write one whole number from 1, or one for each layer that stays, as [2, 1, 2]")
        if not isinstance(top_k, list | tuple):
            return top_k
        depth = info.data.get("depth")
        if depth is not None and len(top_k_L) != depth:
            raise ValueError(f"{len(top_k_L)} numbers for {depth} layers that stay; give one, or one a layer")
        return top_k_L[0] if depth is not None and len(set(top_k_L)) == 1 else top_k_L

    @property
    def selection(self) -> Selection:
        """Its k of every layer, as a policy. Errors: `InputError` where only the model knows it."""
        if self.top_k is None:
            raise InputError("subnetwork.top_k is the model's own, which a config alone does not know; give it")
        return fixed_k(self.top_k if isinstance(self.top_k, tuple) else (self.top_k,))

    def describe(self) -> str:
        """Its size in a few words.

        >>> SubnetworkChoice(depth=4, experts=8, top_k=2).describe()
        '4 layers of 8 experts'
        """
        layers = "all layers" if self.depth is None else f"{self.depth} layer{'s'[: self.depth > 1]}"
        return f"{layers} of {'all' if self.experts is None else self.experts} experts"


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
    `subnetwork`: the part of an elastic model that runs; it has its own k, so that `top_k` has no parameters then.
    """

    policy: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    adjustment: AdjustmentChoice | None = None
    capacity: CapacityChoice | None = None
    weights: Weights = "renormalised"
    placement: PlacementChoice = PlacementChoice()
    # Left out of what is written where there is none, so that what is not elastic stays as it was.
    subnetwork: SubnetworkChoice | None = Field(default=None, exclude_if=lambda value: value is None)

    @model_validator(mode="before")
    @classmethod
    def _in_full(cls, document: Any) -> Any:
        if not isinstance(document, dict) or not isinstance(document.get("policy"), str):
            return document
        parameters = document.get("parameters", {})
        if not isinstance(parameters, dict):
            raise ValueError(f"parameters are {parameters!r}; write them by name, as {{k: 4}}")
        none = {part: None for part in ("adjustment", "capacity") if document.get(part) == "none"}
        if document.get("subnetwork") is not None:
            if document["policy"] != TopK.name or parameters:
                raise ValueError(
                    "a subnetwork uses the best k of its experts, by its own top_k: "
                    "write policy: top_k without parameters, and k as subnetwork.top_k"
                )
            if document.get("weights", "renormalised") != "renormalised":
                raise ValueError("a subnetwork scales the weights of its own k to one; leave weights out")
            return {**document, **none}
        return {**document, **none, "parameters": in_full(make_selection, document["policy"], parameters)}

    @model_validator(mode="after")
    def _a_capacity_counts_one_k(self) -> "Config":
        if self.capacity is not None and self.subnetwork is not None and isinstance(self.subnetwork.top_k, tuple):
            raise ValueError("capacity counts one k for all layers; give subnetwork.top_k one number, or no capacity")
        return self

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
            selection=make_selection(self.policy, self.parameters)
            if self.subnetwork is None
            else self.subnetwork.selection,
            adjustment=None if self.adjustment is None else self.adjustment.part(),
            capacity=None if self.capacity is None else self.capacity.part(),
            weights=self.weights,
        )

    def key(self) -> str:
        """What tells it from other configs; the order in which parameters were written does not."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    def describe(self) -> str:
        """In a few words.

        >>> Config(policy="top_k", subnetwork=SubnetworkChoice(depth=3, experts=8, top_k=(2, 1, 2))).describe()
        '3 layers of 8 experts top_k(k_L=2/1/2) contiguous'
        """
        part = "" if self.subnetwork is None else f"{self.subnetwork.describe()} "
        return f"{part}{self.routing_policy().describe()} {self.placement.describe()}"


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

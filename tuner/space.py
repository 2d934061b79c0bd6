"""Space: what a study may choose from, and how a suggested point of it becomes a config.

Every policy brings the ranges of its own parameters; a scenario may narrow them. Conditional: only the chosen parts'
parameters are asked for, each under `part.parameter`.
"""

import math
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import BeforeValidator, Field, field_validator

from router.parameters import Parameter, parameters_of
from router.part import Part
from router.placement import PLACEMENTS
from router.policies import ADJUSTMENTS, CAPACITIES, POLICIES, SELECTIONS, Weights, make_selection
from router.policies.top_k import TopK
from router.replicas import ReplicaChoice
from router.splits import SPLITS
from traces.errors import InputError
from tuner.config import (
    AdjustmentChoice,
    CapacityChoice,
    Config,
    PlacementChoice,
    Strict,
    SubnetworkChoice,
    as_declared,
)

NONE = "none"  # no adjustment, no capacity
_SCOPE = "scope"
# Placements that are searched by default: of those that do the same, the best.
_SEARCHED = ("active_aware", "affinity", "balanced", "contiguous", "cost_aware", "random")
_DECADE_STEP = 0.05  # twenty values a decade: each a ninth more than the one before
# Draws are rounded to this, so that equal configs look equal whatever the arithmetic of steps.
_DIGITS = 6
# Parameters that must not be above another one of their part, which is declared before them.
_AT_MOST = {"group_limited.kept_groups": "groups"}


class Suggests(Protocol):
    """The part of an Optuna trial that the space needs; a random generator can stand in."""

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        """One of `choices`."""

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A whole number in [low, high]."""

    def suggest_float(self, name: str, low: float, high: float, *, step: float) -> float:
        """A number in [low, high], a whole number of steps above low."""


class RandomSuggestions:
    """Uniform draws, for configs that no sampler chose."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        """One of `choices`."""
        return choices[int(self._generator.integers(len(choices)))]

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        return int(self._generator.integers(low, high + 1))

    def suggest_float(self, name: str, low: float, high: float, *, step: float) -> float:
        """A number in [low, high], a whole number of steps above low."""
        return low + step * int(self._generator.integers(round((high - low) / step) + 1))


class Values(Strict):
    """A few values in place of a range, where two of them would read as its ends: `{values: [2, 4]}`."""

    values: list[Any] = Field(min_length=1)


Written = Annotated[
    Values | Annotated[list[Any], Field(min_length=1)],
    BeforeValidator(lambda value: value if isinstance(value, list | dict | Values) else [value]),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """What may be drawn for a parameter: one of `values`, or else a number from `low` to `high`.

    Numbers lie `step` apart; with `log` they are drawn evenly in their logarithm instead, to two digits.
    """

    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float = 1.0
    whole: bool = False
    log: bool = False

    @classmethod
    def of(cls, parameter: Parameter, written: list[Any] | Values | None) -> "Range":
        """The range that a scenario wrote, or what the policy declares. Two numbers in a list are its ends."""
        if isinstance(written, Values):
            return cls(values=tuple(written.values))
        if parameter.choices or (written is not None and len(written) != 2):
            return cls(values=tuple(written or parameter.choices))
        low, high = written or (parameter.low, parameter.high)
        return cls(low=low, high=high, step=parameter.step, whole=parameter.whole, log=parameter.log)

    @property
    def least(self) -> Any:
        """The smallest number that can be drawn."""
        return min(self.values) if self.values else self.low

    @property
    def most(self) -> Any:
        """The largest number that can be drawn."""
        return max(self.values) if self.values else self.high

    def up_to(self, most: float) -> "Range":
        """The part of a range of numbers that is not above `most`, or its lowest number."""
        if self.values:
            return replace(self, values=tuple(v for v in self.values if v <= most) or (min(self.values),))
        return replace(self, high=max(min(self.high, most), self.low))

    def draw(self, trial: Suggests, name: str) -> Any:
        """One value."""
        if self.values:
            return trial.suggest_categorical(name, list(self.values))
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high))
        if self.log:
            low, high = (round(math.log10(end), 2) for end in (self.low, self.high))
            exponent = _stepped(trial, f"log10({name})", low, high, _DECADE_STEP)
            return min(max(float(f"{10**exponent:.1e}"), self.low), self.high)
        return round(_stepped(trial, name, self.low, self.high, self.step), _DIGITS)


def _stepped(trial: Suggests, name: str, low: float, high: float, step: float) -> float:
    """A number on the grid from `low`, whose last part of a step lies outside; in decimals, as Optuna checks it."""
    exact_low, exact_step = Decimal(str(low)), Decimal(str(step))
    steps = (Decimal(str(high)) - exact_low) // exact_step
    return trial.suggest_float(name, low, float(exact_low + steps * exact_step), step=step)


class SubnetworkSpace(Strict):
    """The parts of an elastic model that may be drawn: so many layers, experts a layer, and experts a token.

    Left out: all depths from half the layers up, quarters of the experts, and a k of 1 to the model's own. `per_layer`:
    k is drawn for each layer that stays, apart.
    """

    depths: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    experts: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    top_ks: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    per_layer: bool = False

    def suggest(self, trial: Suggests) -> SubnetworkChoice:
        """One of them. A k above the number of experts counts as the largest that is not."""
        depth = trial.suggest_categorical("subnetwork.depth", self.depths)
        experts = trial.suggest_categorical("subnetwork.experts", self.experts)
        names = [f"subnetwork.top_k.{place}" for place in range(depth)] if self.per_layer else ["subnetwork.top_k"]
        most = max(k for k in self.top_ks if k <= experts)
        drawn = [min(trial.suggest_categorical(name, self.top_ks), most) for name in names]
        return SubnetworkChoice(depth=depth, experts=experts, top_k=tuple(drawn) if self.per_layer else drawn[0])


class Space(Strict):
    """What a study may choose from: parts of a policy by name, each with `ranges`, and placements.

    `ranges` narrows what policies declare: `top_p.p: [0.3, 0.95]` from one end to the other, `top_k.k: [1, 2, 4]`,
    `capacity.drop: [position, probs]` or `top_k.k: {values: [2, 4]}` one of these, `top_k.k: 4` this. `scopes`: over
    which tokens of a step parts may look, where they have a `scope` that `ranges` does not name; a real rank knows its
    own tokens only. `away_shares` are those of `soft_hierarchical`. `resident_share` and `weights` are the same for
    all, by default the baseline's. `subnetworks`: of a scenario's `elastic` model, where the policy is `top_k`, whose k
    is then theirs.
    """

    policies: list[str] = Field(default=list(SELECTIONS), min_length=1)
    adjustments: list[str] = Field(default=[NONE, *ADJUSTMENTS], min_length=1)
    capacities: list[str] = Field(default=[NONE, *CAPACITIES], min_length=1)
    ranges: dict[str, Written] = Field(default_factory=dict)
    scopes: list[Literal["source_rank", "global"]] = Field(default=["source_rank"], min_length=1)
    placements: list[str] = Field(default=list(_SEARCHED), min_length=1)
    redundant_slots: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    replica_choices: list[ReplicaChoice] = Field(default=["even", "nearest", "fewest_active"], min_length=1)
    away_shares: list[Annotated[float, Field(ge=0, le=1)]] = Field(default=[0.25, 1.0], min_length=1)
    resident_share: float = Field(default=1.0, gt=0, le=1)
    weights: Weights = "renormalised"
    subnetworks: SubnetworkSpace | None = Field(default=None, exclude_if=lambda value: value is None)

    @field_validator("policies", "adjustments", "capacities", "placements", mode="after")
    @classmethod
    def _known_names(cls, names: list[str], info: Any) -> list[str]:
        what, known = {
            "policies": ("policy", [*SELECTIONS]),
            "adjustments": ("adjustment", [NONE, *ADJUSTMENTS]),
            "capacities": ("capacity", [NONE, *CAPACITIES]),
            "placements": ("placement", [*PLACEMENTS]),
        }[info.field_name]
        for name in names:
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}; known are {', '.join(sorted(known))}")
        return names

    @field_validator("ranges", mode="after")
    @classmethod
    def _ranges_can_be_drawn(cls, ranges: dict[str, list[Any] | Values]) -> dict[str, list[Any] | Values]:
        return {name: _checked(name, written) for name, written in ranges.items()}

    def parts(self) -> list[type[Part]]:
        """Every part that may be chosen."""
        return [POLICIES[name] for name in (*self.policies, *self.adjustments, *self.capacities) if name != NONE]

    def range(self, part: type[Part], name: str) -> Range:
        """What may be drawn for a parameter of `part`."""
        parameter, written = parameters_of(part)[name], self.ranges.get(f"{part.name}.{name}")
        if name == _SCOPE and written is None:
            written = [scope for scope in parameter.choices if scope in self.scopes]
        return Range.of(parameter, written)


def _checked(name: str, written: list[Any] | Values) -> list[Any] | Values:
    part, _, parameter_name = name.partition(".")
    if part not in POLICIES:
        raise ValueError(f"{name}: unknown policy {part!r}; known are {', '.join(sorted(POLICIES))}")
    parameters = parameters_of(POLICIES[part])
    if parameter_name not in parameters:
        raise ValueError(f"{name}: {part} has no such parameter; it has {', '.join(parameters) or 'none'}")
    parameter = parameters[parameter_name]
    values = [as_declared(parameter, value) for value in (written.values if isinstance(written, Values) else written)]
    for value in values:
        try:
            parameter.check(part, parameter_name, value)
        except InputError as error:
            raise ValueError(f"{name}: {str(error).removeprefix(f'policy {part}: ')}") from error
    if isinstance(written, Values):
        return Values(values=values)
    if not parameter.choices and len(values) == 2 and values[0] > values[1]:
        raise ValueError(f"{name}: range [{values[0]}, {values[1]}] has its ends the wrong way round")
    if parameter.log and len(values) == 2 and values[0] <= 0:
        raise ValueError(
            f"{name}: range [{values[0]}, {values[1]}] is searched evenly in its logarithm; "
            "begin above 0, or list values"
        )
    return values


def suggest_config(trial: Suggests, space: Space) -> Config:
    """One config of the space."""
    policy = trial.suggest_categorical("policy", space.policies)
    of_part = space.subnetworks if policy == TopK.name else None
    subnetwork = None if of_part is None else of_part.suggest(trial)
    parameters = {} if subnetwork else _suggest_parameters(trial, space, SELECTIONS[policy])
    adjustment = trial.suggest_categorical("adjustment", space.adjustments)
    capacity = trial.suggest_categorical("capacity", space.capacities)
    algorithm = trial.suggest_categorical("placement", space.placements)
    redundant_slots = trial.suggest_categorical("redundant_slots", space.redundant_slots)
    replica_choice: ReplicaChoice = "even"
    if redundant_slots:
        replica_choice = trial.suggest_categorical("replica_choice", space.replica_choices)
    may_leave = PLACEMENTS[algorithm].may_leave
    away_share = trial.suggest_categorical("away_share", space.away_shares) if may_leave else 1.0
    width = (subnetwork.selection if subnetwork else make_selection(policy, parameters)).width
    limit = (
        None
        if capacity == NONE
        else CapacityChoice(name=capacity, **_suggest_parameters(trial, space, CAPACITIES[capacity]))
    )
    if limit is not None and limit.part().pad and replica_choice in SPLITS:
        replica_choice = "even"  # places are fixed before counts are known
    return Config(
        policy=policy,
        parameters=parameters,
        adjustment=None
        if adjustment == NONE
        else AdjustmentChoice(name=adjustment, **_suggest_parameters(trial, space, ADJUSTMENTS[adjustment], width)),
        capacity=limit,
        weights=space.weights,
        placement=PlacementChoice(
            algorithm=algorithm,
            redundant_slots=redundant_slots,
            replica_choice=replica_choice,
            away_share=away_share,
            resident_share=space.resident_share,
        ),
        subnetwork=subnetwork,
    )


def _suggest_parameters(trial: Suggests, space: Space, part: type[Part], width: int | None = None) -> dict[str, Any]:
    """The parameters of a part; those that count experts at most `width` if that is given, a token has no more."""
    drawn: dict[str, Any] = {}
    for name, parameter in parameters_of(part).items():
        allowed = space.range(part, name)
        if parameter.experts and width is not None:
            allowed = allowed.up_to(width)
        if (bound := _AT_MOST.get(f"{part.name}.{name}")) is not None:
            allowed = allowed.up_to(drawn[bound])
        drawn[name] = allowed.draw(trial, f"{part.name}.{name}")
    return drawn

"""Parameters of policies: what each may be, and the range that a search draws from.

A policy declares a parameter as a dataclass field whose metadata is made here. The same declaration checks values,
fills `moeroute policies` and bounds the tuner's search.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from traces.errors import InputError

_KEY = "parameter"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of a policy.

    A number: `least` and `most` bound what is allowed (None: nothing does), `low` to `high` in steps of `step` is what
    a search draws; with `log` twenty values a decade instead, evenly in its logarithm. A choice: one of `choices`.
    `whole`: a whole number. `experts`: it counts candidates of a token, so that a search goes no further than a trace
    has them. `meaning` is a phrase for tables.
    """

    meaning: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float = 1.0
    least: float | None = None
    most: float | None = None
    whole: bool = False
    experts: bool = False
    log: bool = False

    def check(self, policy: str, name: str, value: Any) -> None:
        """Raise `InputError` unless the parameter may be `value`."""
        if self.choices:
            if value not in self.choices:
                known = ", ".join(map(str, self.choices))
                raise InputError(f"policy {policy}: {name} is {value!r}; use one of {known}")
            return
        if self.whole and (isinstance(value, bool) or not isinstance(value, int)):
            raise InputError(f"policy {policy}: {name} is {value}; it must be a whole number{self._bounds()}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"policy {policy}: {name} is {value}; it must be a number{self._bounds()}")
        if (self.least is not None and value < self.least) or (self.most is not None and value > self.most):
            kind = "a whole number" if self.whole else "a number"
            raise InputError(f"policy {policy}: {name} is {value}; it must be {kind}{self._bounds()}")

    def to_json(self) -> dict[str, Any]:
        """What a reader of `moeroute policies` needs."""
        if self.choices:
            return {"type": "choice", "choices": list(self.choices), "meaning": self.meaning}
        return {
            "type": "int" if self.whole else "float",
            "low": self.low,
            "high": self.high,
            "step": self.step,
            "log": self.log,
            "meaning": self.meaning,
        }

    def _bounds(self) -> str:
        if self.least is not None and self.most is not None:
            return f" from {self.least:g} to {self.most:g}"
        if self.least is not None:
            return f" of at least {self.least:g}"
        return ""


def whole(low: int, high: int, meaning: str, *, least: int = 1, experts: bool = True) -> dict[str, Parameter]:
    """Metadata of a whole number, one that counts a token's experts unless `experts` says otherwise."""
    return {
        _KEY: Parameter(meaning=meaning, low=low, high=high, step=1, least=least, whole=True, experts=experts),
    }


def number(
    low: float,
    high: float,
    meaning: str,
    *,
    step: float = 0.01,
    least: float | None = 0.0,
    most: float | None = None,
    log: bool = False,
) -> dict[str, Parameter]:
    """Metadata of a number; one whose order of magnitude is open is searched on a `log` scale, `low` above 0."""
    assert low > 0 or not log
    return {_KEY: Parameter(meaning=meaning, low=low, high=high, step=step, least=least, most=most, log=log)}


def share(low: float, high: float, meaning: str, *, step: float = 0.01) -> dict[str, Parameter]:
    """Metadata of a number from 0 to 1."""
    return number(low, high, meaning, step=step, least=0.0, most=1.0)


def choice(choices: tuple[Any, ...], meaning: str) -> dict[str, Parameter]:
    """Metadata of one of a few values."""
    return {_KEY: Parameter(meaning=meaning, choices=choices)}


def parameters_of(policy: Any) -> Mapping[str, Parameter]:
    """The declared parameters of a policy or of its class, by name."""
    return {field.name: field.metadata[_KEY] for field in fields(policy) if _KEY in field.metadata}


def check_parameters(policy: Any) -> None:
    """Raise `InputError` unless every declared parameter of `policy` has a value it may have."""
    for name, parameter in parameters_of(policy).items():
        parameter.check(policy.name, name, getattr(policy, name))

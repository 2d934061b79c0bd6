"""Space: from the parameters that Optuna suggests to a config. Conditional: a policy brings only its own."""

import math
from typing import Any, Literal, Protocol

import numpy as np

from tuner.scenario import CapacityChoice, Config, PlacementChoice, Space


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


# Steps finer than these change no decision that a run could tell apart, and coarse ones let a study see repeats.
_PROBABILITY_STEP = 0.01
_FACTOR_STEP = 0.05


def suggest_config(trial: Suggests, space: Space) -> Config:
    """One config of the space."""
    policy = trial.suggest_categorical("policy", space.policies)
    low, high = space.k
    parameters: dict[str, float] = {}
    if policy == "top_k":
        parameters["k"] = trial.suggest_int("k", low, high)
    elif policy == "top_p":
        parameters["p"] = _stepped(trial, "p", space.top_p, _PROBABILITY_STEP)
        parameters["k_max"] = trial.suggest_int("top_p k_max", min(max(low, 2), high), high)
    else:
        parameters["threshold"] = _stepped(trial, "threshold", space.skip_threshold, _PROBABILITY_STEP)
        parameters["k_max"] = trial.suggest_int("skip k_max", min(max(low, 2), high), high)
    capacity = None
    if space.capacity_factor is not None and trial.suggest_categorical("limited", [False, True]):
        capacity = CapacityChoice(
            factor=_stepped(trial, "capacity_factor", space.capacity_factor, _FACTOR_STEP),
            drop=trial.suggest_categorical("drop", space.capacity_drops),
        )
    algorithm = trial.suggest_categorical("placement", space.placements)
    redundant_slots = trial.suggest_categorical("redundant_slots", space.redundant_slots)
    replica_choice: Literal["even", "local"] = "even"
    if redundant_slots:
        replica_choice = trial.suggest_categorical("replica_choice", space.replica_choices)
    return Config(
        policy=policy,
        parameters=parameters,
        capacity=capacity,
        placement=PlacementChoice(algorithm=algorithm, redundant_slots=redundant_slots, replica_choice=replica_choice),
    )


def _stepped(trial: Suggests, name: str, bounds: tuple[float, float], step: float) -> float:
    """A number on a grid of `step` from the lower bound, so that equal configs look equal."""
    low, high = bounds
    steps = math.floor((high - low) / step + 1e-9)  # the last part of a step would lie outside
    return round(trial.suggest_float(name, low, low + steps * step, step=step), 6)

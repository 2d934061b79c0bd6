"""The space of a study: every config it suggests is one that the user allowed."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.scenario import Config, Space
from tuner.space import suggest_config


class Draws:
    """Uniform suggestions in place of Optuna's, as strict about empty ranges as it is."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.names: list[str] = []

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        self.names.append(name)
        assert choices, name
        return choices[int(self._rng.integers(len(choices)))]

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self.names.append(name)
        assert low <= high, f"{name}: [{low}, {high}]"
        return int(self._rng.integers(low, high + 1))

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None) -> float:
        self.names.append(name)
        assert low <= high, f"{name}: [{low}, {high}]"
        assert step is not None
        steps = math.floor((high - low) / step + 1e-9)
        return low + step * int(self._rng.integers(0, steps + 1))


def configs(space: Space, count: int = 60) -> list[Config]:
    return [suggest_config(Draws(seed), space) for seed in range(count)]


def test_each_policy_brings_its_own_parameters() -> None:
    by_policy = {config.policy: set(config.parameters) for config in configs(Space())}
    assert by_policy == {"top_k": {"k"}, "top_p": {"p", "k_max"}, "skip": {"threshold", "k_max"}}


def test_a_parameter_is_asked_for_only_where_it_means_something() -> None:
    draws = Draws(0)
    suggest_config(draws, Space(policies=["top_k"], capacity_factor=None))
    assert draws.names == ["policy", "k", "placement", "redundant_slots"]
    draws = Draws(0)
    suggest_config(draws, Space(policies=["top_k"], capacity_factor=None, redundant_slots=[4]))
    assert draws.names == ["policy", "k", "placement", "redundant_slots", "replica_choice"]


def test_without_a_capacity_factor_there_is_no_capacity() -> None:
    assert {config.capacity for config in configs(Space(capacity_factor=None))} == {None}
    limited = [config.capacity for config in configs(Space()) if config.capacity is not None]
    assert {capacity.drop for capacity in limited} == {"position", "probs"}


@pytest.mark.parametrize("policy", ["top_k", "top_p", "skip"])
def test_a_space_of_one_expert_a_token_can_be_searched(policy: str) -> None:
    """k: [1, 1] is what a Switch-like model has."""
    for config in configs(Space(policies=[policy], k=(1, 1)), 5):
        assert config.routing_policy().width == 1


@st.composite
def ranges(draw: st.DrawFn, low: float, high: float) -> tuple[float, float]:
    one, other = (round(draw(st.floats(low, high)), 4) for _ in range(2))
    return min(one, other), max(one, other)


@settings(max_examples=200, deadline=None)
@given(
    k=st.tuples(st.integers(1, 8), st.integers(2, 8)).map(lambda pair: (min(pair), max(pair))),
    top_p=ranges(0.01, 1.0),
    threshold=ranges(0.01, 1.0),
    factor=ranges(0.1, 4.0),
    seed=st.integers(0, 2**16),
)
def test_every_suggestion_lies_in_the_ranges(
    k: tuple[int, int],
    top_p: tuple[float, float],
    threshold: tuple[float, float],
    factor: tuple[float, float],
    seed: int,
) -> None:
    space = Space(k=k, top_p=top_p, skip_threshold=threshold, capacity_factor=factor)
    config = suggest_config(Draws(seed), space)
    for name, (low, high) in {"k": k, "k_max": k, "p": top_p, "threshold": threshold}.items():
        if name in config.parameters:
            assert low <= config.parameters[name] <= high, name
    if config.capacity is not None:
        assert factor[0] <= config.capacity.factor <= factor[1]


def test_steps_are_coarse_enough_to_meet_the_same_config_again() -> None:
    space = Space(policies=["top_p"], k=(2, 2), top_p=(0.3, 0.4), capacity_factor=None, placements=["lpt"])
    shares = {config.parameters["p"] for config in configs(space, 300)}
    assert shares == {round(0.3 + 0.01 * step, 2) for step in range(11)}

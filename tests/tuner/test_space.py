"""The space of a study: every config it suggests is one that the user allowed and the trace can serve."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from study_cases import scenario_document

from router.nn.expert_parallel import check_runnable
from router.parameters import parameters_of
from router.policies import ADJUSTMENTS, CAPACITIES, POLICIES, SELECTIONS
from traces.errors import InputError
from traces.presets import preset
from traces.synthetic import synthetic_trace
from traces.trace import RoutingTrace
from tuner.replays import Replays
from tuner.scenario import Config, Space, parse_scenario
from tuner.space import RandomSuggestions, Values, suggest_config

NOTHING_ELSE: dict[str, Any] = {"adjustments": ["none"], "capacities": ["none"]}


class Draws:
    """Uniform suggestions in place of Optuna's, as strict as it is about empty ranges and steps."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.names: list[str] = []

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        self._ask(name)
        assert choices, name
        return choices[int(self._rng.integers(len(choices)))]

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self._ask(name)
        assert low <= high, f"{name}: [{low}, {high}]"
        return int(self._rng.integers(low, high + 1))

    def suggest_float(self, name: str, low: float, high: float, *, step: float) -> float:
        self._ask(name)
        assert low <= high, f"{name}: [{low}, {high}]"
        steps = (high - low) / step
        assert math.isclose(steps, round(steps), abs_tol=1e-6), f"{name}: [{low}, {high}] by {step}"
        return low + step * int(self._rng.integers(0, round(steps) + 1))

    def _ask(self, name: str) -> None:
        assert name not in self.names, f"{name} is asked for twice"
        self.names.append(name)


def configs(space: Space, count: int = 60) -> list[Config]:
    return [suggest_config(Draws(seed), space) for seed in range(count)]


def fitted(space: dict[str, Any] | None = None, **trace: Any) -> Space:
    """The space of a small scenario, cut to its trace: Mixtral's 8 experts, of which a token uses 2."""
    return prepared(space, **trace).scenario.study.space


def prepared(space: dict[str, Any] | None = None, **trace: Any) -> Replays:
    document = scenario_document(
        trace={"model": "mixtral-8x7b", "tokens": 4096, "zipf": 0.5, **trace},
        study={"space": space or {}},
        sampled_layers=1,
        fidelity="analytic",
    )
    return Replays.of(parse_scenario(document, source="a test"))


def test_every_policy_is_in_the_default_space() -> None:
    space = Space()
    assert [part.name for part in space.parts()] == [*SELECTIONS, *ADJUSTMENTS, *CAPACITIES] == [*POLICIES]


def test_each_part_brings_its_own_parameters() -> None:
    for config in configs(Space(), 300):
        assert set(config.parameters) == set(parameters_of(SELECTIONS[config.policy]))
        for choice in (config.adjustment, config.capacity):
            if choice is not None:
                assert set(choice.parameters) == set(parameters_of(POLICIES[choice.name]))


def test_a_parameter_is_asked_for_only_where_it_means_something() -> None:
    draws = Draws(0)
    suggest_config(draws, Space(policies=["top_k"], **NOTHING_ELSE))
    assert draws.names == ["policy", "top_k.k", "adjustment", "capacity", "placement", "redundant_slots"]
    draws = Draws(0)
    suggest_config(draws, Space(policies=["top_k"], **NOTHING_ELSE, redundant_slots=[4]))
    assert draws.names[-2:] == ["redundant_slots", "replica_choice"]


def test_without_capacities_there_is_no_capacity() -> None:
    assert {config.capacity for config in configs(Space(capacities=["none"]))} == {None}
    limited = [c.capacity.parameters for c in configs(Space(capacities=["capacity"])) if c.capacity is not None]
    assert {parameters["drop"] for parameters in limited} >= {"position", "probs"}


def test_parts_look_at_their_own_rank_unless_the_user_says_more() -> None:
    """A real rank knows no other tokens, and what a study finds is to be validated."""
    for config in configs(Space(), 300):
        for choice in (config.adjustment, config.capacity):
            assert choice is None or choice.parameters.get("scope") in (None, "source_rank")
        check_runnable(config.routing_policy(), ranks=2)
    wider = Space(capacities=["capacity"], scopes=["source_rank", "global"])
    assert {c.capacity.parameters["scope"] for c in configs(wider) if c.capacity} == {"source_rank", "global"}
    named = Space(capacities=["capacity"], ranges={"capacity.scope": ["global"]})
    assert {c.capacity.parameters["scope"] for c in configs(named) if c.capacity} == {"global"}


@pytest.mark.parametrize(
    ("written", "drawn"),
    [([2, 4], {2, 3, 4}), ({"values": [2, 4]}, {2, 4}), ([1, 2, 4], {1, 2, 4}), ([3], {3}), (3, {3}), ([2, 2], {2})],
    ids=str,
)
def test_two_numbers_are_a_range_and_others_are_values(written: Any, drawn: set[int]) -> None:
    space = Space(policies=["top_k"], ranges={"top_k.k": written})
    assert {config.parameters["k"] for config in configs(space)} == drawn


def test_a_number_declared_so_is_drawn_in_its_logarithm() -> None:
    space = Space(policies=["balance_bias"], **NOTHING_ELSE, ranges={"balance_bias.rate": [1e-4, 1e-1]})
    rates = [config.parameters["rate"] for config in configs(space, 600)]
    assert min(rates) == 1e-4
    assert max(rates) == 1e-1
    # 61 values, 20 in each of three decades and one at the end.
    by_decade = [sum(low <= rate < 10 * low for rate in rates) / 600 for low in (1e-4, 1e-3, 1e-2)]
    assert all(0.25 < share < 0.41 for share in by_decade)
    narrow = Space(policies=["balance_bias"], **NOTHING_ELSE, ranges={"balance_bias.rate": [0.01, 0.02]})
    # 10 ** -2, and .05 more in the exponent up to -1.70: seven values, each a ninth above the one before.
    assert sorted({config.parameters["rate"] for config in configs(narrow, 300)}) == [
        *(0.01, 0.011, 0.013, 0.014, 0.016, 0.018, 0.02)
    ]


def test_a_logarithm_begins_above_zero() -> None:
    with pytest.raises(ValueError, match=r"range \[0.0, 1.0\] is searched evenly in its logarithm; begin above 0"):
        Space(ranges={"hardware_aware.price": [0, 1]})
    written = Space(ranges={"hardware_aware.price": {"values": [0, 1]}}).ranges["hardware_aware.price"]
    assert isinstance(written, Values)
    assert written.values == [0, 1]


@st.composite
def ranges(draw: st.DrawFn, low: float, high: float) -> list[float]:
    one, other = (round(draw(st.floats(low, high)), 4) for _ in range(2))
    return [min(one, other), max(one, other)]


@settings(max_examples=200, deadline=None)
@given(
    k=st.tuples(st.integers(1, 8), st.integers(1, 8)).map(sorted),
    top_p=ranges(0.01, 1.0),
    threshold=ranges(0.01, 1.0),
    factor=ranges(0.1, 4.0),
    seed=st.integers(0, 2**16),
)
def test_every_suggestion_lies_in_the_ranges(
    k: Sequence[int], top_p: Sequence[float], threshold: Sequence[float], factor: Sequence[float], seed: int
) -> None:
    written = {
        "top_k.k": k,
        "top_p.k_max": k,
        "skip.k_max": k,
        "top_p.p": top_p,
        "skip.threshold": threshold,
        "capacity.factor": factor,
    }
    space = Space(policies=["top_k", "top_p", "skip"], capacities=["none", "capacity"], ranges=written)
    config = suggest_config(Draws(seed), space)
    for name, value in config.parameters.items():
        low, high = written[f"{config.policy}.{name}"]
        assert low <= value <= high, name
    if config.capacity is not None:
        assert factor[0] <= config.capacity.parameters["factor"] <= factor[1]


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_every_suggestion_of_the_default_space_lies_in_what_is_declared(seed: int) -> None:
    config = suggest_config(Draws(seed), Space())
    assert Config.model_validate(config.model_dump(mode="json")) == config
    for part in config.routing_policy().parts:
        for name, parameter in parameters_of(part).items():
            value = getattr(part, name)
            if parameter.choices:
                assert value in parameter.choices
            elif not parameter.experts:
                assert parameter.low <= value <= parameter.high, f"{part.name}.{name}"


def test_steps_are_coarse_enough_to_meet_the_same_config_again() -> None:
    space = Space(policies=["top_p"], ranges={"top_p.k_max": 2, "top_p.p": [0.3, 0.4]}, placements=["lpt"])
    shares = {config.parameters["p"] for config in configs(space, 300)}
    assert shares == {round(0.3 + 0.01 * step, 2) for step in range(11)}


def test_an_adjustment_counts_no_more_experts_than_a_token_has() -> None:
    space = Space(policies=["top_k"], adjustments=["opportunistic"], ranges={"top_k.k": [1, 3]})
    for config in configs(space):
        assert config.adjustment is not None
        assert config.adjustment.parameters["k0"] <= config.parameters["k"]


@pytest.mark.parametrize("candidates", [2, 4, 8])
def test_whatever_the_default_space_suggests_runs_on_its_trace(candidates: int) -> None:
    """Mixtral's own two candidates, some more, and all eight."""
    replays = prepared(candidates=candidates)
    generator = RandomSuggestions(seed=candidates)
    met = set()
    for _ in range(120):
        config = suggest_config(generator, replays.scenario.study.space)
        report, _, _ = replays.run(config)
        assert report.step_s > 0
        met |= {config.policy, *(choice.name for choice in (config.adjustment, config.capacity) if choice)}
    assert met == {part.name for part in replays.scenario.study.space.parts()}


def test_the_default_space_has_what_the_trace_can_serve() -> None:
    full, few = fitted(candidates=8), fitted(candidates=2)
    assert {*full.policies} == {*SELECTIONS} - {"null_experts"}
    assert {*few.policies} == {*SELECTIONS} - {
        "null_experts",
        "group_limited",
        "expert_choice",
        "balance_bias",
        "partners",
    }
    for name, part in ADJUSTMENTS.items():
        assert name in full.adjustments
        assert (name in few.adjustments) == ("more candidates than k" not in part.needs)
    assert full.range(CAPACITIES["capacity"], "reroute").values == ("none", "same_rank", "any")
    assert few.range(CAPACITIES["capacity"], "reroute").values == ("none",)
    # 2 candidates a token, or 7 of the 8 where some part needs another to choose from; no cut where all are recorded.
    assert few.range(SELECTIONS["top_k"], "k").most == 2
    assert fitted(candidates=7).range(SELECTIONS["top_k"], "k").most == 6
    assert full.range(SELECTIONS["top_k"], "k").most == 8
    # Groups of 2 experts at least, since a token uses 2: 2 groups of 4, 4 of 2; at most the 2 experts of one group.
    assert full.range(SELECTIONS["group_limited"], "groups").values == (2, 4)
    assert full.range(SELECTIONS["group_limited"], "k").most == 2


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"policies": ["expert_choice"]}, "study.space.policies: expert_choice needs the scores of all experts; the "),
        ({"policies": ["null_experts"]}, "study.space.policies: null_experts needs null experts, and mixtral-8x7b has"),
        (
            {"adjustments": ["hardware_aware"]},
            "study.space.adjustments: hardware_aware needs more candidates than the 2",
        ),
        ({"ranges": {"top_k.k": [1, 3]}}, "study.space.ranges.top_k.k: the policy needs 3 candidates per token; the "),
        ({"ranges": {"top_k.k": [1, 9]}}, "study.space.ranges.top_k.k: 9 experts a token, but the model has 8"),
        ({"ranges": {"capacity.reroute": ["none", "any"]}}, "study.space.ranges.capacity.reroute: any needs more "),
    ],
    ids=["full scores", "null experts", "more candidates", "k above C", "k above E", "a choice"],
)
def test_what_the_user_wrote_and_the_trace_cannot_serve_is_refused(space: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        fitted(space, candidates=2)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"groups": [3, 3], "k": 2}, "finds no number of groups that divides the 8 experts"),
        ({"groups": {"values": [4]}, "k": 4, "kept_groups": 1}, "may draw 4 experts from 1 of 4 groups of 2"),
        ({"groups": {"values": [2]}, "k": 2, "kept_groups": 4}, "or 4 of 2 groups; narrow group_limited.k"),
    ],
    ids=["no divisor", "too small", "too many"],
)
def test_groups_that_cannot_be_are_refused(written: dict[str, Any], message: str) -> None:
    space = {"policies": ["group_limited"], "ranges": {f"group_limited.{name}": v for name, v in written.items()}}
    with pytest.raises(InputError) as refused:
        fitted(space, candidates=8)
    assert message in str(refused.value)


def test_a_written_range_of_groups_gives_those_that_divide_the_experts() -> None:
    space = fitted({"policies": ["group_limited"], "ranges": {"group_limited.groups": [2, 6]}}, candidates=8)
    assert {config.parameters["groups"] for config in configs(space)} == {2, 4}


def test_only_slots_that_may_leave_their_node_are_asked_how_many_may() -> None:
    placements = ["hierarchical", "soft_hierarchical"]
    space = Space(policies=["top_k"], **NOTHING_ELSE, placements=placements, away_shares=[0.25, 0.5])
    drawn = {(config.placement.algorithm, config.placement.away_share) for config in configs(space)}
    assert drawn == {("hierarchical", 1.0), ("soft_hierarchical", 0.25), ("soft_hierarchical", 0.5)}


def test_a_capacity_that_pads_gets_replicas_that_need_no_counts() -> None:
    space = Space(
        policies=["top_k"],
        adjustments=["none"],
        capacities=["none", "capacity"],
        ranges={"capacity.pad": {"values": [True, False]}},
        redundant_slots=[4],
        replica_choices=["fewest_active"],
    )
    drawn = {
        (config.capacity is not None and config.capacity.part().pad, config.placement.replica_choice)
        for config in configs(space)
    }
    assert drawn == {(True, "even"), (False, "fewest_active")}


@pytest.mark.parametrize(("slots", "pad", "refused"), [(4, True, True), (4, False, False), (0, True, False)])
def test_a_config_whose_replicas_need_counts_cannot_pad(slots: int, pad: bool, refused: bool) -> None:
    document = {
        "policy": "top_k",
        "parameters": {"k": 2},
        "capacity": {"factor": 1.25, "pad": pad},
        "placement": {"redundant_slots": slots, "replica_choice": "fewest_active"},
    }
    if refused:
        with pytest.raises(ValueError, match="replica_choice fewest_active needs the counts of all ranks"):
            Config.model_validate(document)
    else:
        assert Config.model_validate(document).placement.redundant_slots == slots


def placements_of(trace: RoutingTrace, placements: list[str] | None = None, *, tokens_per_rank: int = 16) -> list[str]:
    """The placements of the space of a scenario with this trace on two nodes."""
    document = scenario_document(
        cluster={"device": "h100_sxm", "ranks": 16},
        batch={"phase": "prefill", "tokens_per_rank": tokens_per_rank, "steps": 1},
        config={"policy": "top_k", "parameters": {"k": 2}, "placement": {"redundant_slots": 8}},
        study={"space": {} if placements is None else {"placements": placements}},
        windows={"plan": 1, "tune": 4, "validate": 4},
        sampled_layers=1,
        fidelity="analytic",
    )
    return Replays.of(parse_scenario(document, source="a test"), trace).scenario.study.space.placements


def mixtral(**changes: Any) -> RoutingTrace:
    """9216 tokens of a layer of Mixtral's, in 144 requests."""
    model = replace(preset("mixtral-8x7b"), layers=1, **changes)
    return synthetic_trace(model, tokens=9216, zipf=0.5, seed=0, tokens_per_request=64)


@pytest.mark.parametrize(
    ("model", "tokens_per_rank", "name", "message"),
    [
        ({"expert_groups": 1}, 16, "hierarchical", "packs groups of experts on nodes, and mixtral-8x7b has 1 for 2"),
        ({"null_experts": 1, "null_kind": "zero"}, 16, "affinity", "some are null in mixtral-8x7b"),
        ({}, 128, "active_aware", "is planned on steps of the plan window: "),
    ],
    ids=["groups", "null experts", "no steps"],
)
def test_a_placement_that_lacks_something_is_refused(
    model: dict[str, Any], tokens_per_rank: int, name: str, message: str
) -> None:
    """And left out where nobody wrote it. The plan window has 1024 tokens; 16 ranks of 128 need twice as many."""
    trace = mixtral(**model)
    with pytest.raises(InputError) as refused:
        placements_of(trace, [name], tokens_per_rank=tokens_per_rank)
    assert str(refused.value).startswith(f"study.space.placements: {name} ")
    assert message in str(refused.value)
    assert name not in placements_of(trace, tokens_per_rank=tokens_per_rank)


def test_a_placement_that_has_what_it_needs_is_kept() -> None:
    asked = ["hierarchical", "affinity", "active_aware"]
    assert placements_of(mixtral(expert_groups=4), asked) == asked
    assert {"affinity", "active_aware"} <= {*placements_of(mixtral())}


def test_groups_of_the_model_are_kept_on_nodes() -> None:
    placement = {"algorithm": "hierarchical", "redundant_slots": 8}
    document = scenario_document(
        cluster={"device": "h100_sxm", "ranks": 16},
        config={"policy": "top_k", "parameters": {"k": 2}, "placement": placement},
    )
    replays = Replays.of(parse_scenario(document, source="a test"), mixtral(expert_groups=4))
    for expert_S in replays.placement(replays.scenario.config).slot_to_expert_LS:
        first, second = (set((half // 2).tolist()) for half in expert_S.reshape(2, -1))
        assert (len(first), len(second), first & second) == (2, 2, set())


def test_completed_candidates_serve_more(tmp_path: Path) -> None:
    document = scenario_document(
        trace={"model": "mixtral-8x7b", "tokens": 4096, "zipf": 0.5},
        candidates=4,
        config={"policy": "top_k", "parameters": {"k": 3}},
        sampled_layers=1,
    )
    replays = Replays.of(parse_scenario(document, source="a test"))
    assert "partners" in replays.scenario.study.space.policies
    assert replays.windows["tune"].trace.candidates == 4
    assert replays.trace.candidates == 2  # what was recorded, which a journal's identity is of
    report, _, _ = replays.run(replays.scenario.config)
    assert report.completed
    assert report.to_json()["completed"] is True
    plain = Replays.of(parse_scenario(scenario_document(trace=document["trace"]), source="a test"))
    assert not plain.run(plain.scenario.config)[0].completed


def test_what_cannot_be_completed_is_said() -> None:
    document = scenario_document(trace={"model": "mixtral-8x7b", "tokens": 4096, "zipf": 0.5}, candidates=2)
    with pytest.raises(InputError, match=r"^candidates: .*complete 2 candidates to 2; use 3 to 8 \(experts\)"):
        Replays.of(parse_scenario(document, source="a test"))

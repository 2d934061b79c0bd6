"""Scenario files: what is wrong with one is said in one line that names the file, the field, the value and the mend."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from study_cases import scenario_document

from cost_models.profile import Profile
from router.capacity import Capacity
from router.policies import ADJUSTMENTS, CAPACITIES
from router.policies.skip import Skip
from router.policies.top_k import TopK
from router.policies.top_p import TopP
from sim.execution import Execution
from sim.faults import Disturbance, Fault
from sim.report import Report
from traces.errors import InputError
from tuner.clusters import make_cluster
from tuner.identity import study_identity
from tuner.replays import Replays
from tuner.scenario import Config, Scenario, parse_scenario, read_scenario
from tuner.space import RandomSuggestions, suggest_config
from tuner.study import tune


def written(folder: Path, **changes: Any) -> Path:
    """A scenario file; `trace__zipf=-1` changes a key of a section, `...` takes it out."""
    document = scenario_document()
    for place, value in changes.items():
        *sections, key = place.split("__")
        target = document
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = value
        if value is ...:
            del target[key]
    path = folder / "scenario.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def refusal(path: Path) -> str:
    """What is said of the file, after its name."""
    with pytest.raises(InputError) as refused:
        read_scenario(path)
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_a_minimal_file_has_defaults(tmp_path: Path) -> None:
    scenario = read_scenario(written(tmp_path))
    assert (scenario.costs, scenario.fidelity, scenario.protocol, scenario.seed) == (
        "datasheet",
        "event",
        "per_expert",
        0,
    )
    assert scenario.config.placement.algorithm == "contiguous"
    assert scenario.windows.shares == (2, 3, 3)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    path = written(tmp_path / "deep", trace="../trace.parquet", costs="profile.json")
    scenario = read_scenario(path)
    assert scenario.trace == tmp_path / "deep" / ".." / "trace.parquet"
    assert scenario.costs == tmp_path / "deep" / "profile.json"
    absolute = read_scenario(written(tmp_path, trace="/somewhere/trace.parquet"))
    assert absolute.trace == Path("/somewhere/trace.parquet")


def test_windows_are_spelled_plan_tune_validate(tmp_path: Path) -> None:
    scenario = read_scenario(written(tmp_path, windows={"plan": 1, "tune": 2, "validate": 4}))
    assert scenario.windows.shares == (1, 2, 4)


def test_a_config_is_the_policy_that_runs() -> None:
    config = Config.model_validate(
        {"policy": "top_p", "parameters": {"p": 0.5, "k_max": 4}, "capacity": {"factor": 1.25, "drop": "position"}}
    )
    policy = config.routing_policy()
    assert policy.selection == TopP(p=0.5, k_max=4)
    assert policy.capacity == Capacity(factor=1.25, drop="position", scope="source_rank")
    assert config.describe() == "top_p(p=0.5, k_max=4) cf=1.25 position contiguous"
    assert Config(policy="top_k", parameters={"k": 2}).routing_policy().selection == TopK(k=2)
    skip = Config(policy="skip", parameters={"threshold": 0.25, "k_max": 2})
    assert skip.routing_policy().selection == Skip(threshold=0.25, k_max=2)


def test_a_config_composes_selection_adjustment_and_capacity() -> None:
    config = Config.model_validate(
        {
            "policy": "top_k",
            "parameters": {"k": 4},
            "adjustment": {"name": "opportunistic", "k0": 2, "scope": "global"},
            "capacity": {"name": "capacity_aware", "gamma": 1.5},
        }
    )
    policy = config.routing_policy()
    assert policy.parts == (
        TopK(k=4),
        ADJUSTMENTS["opportunistic"](k0=2, scope="global"),  # type: ignore[call-arg]  # its own parameters
        CAPACITIES["capacity_aware"](gamma=1.5),  # type: ignore[call-arg]
    )
    assert config.describe().startswith("top_k(k=4) opportunistic(k0=2, scope=global) ")
    assert Config.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"parameters": {"p": 0.5, "k_max": 4}}, {"parameters": {"k_max": 4.0, "p": "5e-1"}}),
        ({"capacity": {"factor": 1}}, {"capacity": {"name": "capacity", "factor": 1.0, "drop": "probs", "pad": False}}),
        ({"adjustment": {"name": "opportunistic", "k0": 2}}, {"adjustment": {"k0": 2.0, "name": "opportunistic"}}),
        ({}, {"adjustment": None, "capacity": None, "placement": {"algorithm": "contiguous"}}),
    ],
    ids=["parameters", "capacity", "adjustment", "defaults"],
)
def test_two_ways_to_write_a_config_are_one(one: dict[str, Any], other: dict[str, Any]) -> None:
    base = {"policy": "top_p", "parameters": {"p": 0.5, "k_max": 4}}
    first, second = Config.model_validate({**base, **one}), Config.model_validate({**base, **other})
    assert first == second
    assert first.key() == second.key()
    assert first.describe() == second.describe()


def test_configs_that_differ_have_different_keys() -> None:
    parts: list[dict[str, Any]] = [
        {},
        {"adjustment": {"name": "opportunistic", "k0": 2}},
        {"adjustment": {"name": "opportunistic", "k0": 1}},
        {"capacity": {"factor": 1.25}},
        {"capacity": {"factor": 1.25, "drop": "position"}},
        {"capacity": {"factor": 1.25, "pad": True}},
    ]
    configs = [Config.model_validate({"policy": "top_k", "parameters": {"k": 4}, **part}) for part in parts]
    assert len({config.key() for config in configs}) == len({config.describe() for config in configs}) == len(parts)


SHIPPED = sorted(
    path for folder in ("moeroute", "examples") for path in (Path(__file__).parents[2] / folder).glob("*.yaml")
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_scenarios_that_come_with_it_can_be_read(path: Path) -> None:
    assert read_scenario(path).config.routing_policy().width > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "colour: unknown key; remove it or correct its name"),
        ({"batch__tokens": 4}, "batch.tokens: unknown key; remove it or correct its name"),
        ({"study": {"space": {"ks": [1, 2]}}}, "study.space.ks: unknown key; remove it or correct its name"),
        ({"name": ...}, "name: missing; add it"),
        ({"batch__steps": ...}, "batch.steps: missing; add it"),
        ({"version": 2}, "version: input should be 1 (it is 2)"),
        (
            {"cluster__ranks": "eight"},
            "cluster.ranks: input should be a valid integer, unable to parse string as an integer (it is 'eight')",
        ),
        ({"cluster__ranks": 0}, "cluster.ranks: input should be greater than 0 (it is 0)"),
        ({"batch__phase": "both"}, "batch.phase: input should be 'prefill' or 'decode' (it is 'both')"),
        ({"batch": None}, "batch: input should be a valid dictionary or instance of Batch (it is None)"),
        (
            {"config__capacity": {"factor": -1}},
            "config.capacity: policy capacity: factor is -1; only rule tutel takes a negative one",
        ),
        (
            {"config__capacity": {"drop": "probs"}},
            "config.capacity: capacity lacks factor; it takes factor, and if you like drop, scope, rule",
        ),
        (
            {"config__capacity": {"factor": 1, "dorp": "probs"}},
            "config.capacity: capacity does not know dorp; it",
        ),
        (
            {"config__capacity": {"factor": 1, "drop": "last"}},
            "config.capacity: policy capacity: drop is 'last'; use one of position, probs",
        ),
        ({"config__capacity": {"name": "best"}}, "config.capacity: unknown capacity 'best'; known are capacity"),
        ({"config__capacity": 2}, "config.capacity: write it as {factor: 1.25}, or none (it is 2)"),
        ({"config__adjustment": {"k0": 2}}, "config.adjustment.name: missing; add it"),
        ({"config__adjustment": {"name": 2}}, "config.adjustment.name: input should be a valid string (it is 2)"),
        ({"config__adjustment": {"name": "best"}}, "config.adjustment: unknown adjustment 'best'; known are"),
        (
            {"config__adjustment": {"name": "top_k", "k": 2}},
            "config.adjustment: top_k is no adjustment; write policy",
        ),
        ({"study": {"trials": 0}}, "study.trials: input should be greater than 0 (it is 0)"),
        ({"windows": {"plan": -1}}, "windows.plan: input should be greater than 0 (it is -1)"),
        ({"config__parameters": {"k": "two"}}, "config: policy top_k: k is two; it must be a whole number of at least"),
        ({"config__parameters": {"k": [2]}}, "config: policy top_k: k is [2]; it must be a whole number of at least 1"),
        ({"config__parameters": 2}, "config: parameters are 2; write them by name, as {k: 4}"),
        ({"config__policy": "best"}, "config: unknown policy 'best'; known are balance_bias, expert_choice,"),
        ({"config__policy": 2}, "config.policy: input should be a valid string (it is 2)"),
        ({"config__parameters": {"p": 0.5}}, "config: policy top_k does not know p; it takes k"),
        ({"config__parameters": {}}, "config: policy top_k lacks k; it takes k"),
        (
            {"config__placement": {"algorithm": "best"}},
            "config.placement: unknown placement 'best'; known are active_aware",
        ),
        ({"cluster__device": "h9"}, "cluster: unknown device 'h9'; known are cpu, a100_sxm"),
        ({"study": {"space": {"policies": ["best"]}}}, "study.space.policies: unknown policy 'best'; known are"),
        ({"study": {"space": {"placements": ["best"]}}}, "study.space.placements: unknown placement 'best'; known"),
        (
            {"study": {"space": {"capacities": ["top_k"]}}},
            "study.space.capacities: unknown capacity 'top_k'; known are capacity",
        ),
        (
            {"study": {"space": {"ranges": {"top_k.k": [4, 1]}}}},
            "study.space.ranges: top_k.k: range [4, 1] has its ends the wrong way round",
        ),
        (
            {"study": {"space": {"ranges": {"top_k.n": [1, 4]}}}},
            "study.space.ranges: top_k.n: top_k has no such parameter; it has k",
        ),
        ({"study": {"space": {"ranges": {"best.k": 4}}}}, "study.space.ranges: best.k: unknown policy 'best'; known"),
        (
            {"study": {"space": {"ranges": {"capacity.drop": "last"}}}},
            "study.space.ranges: capacity.drop: drop is 'last'; use one of position, probs",
        ),
        ({"candidates": 0}, "candidates: input should be greater than or equal to 1 (it is 0)"),
        ({"study": {"sampler": "grid"}}, "study.sampler: input should be 'tpe' or 'nsga2' (it is 'grid')"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(value))[:40] if isinstance(value, dict) else "",
)
def test_a_mistake_is_named_with_its_field_and_value(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    said = refusal(written(tmp_path, **changes))
    assert said == message or said.startswith(message), said


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"trace__zipff": 1}, "trace.zipff"),
        ({"trace__tokens": "many"}, "trace.tokens"),
        ({"trace__tokens": -1}, "trace.tokens"),
        ({"trace__model": ...}, "trace.model"),
        ({"trace": 5}, "trace"),
        ({"costs": 5}, "costs"),
    ],
    ids=["unknown key", "wrong type", "negative", "missing", "trace is a number", "costs is a number"],
)
def test_a_mistake_in_a_trace_or_the_costs_is_named_too(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    """`trace` is a path or a section: what is said must be of the one that the user wrote."""
    said = refusal(written(tmp_path, **changes))
    assert re.match(rf"{re.escape(field)}: ", said), said


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"config__parameters": {"k": 0}}, "config"),
        ({"config__parameters": {"k": -1}}, "config"),
        ({"config__parameters": {"k": 2.5}}, "config"),
        ({"config__parameters": {"k": float("nan")}}, "config"),
        ({"config": {"policy": "top_p", "parameters": {"p": float("nan"), "k_max": 2}}}, "config"),
        ({"config__capacity": {"factor": float("inf")}}, "config.capacity"),
        ({"seed": -1}, "seed"),
    ],
    ids=["k 0", "k -1", "k 2.5", "k nan", "p nan", "factor inf", "seed -1"],
)
def test_a_number_that_no_run_can_use_is_refused(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    """k = -1 would take all but the last candidate, k = 2.5 and an infinite factor end in a traceback."""
    assert refusal(written(tmp_path, **changes)).startswith(field)


@pytest.mark.parametrize(
    "space",
    [
        {"ranges": {"top_k.k": [0, 4]}},
        {"ranges": {"top_k.k": [-2, 4]}},
        {"ranges": {"top_k.k": [1.5, 4]}},
        {"ranges": {"top_p.p": [0.5, 1.5]}},
        {"ranges": {"top_p.p": [float("nan"), 0.5]}},
        {"ranges": {"capacity.drop": []}},
        {"ranges": {"top_k.k": {"values": []}}},
        {"ranges": {"top_k.k": {"values": [1, 0]}}},
        {"ranges": {"top_k.k": {"value": 1}}},
        {"redundant_slots": [-1]},
        {"policies": []},
        {"adjustments": []},
        {"capacities": []},
        {"scopes": []},
        {"replica_choices": [], "redundant_slots": [4]},
    ],
    ids=str,
)
def test_a_space_of_configs_that_cannot_run_is_refused_before_the_study(tmp_path: Path, space: dict[str, Any]) -> None:
    """Else the study ends in a traceback, some trials later."""
    assert refusal(written(tmp_path, study={"space": space})).startswith("study.space")


def test_a_missing_file_says_where_there_are_some(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.yaml") == "no such scenario; examples/ has some to start from"


@pytest.mark.parametrize("content", [b"a: [1", b"a: b: c", b"\x00", b"\xff\xfe\xfa", b"\t- 1", b"a: *nothing"])
def test_what_is_not_yaml_is_said_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_bytes(content)
    assert refusal(path).startswith("not YAML: ")


@pytest.mark.parametrize(("content", "kind"), [("", "NoneType"), ("- 1", "list"), ("name", "str"), ("3", "int")])
def test_another_document_is_no_scenario(tmp_path: Path, content: str, kind: str) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text(content)
    assert refusal(path) == f"expected a mapping with version, name, trace, …; found {kind}"


def prepared(folder: Path, **changes: Any) -> Replays:
    scenario = read_scenario(written(folder, **changes))
    assert isinstance(scenario, Scenario)
    return Replays.of(scenario)


REQUESTS = {"model": "mixtral-8x7b", "tokens": 4096, "zipf": 0.5}  # 16 requests of 256 tokens


def test_a_scenario_that_fits_together_runs(tmp_path: Path) -> None:
    replays = prepared(tmp_path, trace=REQUESTS)
    report, timelines, works = replays.run(replays.scenario.config)
    assert report.steps == len(timelines) == len(works) == 1
    assert report.fidelity == "event"
    assert replays.planned_loads_LE.sum() == 4 * 256 * 32 * 2  # 2/8 of 16 requests, 32 layers, 2 experts a token
    both = [replays.run(replays.scenario.config, window=window)[0].step_s for window in ("tune", "validate")]
    assert both[0] != both[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Mixtral has 8 experts and its synthetic trace as many candidates as its top_k, 2.
        ({"config__parameters": {"k": 9}}, "9 experts a token, but the model has 8"),
        ({"config__parameters": {"k": 3}}, "needs 3 candidates per token; the trace recorded 2"),
        ({"cluster__ranks": 16, "batch__tokens_per_rank": 1}, "16 ranks but only 8 expert slots; use at most 8 ranks"),
        ({"cluster__ranks": 3}, "8 expert slots do not divide over 3 ranks; add 1 redundant slots"),
        (
            {"config__capacity": {"factor": 1.0, "reroute": "any"}},
            "config: policy capacity needs more candidates than the 2 that a token uses; the trace recorded 2 of 8",
        ),
        (
            {"config": {"policy": "expert_choice", "parameters": {"factor": 2, "k_max": 2}}},
            "the trace recorded 2 of 8 candidates a token: record more, or complete the trace with candidates: 8",
        ),
        ({"candidates": 9}, "candidates: trace synthetic"),
        ({"trace__model": "mixtral"}, "unknown model 'mixtral'; known are gpt-oss-20b"),
        ({"trace__candidates": 1}, "1 candidates a token; use 2 (top_k) to 8 (experts)"),
        ({"trace__tokens": 300}, "leave a part empty; use more even shares, fewer parts, or a trace of more requests"),
        ({"batch__tokens_per_rank": 4096}, "use fewer ranks, fewer tokens a rank, or a longer trace"),
        ({"cluster__device": "cpu"}, "4 x cpu has no datasheet; calibrate it and name the profile"),
        ({"trace": "none.parquet"}, "none.parquet: no such file; give the path of a recorded trace"),
        ({"costs": "none.json"}, "none.json: no such profile; make one with moeroute calibrate"),
    ],
    ids=[
        "k above E",
        "k above C",
        "ranks above slots",
        "slots do not divide",
        "nowhere to reroute",
        "too few for full scores",
        "too many to complete",
        "unknown model",
        "few candidates",
        "one request",
        "steps too large",
        "no datasheet",
        "no trace",
        "no profile",
    ],
)
def test_what_does_not_fit_together_is_said_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        prepared(tmp_path, **{"trace": dict(REQUESTS), **changes})
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_redundant_slots_of_the_config_are_enough_where_no_space_is_given(tmp_path: Path) -> None:
    """8 experts and 1 redundant slot divide over 3 ranks; the default space, without any, has no say in it."""
    replays = prepared(
        tmp_path, trace=REQUESTS, cluster__ranks=3, config__placement={"algorithm": "lpt", "redundant_slots": 1}
    )
    assert replays.run(replays.scenario.config)[0].steps == 1


@pytest.mark.parametrize(("device", "profiled"), [("h100_sxm", "cpu"), ("cpu", "cuda")])
def test_a_profile_of_another_kind_of_device_does_not_price_this_one(
    tmp_path: Path, device: str, profiled: str
) -> None:
    """Else a CPU's times stand beside an H100's memory in one report, as if they belonged together."""
    Profile(
        device=profiled,
        device_name="elsewhere",
        ranks=4,
        linear={},
        curves={},
        errors={},
        probe_s=(1, 1),
        load_average=0,
    ).write(tmp_path / "profile.json")
    with pytest.raises(InputError, match=f"{profiled}"):
        prepared(tmp_path, trace=REQUESTS, cluster__device=device, costs="profile.json", execution={"extent": "moe"})


def test_a_calibration_of_this_machine_prices_no_whole_step(tmp_path: Path) -> None:
    Profile(
        device="cpu", device_name="here", ranks=4, linear={}, curves={}, errors={}, probe_s=(1, 1), load_average=0
    ).write(tmp_path / "profile.json")
    with pytest.raises(InputError) as refused:
        prepared(tmp_path, trace=REQUESTS, cluster__device="cpu", costs="profile.json")
    assert str(refused.value) == (
        f"{tmp_path / 'profile.json'}: a calibration of this machine prices the MoE layers alone; "
        "set execution.extent: moe"
    )


def test_a_cluster_is_a_device_a_preset_or_a_file(tmp_path: Path) -> None:
    plain = read_scenario(written(tmp_path))
    assert make_cluster(plain).name == "4 x h100_sxm"
    preset = read_scenario(written(tmp_path, cluster={"preset": "h800_prefill"}))
    assert (make_cluster(preset).ranks, make_cluster(preset).nodes) == (32, 4)
    (tmp_path / "deep").mkdir()
    (tmp_path / "mine.yaml").write_text("{device: h100_sxm, ranks: 4, ranks_per_node: 2, name: mine}")
    path = written(tmp_path / "deep", cluster={"file": "../mine.yaml", "degrade": ["gpu1=0.5"]})
    scenario = read_scenario(path)
    assert scenario.cluster.file == tmp_path / "deep" / ".." / "mine.yaml"  # beside the scenario, not the caller
    mine = make_cluster(scenario)
    assert (mine.name, mine.node_of_G.tolist()) == ("mine with gpu1=0.5", [0, 0, 1, 1])
    assert mine.speed_G.tolist() == [1, 0.5, 1, 1]


def test_a_fabric_goes_with_a_device(tmp_path: Path) -> None:
    choice = {"device": "h100_sxm", "ranks": 64, "fabric": "fat_tree", "oversubscription": 4}
    assert make_cluster(read_scenario(written(tmp_path, cluster=choice))).name == "64 x h100_sxm, fat tree 4:1"


def test_what_was_written_reaches_the_simulator(tmp_path: Path) -> None:
    replays = prepared(
        tmp_path,
        trace=REQUESTS,
        layout={"attention_tensor": 2, "expert_tensor": 2},
        execution={"extent": "whole", "graph_buckets": [4, 8], "host_gap_s": 0.001, "comm_sms": 10, "kv_dtype": "fp8"},
        disturbance={"jitter": 0.05, "faults": ["gpu3=0.5@0.001"], "detect_s": 0.5},
        sampled_layers=4,
        protocol="per_node",
        seed=3,
    )
    replay = replays.windows["tune"]
    assert (replay.shared.attention_tensor, replay.shared.expert_tensor, replay.shared.expert_groups) == (2, 2, 2)
    assert replays.placement(replays.scenario.config).ranks == 2  # groups of ranks that share their experts' widths
    assert replay.execution == Execution(
        graph_buckets=(4, 8), host_gap_s=0.001, comm_sms=10, kv_dtype="fp8", extent="whole"
    )
    assert replay.disturbance == Disturbance(
        jitter=0.05, seed=3, faults=(Fault(change="gpu3=0.5", at_s=0.001),), detect_s=0.5
    )
    assert (replay.sampled_layers, replay.protocol) == (4, "per_node")
    report, _, _ = replays.run(replays.scenario.config)
    assert report.stage_s["attention sum"] > 0
    assert report.stage_s["host gap"] == pytest.approx(0.001, rel=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster": {"device": "h100_sxm"}}, "cluster: ranks is missing; add it"),
        ({"cluster": {"ranks": 4}}, "cluster: device is missing; add it"),
        ({"cluster": {}}, "cluster: give device and ranks, or a preset, or a file"),
        ({"cluster__preset": "h100_node"}, "cluster: give device and ranks, or a preset, or a file"),
        ({"cluster": {"preset": "h9_node"}}, "cluster: unknown preset 'h9_node'; known are a100_node"),
        ({"cluster__fabric": "ring"}, "cluster.fabric: input should be 'rail', 'fat_tree' or 'flat' (it is 'ring')"),
        (
            {"cluster__oversubscription": 0.5},
            "cluster.oversubscription: input should be greater than or equal to 1 (it is 0.5)",
        ),
        (
            {"layout": {"expert_tensor": 0}},
            "layout.expert_tensor: input should be greater than or equal to 1 (it is 0)",
        ),
        ({"layout": {"tensor": 2}}, "layout.tensor: unknown key; remove it or correct its name"),
        ({"execution": {"extent": "half"}}, "execution.extent: input should be 'moe' or 'whole' (it is 'half')"),
        ({"execution": {"overlap": "some"}}, "execution.overlap: input should be 'none', "),
        (
            {"execution": {"graph_buckets": [8, 0]}},
            "execution.graph_buckets.1: input should be greater than or equal to 1 (it is 0)",
        ),
        ({"execution": {"launch_s": -1}}, "execution.launch_s: input should be greater than or equal to 0 (it is -1)"),
        ({"execution": {"overlap_pace": 0}}, "execution.overlap_pace: input should be greater than 0 (it is 0)"),
        ({"execution": {"kv_dtype": "int3"}}, "execution.kv_dtype: input should be 'bfloat16' or 'fp8' (it is 'int3')"),
        (
            {"disturbance": {"jitter": -0.1}},
            "disturbance.jitter: input should be greater than or equal to 0 (it is -0.1)",
        ),
        (
            {"disturbance": {"faults": ["rank7"]}},
            "disturbance: fault 'rank7': not of the form change@seconds, as rank7=lost@0.012",
        ),
        ({"sampled_layers": 0}, "sampled_layers: input should be greater than or equal to 1 (it is 0)"),
        (
            {"protocol": "per_rack"},
            "protocol: input should be 'per_expert', 'per_rank' or 'per_node' (it is 'per_rack",
        ),
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(value))[:40] if isinstance(value, dict) else "",
)
def test_a_mistake_in_cluster_layout_or_execution_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    said = refusal(written(tmp_path, **changes))
    assert said == message or said.startswith(message), said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster": {"file": "none.yaml"}}, "none.yaml: no such cluster file; presets are a100_node"),
        ({"cluster__degrade": ["gpu9=0.5"]}, "degrade 'gpu9=0.5': there is no gpu9; the ranks are gpu0 to gpu3"),
        ({"cluster__degrade": ["gpu1"]}, "degrade 'gpu1': not of the form what=how"),
        ({"layout": {"expert_tensor": 3}}, "expert_tensor is 3, which does not divide 4 ranks; use a divisor of them"),
        ({"sampled_layers": 33}, "sampled_layers is 33; use 1 to 32, the model's MoE layers"),
        (
            {"execution": {"overlap": "two_batch"}, "batch__tokens_per_rank": 1},
            "two-batch overlap halves each rank's tokens, and some rank has fewer than 2; use more",
        ),
        ({"disturbance": {"faults": ["rank9=lost@0.1"]}}, "there is no rank9; the ranks are gpu0 to gpu3"),
        (
            {"cluster": {"preset": "h100_node", "oversubscription": 2.0}},
            "oversubscription goes with a GPU's name and ranks, not with a preset; remove it",
        ),
        ({"cluster": {"device": "cpu", "ranks": 2, "fabric": "fat_tree"}}, "fabric goes with a GPU's name and ranks"),
    ],
    ids=["no file", "no such rank", "no change", "tensor", "layers", "halves", "fault", "preset", "cpu"],
)
def test_a_cluster_or_layout_that_cannot_be_is_said_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        prepared(tmp_path, **{"trace": dict(REQUESTS), **changes})
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Its latent attention has widths that nobody measured.
        ({"trace__model": "deepseek-v2", "config__parameters": {"k": 6}}, "the attention of deepseek-v2 is not known"),
        ({"execution": {"comm_sms": 132}}, "comm_sms is 132, but a h100_sxm has 132 multiprocessors; leave it some"),
    ],
    ids=["attention", "multiprocessors"],
)
def test_what_a_run_cannot_do_is_one_line_too(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    replays = prepared(tmp_path, **{"trace": dict(REQUESTS), **changes})
    with pytest.raises(InputError) as refused:
        replays.run(replays.scenario.config)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_another_cluster_file_is_another_study(tmp_path: Path) -> None:
    cluster = tmp_path / "mine.yaml"
    identities = []
    for ranks_per_node in (4, 2, 4):
        cluster.write_text(f"{{device: h100_sxm, ranks: 4, ranks_per_node: {ranks_per_node}}}")
        identities.append(study_identity(prepared(tmp_path, trace=REQUESTS, cluster={"file": "mine.yaml"})))
    assert identities[0] == identities[2] != identities[1]


def run_or_refused(folder: Path, space: dict[str, Any]) -> list[Config]:
    """The configs that a study of 40 trials evaluates; none if it is refused."""
    evaluated = []

    def evaluate(config: Config) -> Report:
        evaluated.append(config)
        return replays.run(config, fidelity="analytic")[0]

    study = {"trials": 40, "space": {"placements": ["contiguous"], **space}}
    try:
        replays = prepared(folder, trace=REQUESTS, study=study)
        tune(replays.scenario, evaluate, journal=folder / "journal", identity="same")
    except InputError as refused:
        said = str(refused)
    else:
        return evaluated
    assert "\n" not in said
    assert evaluated == [], f"refused only after {len(evaluated)} trials: {said}"
    return []


def test_a_space_that_the_trace_cannot_serve_does_not_end_a_study_half_way(tmp_path: Path) -> None:
    """The default k goes to 8; a trace of 2 candidates a token has nothing to offer from 3 on."""
    for config in run_or_refused(tmp_path, {"k": [1, 8]}):
        assert config.routing_policy().width <= 2


def test_redundant_slots_that_do_not_divide_do_not_end_a_study_half_way(tmp_path: Path) -> None:
    """8 experts and 1 redundant slot do not divide over 4 ranks."""
    for config in run_or_refused(tmp_path, {"k": [1, 2], "redundant_slots": [0, 1]}):
        assert config.placement.redundant_slots == 0


def test_weights_are_a_policys_own() -> None:
    document = {"policy": "top_k", "parameters": {"k": 1}, "weights": "trained"}
    config = parse_scenario(scenario_document(config=document), source="a test").config
    assert config.routing_policy().weights == "trained"
    assert config.describe() == "top_k(k=1) weights trained contiguous"
    with pytest.raises(
        InputError, match=r"config.weights: input should be 'renormalised' or 'trained' \(it is 'own'\)"
    ):
        parse_scenario(scenario_document(config={**document, "weights": "own"}), source="a test")


def test_measured_output_errors_come_from_a_file(tmp_path: Path) -> None:
    errors = tmp_path / "output_errors.json"
    trace = {"model": "mixtral-8x7b", "tokens": 4096, "zipf": 0.5}
    document = scenario_document(output_errors=str(errors), trace=trace)
    scenario = parse_scenario(document, source="a test")
    with pytest.raises(InputError, match="no such file; measure errors with moeroute model errors"):
        Replays.of(scenario)
    errors.write_text(json.dumps({"output_error_LK": [[0.5, 0.0]] * 32}))
    history = Replays.of(scenario).windows["tune"].history
    assert history is not None
    assert history.measured
    assert history.output_error_LK.tolist() == [[0.5, 0.0]] * 32
    errors.write_text(json.dumps({"output_error_LK": [[0.5, 0.0]]}))
    with pytest.raises(InputError, match=r"output errors of shape \(1, 2\); the history's layers and k are \(32, 2\)"):
        Replays.of(scenario)


def test_a_config_says_what_share_of_the_experts_stays_in_memory(tmp_path: Path) -> None:
    replays = prepared(tmp_path, trace=REQUESTS, config__placement={"resident_share": 0.5})
    config = replays.scenario.config
    assert config.describe() == "top_k(k=2) contiguous resident 50%"
    assert config.key() != Config(policy="top_k", parameters={"k": 2}).key()
    # 8 experts on 4 ranks: of each rank's two that with more planned load stays.
    resident_LS = replays.placement(config).resident_LS
    assert resident_LS is not None
    loads_LGS = replays.planned_loads_LE.reshape(32, 4, 2)
    assert (resident_LS.reshape(32, 4, 2)[:, :, 0] == (loads_LGS[:, :, 0] >= loads_LGS[:, :, 1])).all()
    half = replays.run(config)[0]
    whole = replays.run(Config(policy="top_k", parameters={"k": 2}))[0]
    assert half.name == config.describe()
    assert half.stage_s["load experts"] > 0
    assert "load experts" not in whole.stage_s
    assert half.step_s > whole.step_s


@pytest.mark.parametrize("share", [0, 1.01, float("nan")])
def test_a_share_of_experts_that_no_memory_holds_is_refused(tmp_path: Path, share: float) -> None:
    said = refusal(written(tmp_path, config__placement={"resident_share": share}))
    assert said.startswith("config.placement.resident_share: input should be ")


def test_no_adjustment_can_be_named() -> None:
    config = parse_scenario(
        scenario_document(
            config={"policy": "top_k", "parameters": {"k": 1}, "adjustment": "none", "capacity": "none"},
        ),
        source="a test",
    ).config
    assert config.adjustment is None
    assert config.capacity is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"adjustment": "opportunistic"}, r"write it as \{name: opportunistic, k0: 2\}, or none"),
        ({"capacity": 1.25}, r"write it as \{factor: 1.25\}, or none"),
        ({"parameters": [1]}, r"parameters are \[1\]; write them by name, as \{k: 4\}"),
        ({"policy": "hardware_aware"}, r"hardware_aware is no policy; write adjustment: \{name: hardware_aware"),
        ({"adjustment": {"name": "top_p"}}, r"top_p is no adjustment; write policy: top_p"),
        ({"capacity": {"factor": 0}}, r"factor is 0, which leaves no expert a place"),
    ],
)
def test_a_part_that_is_written_wrong_is_shown_right(config: dict[str, Any], message: str) -> None:
    document = {"policy": "top_k", "parameters": {"k": 1}, **config}
    with pytest.raises(InputError, match=message):
        parse_scenario(scenario_document(config=document), source="a test")


def test_a_study_keeps_what_the_baseline_says_of_memory_and_weights() -> None:
    placement = {"algorithm": "contiguous", "resident_share": 0.5}
    config = {"policy": "top_k", "parameters": {"k": 1}, "weights": "trained", "placement": placement}
    trace = {"model": "mixtral-8x7b", "tokens": 4096, "zipf": 0.5}
    scenario = parse_scenario(scenario_document(config=config, trace=trace), source="a test")
    space = Replays.of(scenario).scenario.study.space
    drawn = suggest_config(RandomSuggestions(0), space)
    assert (drawn.placement.resident_share, drawn.weights) == (0.5, "trained")

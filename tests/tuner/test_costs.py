"""The costs of a scenario: datasheet, calibration or measured kernels, and what of them does not go together."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cost_models.kernel_profile import shipped_profile
from cost_models.profile import Profile
from traces.errors import InputError
from tuner.clusters import make_cluster
from tuner.costs import calibration, make_costs, profile_paths
from tuner.identity import study_identity
from tuner.replays import Replays
from tuner.scenario import Scenario, read_scenario
from tuner.whatif import what_if

DOCUMENT = {
    "version": 1,
    "name": "test",
    "trace": {"model": "qwen3-30b-a3b", "tokens": 1024, "zipf": 0.5},
    "cluster": {"device": "h100_sxm", "ranks": 8},
    "batch": {"phase": "decode", "tokens_per_rank": 16, "steps": 1},
    "config": {"policy": "top_k", "parameters": {"k": 8}},
    "fidelity": "analytic",
}


def scenario(folder: Path, **changes: Any) -> Scenario:
    path = folder / "scenario.yaml"
    path.write_text(yaml.safe_dump({**DOCUMENT, **changes}))
    return read_scenario(path)


def refusal(folder: Path, **changes: Any) -> str:
    with pytest.raises(InputError) as refused:
        Replays.of(scenario(folder, **changes))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def this_machine(folder: Path) -> Path:
    path = folder / "profile.json"
    Profile(
        device="cpu",
        device_name="box",
        ranks=8,
        linear={},
        curves={},
        errors={},
        probe_s=(1, 1),
        load_average=0,
    ).write(path)
    return path


@pytest.mark.parametrize("costs", ["trtllm", ["trtllm"]], ids=["one word", "a list"])
def test_kernels_by_their_framework(tmp_path: Path, costs: Any) -> None:
    found = scenario(tmp_path, costs=costs)
    assert profile_paths(found) == [shipped_profile("h100_sxm", "trtllm")]
    assert make_costs(found, make_cluster(found)).name == "h100_sxm kernels of trtllm"


def test_profiles_of_ones_own_lie_beside_the_scenario(tmp_path: Path) -> None:
    shutil.copy(shipped_profile("h100_sxm", "nccl"), tmp_path / "mine.json")
    found = scenario(tmp_path, costs=["trtllm", "mine.json"])
    assert profile_paths(found)[1] == tmp_path / "mine.json"
    assert make_costs(found, make_cluster(found)).name == "h100_sxm kernels of trtllm, then nccl"
    alone = scenario(tmp_path, costs="mine.json")
    assert make_costs(alone, make_cluster(alone)).name == "h100_sxm kernels of nccl"


def test_a_step_on_kernels_has_an_interval_and_says_what_is_extrapolated(tmp_path: Path) -> None:
    moe = {"execution": {"extent": "moe"}}
    replays = Replays.of(scenario(tmp_path, costs=["trtllm", "nccl"], **moe))
    report, _, _ = replays.run(replays.scenario.config, intervals=True)
    assert report.interval_s is not None
    assert report.interval_s[0] < report.step_s < report.interval_s[1]
    assert report.extrapolated["gate"] == 1  # 128 experts: no table has so narrow a product
    assert set(report.stage_s) == {"gate", "dispatch", "experts", "return"}  # the rest happens inside these
    assert 0 < report.extrapolated_share < 1
    again, _, _ = replays.run(replays.scenario.config)
    assert again.interval_s is None
    assert again.step_s == report.step_s
    bound, _, _ = Replays.of(scenario(tmp_path, **moe)).run(replays.scenario.config, intervals=True)
    assert bound.step_s < report.step_s
    assert bound.interval_s == (bound.step_s, bound.step_s)


def test_a_whole_step_on_kernels(tmp_path: Path) -> None:
    """Attention, norms, head and sampling come on top; what the MoE kernels do inside is still no stage."""
    replays = Replays.of(scenario(tmp_path, costs=["trtllm", "nccl"]))
    report, _, _ = replays.run(replays.scenario.config, intervals=True)
    assert set(report.stage_s) == {
        *("embed", "norm", "attention", "head", "sample"),
        *("gate", "dispatch", "experts", "return"),
    }
    moe, _, _ = Replays.of(scenario(tmp_path, costs=["trtllm", "nccl"], execution={"extent": "moe"})).run(
        replays.scenario.config
    )
    assert report.stage_s["experts"] == pytest.approx(moe.stage_s["experts"])
    assert report.step_s > moe.step_s
    assert report.interval_s is not None
    assert report.interval_s[0] < report.step_s < report.interval_s[1]


def test_weights_in_another_format_are_other_experts(tmp_path: Path) -> None:
    in_bf16, in_fp8 = (
        Replays.of(scenario(tmp_path, costs=["trtllm", "nccl"], weights=weights)) for weights in (None, "fp8")
    )
    reports = [replays.run(replays.scenario.config)[0] for replays in (in_bf16, in_fp8)]
    assert reports[0].memory.expert_bytes == 2 * reports[1].memory.expert_bytes
    assert reports[0].stage_s["experts"] > reports[1].stage_s["experts"]


def test_tokens_dispatched_in_fewer_bytes_travel_faster(tmp_path: Path) -> None:
    plain, packed = (
        Replays.of(scenario(tmp_path, dispatch_dtype=dtype)).run(scenario(tmp_path).config)[0]
        for dtype in (None, "fp8")
    )
    assert packed.stage_s["dispatch"] / plain.stage_s["dispatch"] == pytest.approx((1 + 4 / 128) / 2)
    assert packed.stage_s["return"] == plain.stage_s["return"]


def test_one_question_on_several_costs(tmp_path: Path) -> None:
    points = what_if(scenario(tmp_path), {"costs": ["datasheet", "trtllm", "sglang"], "dispatch_dtype": ["bfloat16"]})
    assert [point.problem is None for point in points] == [True, True, False]
    assert "have no Gemm like this one" in str(points[2].problem)


def test_any_field_of_a_scenario_can_be_varied(tmp_path: Path) -> None:
    """Fields of the layout, the execution and the network, each point a scenario of its own."""
    asked = scenario(tmp_path, cluster={"device": "h100_sxm", "ranks": 16}, sampled_layers=2)
    points = what_if(
        asked,
        {
            "protocol": ["per_rank", "per_node"],
            "execution.overlap": ["none", "two_batch"],
            "layout.expert_tensor": [1, 2, 3],
            "cluster.oversubscription": [1, 4],
        },
    )
    assert len(points) == 2 * 2 * 3 * 2
    for point in points:
        if point.values["layout.expert_tensor"] == 3:
            assert "expert_tensor is 3, which does not divide 16 ranks" in str(point.problem)
        else:
            assert point.problem is None
    out = {point.values["protocol"]: point.report.bytes_by_tier["scale_out"] for point in points if point.report}
    assert out["per_node"] <= out["per_rank"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"costs": ["trtllm", "magic"]}, "costs: 'magic' is neither a .json profile nor a framework"),
        ({"costs": "trtllm", "cluster": {"device": "l40s", "ranks": 8}}, "no measured kernels of 'l40s'"),
        ({"costs": ["vllm"], "cluster": {"device": "a100_sxm", "ranks": 8}}, "no vllm kernels of a100_sxm come with"),
        ({"costs": ["nowhere.json"]}, "no such profile"),
        ({"weights": "int3"}, "weights: unknown dtype 'int3'; known are float32, bfloat16"),
        ({"dispatch_dtype": "int3"}, "dispatch_dtype"),
    ],
)
def test_bad_costs_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert message in refusal(tmp_path, **changes)


def test_kernels_of_another_gpu_are_refused(tmp_path: Path) -> None:
    shutil.copy(shipped_profile("b200_sxm", "nccl"), tmp_path / "b200.json")
    assert "kernels of b200_sxm, the cluster's device is h100_sxm" in refusal(tmp_path, costs=["b200.json"])


def test_a_calibration_and_kernels_do_not_mix(tmp_path: Path) -> None:
    path = this_machine(tmp_path)
    found = scenario(tmp_path, costs="profile.json", cluster={"device": "cpu", "ranks": 8})
    assert calibration(found) == Profile.read(path)
    assert calibration(scenario(tmp_path, costs="trtllm")) is None
    assert calibration(scenario(tmp_path)) is None
    assert "give a calibration of this machine alone" in refusal(tmp_path, costs=["trtllm", "profile.json"])


def test_another_profile_is_another_study(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    document = json.loads(shipped_profile("h100_sxm", "trtllm").read_text())
    path.write_text(json.dumps(document))
    before = study_identity(Replays.of(scenario(tmp_path, costs=["mine.json", "nccl"])))
    assert before == study_identity(Replays.of(scenario(tmp_path, costs=["mine.json", "nccl"])))
    document["kernels"][0]["rows"] += 1
    path.write_text(json.dumps(document))
    assert before != study_identity(Replays.of(scenario(tmp_path, costs=["mine.json", "nccl"])))

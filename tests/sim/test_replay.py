"""Replays of synthetic and recorded traces on simulated H100s."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cost_models.cluster import gpu_cluster
from cost_models.devices import DEVICES
from cost_models.roofline import Roofline
from router.capacity import Capacity
from router.placement import place
from router.policies import RoutingPolicy
from router.policies.top_k import TopK
from router.policies.top_p import TopP
from sim.replay import Replay
from sim.report import Report
from sim.timeline import write_chrome_trace
from traces.batching import make_steps, split_requests
from traces.errors import InputError
from traces.formats.npz import import_npz
from traces.presets import preset
from traces.synthetic import synthetic_trace
from traces.trace import RoutingTrace

H100 = DEVICES["h100_sxm"]
RANKS = 8


def replay_of(trace: RoutingTrace, tokens_per_rank: int, **options: Any) -> Replay:
    cluster = gpu_cluster(H100, RANKS)
    steps = make_steps(
        trace, phase="decode", tokens_per_rank=tokens_per_rank, ranks=RANKS, limit=options.pop("limit", None)
    )
    return Replay(trace=trace, steps=steps, cluster=cluster, costs=Roofline(cluster), **options)


@pytest.fixture(scope="module")
def qwen() -> RoutingTrace:
    return synthetic_trace(preset("qwen3-30b-a3b"), tokens=1024, zipf=0.8, seed=3, candidates=10, phase="decode")


def test_a_decode_step_on_h100s_takes_what_reading_the_experts_takes(qwen: RoutingTrace) -> None:
    """128 experts on 8 ranks, 16 each; 48 layers; an expert is 3 * 2048 * 768 * 2 = 9.4 MB.

    64 tokens a rank choose 8 of 128: 4096 pairs a layer leave almost no expert idle. So a step reads
    48 * 16 * 9.4 MB = 7.25 GB a rank at 3.35 TB/s: 2.16 ms, and what else it does is small beside it.
    """
    replay = replay_of(qwen, 64, limit=2)
    placement = place("lpt", qwen.loads_LE(), ranks=RANKS, slots=128)
    report, timelines, works = replay.run(RoutingPolicy(selection=TopK(k=8)), placement)
    weights_s = 48 * 16 * 3 * 2048 * 768 * 2 / 3.35e12
    assert 0.9 * weights_s < report.stage_s["experts"] < 1.05 * weights_s
    assert report.stage_s["experts"] < report.step_s < 1.5 * weights_s
    assert report.steps == len(timelines) == len(works) == 2
    assert report.tokens_per_s == pytest.approx(64 * RANKS / report.step_s)
    assert report.waiting_s > 0
    assert report.memory.fits
    assert report.memory.capacity_bytes == H100.memory_bytes
    assert 1 < report.token_imbalance < 2


def test_fewer_experts_a_token_cost_less_time_and_gate_mass(qwen: RoutingTrace) -> None:
    replay = replay_of(qwen, 4, limit=4)
    placement = place("contiguous", qwen.loads_LE(), ranks=RANKS, slots=128)
    eight, four, two = (replay.run(RoutingPolicy(selection=TopK(k=k)), placement)[0] for k in (8, 4, 2))
    assert eight.step_s > four.step_s > two.step_s
    assert 1 == eight.gate_mass > four.gate_mass > two.gate_mass > 0
    # More than the model's own k costs, and is counted as no gain.
    ten = replay.run(RoutingPolicy(selection=TopK(k=10)), placement)[0]
    assert ten.step_s > eight.step_s
    assert ten.gate_mass == pytest.approx(1)
    with pytest.raises(InputError, match="policy top_k needs 12 candidates per token; the trace recorded 10"):
        replay.run(RoutingPolicy(selection=TopK(k=12)), placement)


def test_a_busier_rank_makes_a_longer_step(qwen: RoutingTrace) -> None:
    """The same rows in fewer ranks' slots: contiguous order by load puts the hot experts side by side."""
    loads_LE = qwen.loads_LE()
    replay = replay_of(qwen, 64, limit=2)
    balanced = replay.run(RoutingPolicy(selection=TopK(k=8)), place("lpt", loads_LE, ranks=RANKS, slots=128))[0]
    contiguous = replay.run(RoutingPolicy(selection=TopK(k=8)), place("contiguous", loads_LE, ranks=RANKS, slots=128))[
        0
    ]
    assert balanced.token_imbalance < contiguous.token_imbalance
    assert balanced.stage_s["dispatch"] < contiguous.stage_s["dispatch"]


@pytest.mark.parametrize("fidelity", ["analytic", "event"])
def test_the_same_replay_gives_the_same_report_byte_for_byte(qwen: RoutingTrace, fidelity: Any, tmp_path: Path) -> None:
    policy = RoutingPolicy(selection=TopP(p=0.2, k_max=8), capacity=Capacity(factor=1.25))

    def run(name: str) -> tuple[Report, bytes]:
        trace = synthetic_trace(preset("qwen3-30b-a3b"), tokens=256, zipf=0.8, seed=3, phase="decode")
        placement = place("random", trace.loads_LE(), ranks=RANKS, slots=136, seed=5)
        report, timelines, _ = replay_of(trace, 4, limit=2).run(policy, placement, fidelity=fidelity)
        write_chrome_trace(tmp_path / name, {"step": timelines[0]})
        return report, (tmp_path / name).read_bytes()

    (first, first_timeline), (second, second_timeline) = run("first.json"), run("second.json")
    assert json.dumps(first.to_json()) == json.dumps(second.to_json())
    assert first_timeline == second_timeline


def test_both_fidelities_report_the_same_since_nothing_contends(qwen: RoutingTrace) -> None:
    replay = replay_of(qwen, 8, limit=2)
    placement = place("lpt", qwen.loads_LE(), ranks=RANKS, slots=136)
    analytic, event = (
        replay.run(RoutingPolicy(selection=TopK(k=8)), placement, fidelity=fidelity)[0].to_json()
        for fidelity in ("analytic", "event")
    )
    assert analytic.pop("fidelity") != event.pop("fidelity")
    assert analytic == event


def test_routing_remembers_nothing_between_runs(qwen: RoutingTrace) -> None:
    replay = replay_of(qwen, 4, limit=3)
    placement = place("contiguous", qwen.loads_LE(), ranks=RANKS, slots=128)
    before = replay.run(RoutingPolicy(selection=TopP(p=0.2, k_max=8)), placement)[0]
    replay.run(RoutingPolicy(selection=TopK(k=1), capacity=Capacity(factor=0.25)), placement)
    assert replay.run(RoutingPolicy(selection=TopP(p=0.2, k_max=8)), placement)[0] == before


@pytest.mark.parametrize("name", ["deepseek-v3", "flame-moe-290m"])
def test_no_rank_waits_a_negative_time(name: str) -> None:
    """Models with shared experts, at sizes where those hide under the dispatch."""
    model = replace(preset(name), layers=4)
    trace = synthetic_trace(model, tokens=RANKS * 512, zipf=0.0, seed=0, tokens_per_request=512)
    steps = make_steps(trace, phase="prefill", tokens_per_rank=512, ranks=RANKS, limit=1)
    cluster = gpu_cluster(H100, RANKS)
    replay = Replay(trace=trace, steps=steps, cluster=cluster, costs=Roofline(cluster))
    placement = place("lpt", trace.loads_LE(), ranks=RANKS, slots=trace.model.experts)
    report = replay.run(RoutingPolicy(selection=TopK(k=trace.model.top_k)), placement)[0]
    assert report.waiting_s >= 0


@pytest.fixture(scope="module")
def gpt_oss(shared_data: Path) -> RoutingTrace:
    path = shared_data / "traces" / "gptoss20b" / "gptoss20b_ship.npz"
    return import_npz(path, model=preset("gpt-oss-20b")).trace


def test_recorded_gpt_oss_on_eight_h100s(gpt_oss: RoutingTrace) -> None:
    """Planned on the first two thirds of the requests, replayed on the last, LPT beats both honest baselines.

    24 layers of 32 experts, 4 a rank, of 3 * 2880 * 2880 * 4.25 / 8 = 13.2 MB: reading them all takes 379 us a step,
    and 8 tokens a rank times 4 experts (256 pairs a layer) do not quite use them all.
    """
    earlier, later = split_requests(gpt_oss, (2, 1))
    assert set(np.unique(earlier.request_T)).isdisjoint(np.unique(later.request_T))
    replay = replay_of(later, 8)
    assert len(replay.steps) == later.tokens // 64 == 26
    reports = {
        algorithm: replay.run(
            RoutingPolicy(selection=TopK(k=4)),
            place(algorithm, earlier.loads_LE(), ranks=RANKS, slots=32, seed=1),
        )[0]
        for algorithm in ("contiguous", "random", "lpt")
    }
    assert reports["lpt"].token_imbalance < reports["contiguous"].token_imbalance
    assert reports["lpt"].token_imbalance < reports["random"].token_imbalance
    weights_s = 24 * 4 * 3 * 2880 * 2880 * 4.25 / 8 / 3.35e12
    for report in reports.values():
        assert 0.7 * weights_s < report.step_s < 2 * weights_s
        assert all(0.7 * weights_s < step_s < 2 * weights_s for step_s in report.step_s_by_step)
        assert (report.gate_mass, report.dropped_share, report.experts_per_token) == (1, 0, 4)
        assert report.memory.fits
    # 12 GB of experts in all: 4 of 32 on each rank.
    assert reports["lpt"].memory.expert_bytes == pytest.approx(24 * 32 * 3 * 2880 * 2880 * 4.25 / 8 / RANKS)


def test_replicas_balance_recorded_gpt_oss_better_still(gpt_oss: RoutingTrace) -> None:
    earlier, later = split_requests(gpt_oss, (2, 1))
    replay = replay_of(later, 8)
    plain, with_replicas = (
        replay.run(RoutingPolicy(selection=TopK(k=4)), place("lpt", earlier.loads_LE(), ranks=RANKS, slots=slots))[0]
        for slots in (32, 40)
    )
    assert with_replicas.token_imbalance < plain.token_imbalance
    assert with_replicas.memory.expert_bytes == 40 / 32 * plain.memory.expert_bytes


def test_capacity_on_recorded_gpt_oss_trades_drops_for_balance(gpt_oss: RoutingTrace) -> None:
    replay = replay_of(gpt_oss, 16, limit=8)
    placement = place("contiguous", gpt_oss.loads_LE(), ranks=RANKS, slots=32)
    reports = [
        replay.run(RoutingPolicy(selection=TopK(k=4), capacity=Capacity(factor=factor)), placement)[0]
        for factor in (0.5, 1.0, 2.0, 8.0)
    ]
    dropped = [report.dropped_share for report in reports]
    assert dropped == sorted(dropped, reverse=True)
    assert dropped[0] > 0.2
    assert dropped[-1] == 0  # C = ceil(8 * 16 * 4 / 32) = 16: as many as a rank has tokens
    kept = [report.gate_mass for report in reports]
    assert kept == sorted(kept)
    assert kept[-1] == 1
    assert reports[0].token_imbalance < reports[-1].token_imbalance
    for report in reports:
        assert report.experts_per_token == pytest.approx(4 * (1 - report.dropped_share))

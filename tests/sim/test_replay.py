"""Replays of synthetic and recorded traces on simulated H100s."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from cost_models.cluster import gpu_cluster
from cost_models.degrade import degrade
from cost_models.devices import DEVICES
from cost_models.kernel_costs import KernelCosts
from cost_models.roofline import Roofline
from router.capacity import Capacity
from router.placement import place
from router.policies import RoutingPolicy
from router.policies.top_k import TopK
from router.policies.top_p import TopP
from sim.execution import Execution, Overlap
from sim.faults import Disturbance, Fault
from sim.layout import Layout
from sim.lower import PROTOCOLS, Protocol
from sim.replay import Fidelity, Replay
from sim.report import Report
from sim.timeline import write_chrome_trace
from traces.batching import Phase, make_steps, split_requests
from traces.errors import InputError
from traces.formats.npz import import_npz
from traces.presets import preset
from traces.synthetic import synthetic_trace
from traces.trace import RoutingTrace

H100 = DEVICES["h100_sxm"]
RANKS = 8
TOP_8 = RoutingPolicy(selection=TopK(k=8))
FIDELITIES: tuple[Fidelity, ...] = ("analytic", "event")


def replay_of(trace: RoutingTrace, tokens_per_rank: int, **options: Any) -> Replay:
    """Of the MoE layers of decode steps, if not told otherwise."""
    cluster = gpu_cluster(H100, RANKS)
    steps = make_steps(
        trace, phase="decode", tokens_per_rank=tokens_per_rank, ranks=RANKS, limit=options.pop("limit", None)
    )
    defaults = {"phase": "decode", "execution": Execution(extent="moe")}
    return Replay(trace=trace, steps=steps, cluster=cluster, costs=Roofline(cluster), **{**defaults, **options})


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
@pytest.mark.parametrize("execution", [Execution(extent="moe"), Execution()], ids=["moe", "whole"])
def test_no_rank_waits_a_negative_time(name: str, execution: Execution) -> None:
    """Models with shared experts, at sizes where those hide under the dispatch."""
    model = replace(preset(name), layers=4)
    trace = synthetic_trace(model, tokens=RANKS * 512, zipf=0.0, seed=0, tokens_per_request=512)
    steps = make_steps(trace, phase="prefill", tokens_per_rank=512, ranks=RANKS, limit=1)
    cluster = gpu_cluster(H100, RANKS)
    replay = Replay(trace=trace, steps=steps, cluster=cluster, costs=Roofline(cluster), execution=execution)
    placement = place("lpt", trace.loads_LE(), ranks=RANKS, slots=trace.model.experts)
    report = replay.run(RoutingPolicy(selection=TopK(k=trace.model.top_k)), placement)[0]
    assert report.waiting_s >= 0


EIGHT_LAYERS = replace(preset("qwen3-30b-a3b"), layers=8)


@pytest.fixture(scope="module")
def equal_layers() -> RoutingTrace:
    """Eight layers that route alike."""
    one = synthetic_trace(
        replace(EIGHT_LAYERS, layers=1), tokens=RANKS * 64, zipf=0.8, seed=1, phase="decode", tokens_per_request=64
    )
    assert one.gates_TLC is not None
    return replace(
        one,
        model=EIGHT_LAYERS,
        expert_ids_TLC=np.repeat(one.expert_ids_TLC, 8, axis=1),
        gates_TLC=np.repeat(one.gates_TLC, 8, axis=1),
    )


@pytest.mark.parametrize("fidelity", ["analytic", "event"])
@pytest.mark.parametrize("extent", ["moe", "whole"])
def test_four_of_eight_equal_layers_are_as_good_as_all(
    equal_layers: RoutingTrace, extent: Any, fidelity: Fidelity
) -> None:
    execution = Execution(extent=extent)
    placement = place("contiguous", equal_layers.loads_LE(), ranks=RANKS, slots=128)
    every, some = (
        replay_of(equal_layers, 16, limit=2, execution=execution, sampled_layers=sampled).run(
            TOP_8, placement, fidelity=fidelity
        )
        for sampled in (None, 4)
    )
    assert every[0].to_json() == some[0].to_json()
    assert [work.layers for (work,) in some[2]] == [4, 4]
    np.testing.assert_array_equal(every[1][0].end_OG, some[1][0].end_OG)


def test_sampled_layers_stand_for_their_neighbours(equal_layers: RoutingTrace) -> None:
    # Two of eight: the middles of the two halves, 2 and 6. Layer 4 is as near to both: the earlier one counts.
    replay = replay_of(equal_layers, 16, limit=1, sampled_layers=2)
    assert replay.layers.tolist() == [2, 6]
    assert replay.row_of_layer.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert replay_of(equal_layers, 16, limit=1).layers.tolist() == list(range(8))
    for sampled in (0, 9):
        with pytest.raises(InputError) as refused:
            replay_of(equal_layers, 16, limit=1, sampled_layers=sampled)
        assert str(refused.value) == f"sampled_layers is {sampled}; use 1 to 8, the model's MoE layers"


def test_a_whole_step_is_the_moe_layers_and_what_surrounds_them(equal_layers: RoutingTrace) -> None:
    placement = place("contiguous", equal_layers.loads_LE(), ranks=RANKS, slots=128)
    moe, whole = (
        replay_of(equal_layers, 16, limit=1, execution=Execution(extent=extent)).run(TOP_8, placement)[0]
        for extent in ("moe", "whole")
    )
    assert set(moe.breakdown_s) == {"gate", "dispatch", "experts", "combine"}
    assert set(whole.breakdown_s) == {*moe.breakdown_s, "attention", "other"}
    for part in ("dispatch", "experts", "combine"):
        assert whole.breakdown_s[part] == pytest.approx(moe.breakdown_s[part])
    assert sum(whole.breakdown_s.values()) + whole.waiting_s == pytest.approx(whole.step_s)
    # Each rank's LM head reads 151936 * 2048 parameters of 2 bytes: 0.19 ms at 3.35 TB/s.
    assert whole.stage_s["head"] == pytest.approx(151936 * 2048 * 2 / 3.35e12, rel=0.02)
    assert whole.tokens_per_s < moe.tokens_per_s


def test_a_gap_of_the_host_comes_once_a_step(equal_layers: RoutingTrace) -> None:
    placement = place("contiguous", equal_layers.loads_LE(), ranks=RANKS, slots=128)
    for overlap in ("none", "two_batch"):
        with_gap, without = (
            replay_of(equal_layers, 16, limit=1, execution=Execution(overlap=overlap, host_gap_s=gap_s)).run(
                TOP_8, placement
            )[0]
            for gap_s in (1e-3, 0.0)
        )
        assert with_gap.stage_s["host gap"] == pytest.approx(1e-3)
        assert with_gap.step_s == pytest.approx(without.step_s + 1e-3)


def test_two_microbatches_halve_every_ranks_tokens(equal_layers: RoutingTrace) -> None:
    replay = replay_of(equal_layers, 15, limit=1, execution=Execution(extent="moe", overlap="two_batch"))
    placement = place("contiguous", equal_layers.loads_LE(), ranks=RANKS, slots=128)
    _, timelines, ((first, second),) = replay.run(TOP_8, placement)
    assert (first.tokens_G.tolist(), second.tokens_G.tolist()) == ([8] * RANKS, [7] * RANKS)
    ((whole,),) = replace(replay, execution=Execution(extent="moe")).run(TOP_8, placement)[2]
    np.testing.assert_array_equal(first.rows_LS + second.rows_LS, whole.rows_LS)
    np.testing.assert_array_equal(first.pairs_LGG + second.pairs_LGG, whole.pairs_LGG)
    assert {interval.lane for interval in timelines[0].intervals} == {0, 1}
    with pytest.raises(InputError, match="halves each rank's tokens, and some rank has fewer than 2; use more"):
        replay_of(equal_layers, 1, limit=1, execution=Execution(overlap="two_batch"))


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_overlap_wins_where_links_are_slow_and_loses_where_weights_are_read_twice(fidelity: Fidelity) -> None:
    """Prefill, a tenth of the bandwidth between nodes: a half computes while the other's tokens are on their way.

    Decode, full bandwidth: 8 tokens a rank read nearly as many experts' weights as 16 do, which is most of the step.
    """
    model = replace(EIGHT_LAYERS, layers=2)
    trace = synthetic_trace(model, tokens=RANKS * 4096, zipf=0.0, seed=0, tokens_per_request=4096)
    placement = place("contiguous", trace.loads_LE(), ranks=RANKS, slots=128)

    def step_s(phase: Phase, tokens_per_rank: int, slowdown: float, overlap: Any) -> float:
        cluster = gpu_cluster(replace(H100, ranks_per_node=4, scale_out=H100.scale_out / slowdown), RANKS)
        replay = Replay(
            trace=trace,
            steps=make_steps(trace, phase=phase, tokens_per_rank=tokens_per_rank, ranks=RANKS, limit=1),
            cluster=cluster,
            costs=Roofline(cluster),
            phase=phase,
            protocol="per_rank" if phase == "prefill" else "per_expert",
            execution=Execution(overlap=overlap, extent="moe"),
        )
        return replay.run(TOP_8, placement, fidelity=fidelity)[0].step_s

    assert step_s("prefill", 4096, 10, "two_batch") < step_s("prefill", 4096, 10, "none")
    assert step_s("decode", 16, 1, "two_batch") > step_s("decode", 16, 1, "none")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("overlap", get_args(Overlap))
def test_analytic_is_a_lower_bound_of_whole_steps(
    equal_layers: RoutingTrace, overlap: Overlap, protocol: Protocol
) -> None:
    """Nodes of four, links a hundredth as fast, a spine that has a quarter of what is below it."""
    placement = place("lpt", equal_layers.loads_LE(), ranks=RANKS, slots=136)
    device = replace(H100, ranks_per_node=4, scale_out=H100.scale_out / 100, scale_up=H100.scale_up / 100)
    cluster = gpu_cluster(device, RANKS, oversubscription=4.0)
    execution = Execution(overlap=overlap)
    replay = replace(
        replay_of(equal_layers, 16, limit=1, execution=execution, protocol=protocol),
        cluster=cluster,
        costs=Roofline(cluster),
    )
    analytic, event = (replay.run(TOP_8, placement, fidelity=fidelity)[0] for fidelity in FIDELITIES)
    assert analytic.step_s <= event.step_s * (1 + 1e-9)
    for report in (analytic, event):
        assert report.waiting_s >= 0
        assert min(report.waits_s.values()) >= 0
        assert sum(report.breakdown_s.values()) == pytest.approx(sum(report.stage_s.values()))


def test_a_slow_gpu_holds_all_up(equal_layers: RoutingTrace) -> None:
    placement = place("contiguous", equal_layers.loads_LE(), ranks=RANKS, slots=128)
    replay = replay_of(equal_layers, 16, limit=1)
    slow = replace(replay, cluster=degrade(replay.cluster, ["gpu5=0.1"]))
    before, after = (r.run(TOP_8, placement, fidelity="event")[0] for r in (replay, slow))
    assert after.step_s > 2 * before.step_s
    assert set(after.critical_rank_by_layer) == {5}
    assert after.waits_s["return"] > before.waits_s["return"]


def test_jitter_is_of_the_event_simulation_and_of_its_seed(equal_layers: RoutingTrace) -> None:
    placement = place("contiguous", equal_layers.loads_LE(), ranks=RANKS, slots=128)

    def report(seed: int, fidelity: Fidelity) -> str:
        disturbance = Disturbance(jitter=0.1, seed=seed)
        replay = replay_of(equal_layers, 16, limit=2, disturbance=disturbance)
        return json.dumps(replay.run(TOP_8, placement, fidelity=fidelity)[0].to_json())

    assert report(1, "event") == report(1, "event") != report(2, "event")
    assert report(1, "analytic") == report(2, "analytic")


def test_pairs_of_a_rank_that_is_lost_are_lost(equal_layers: RoutingTrace) -> None:
    """Every pair is computed, dropped, or lost with its rank, once."""
    placement = place("contiguous", equal_layers.loads_LE(), ranks=RANKS, slots=128)
    policy = RoutingPolicy(selection=TopK(k=8), capacity=Capacity(factor=0.5))
    replay = replay_of(equal_layers, 16, limit=1)
    undisturbed, (timeline,), ((work,),) = replay.run(policy, placement, fidelity="event")
    assert undisturbed.lost_share == 0
    lost_at_s = timeline.start_OG[timeline.program.layer_O == 5].min()  # when layer 5 of 0 to 7 begins
    faults = (Fault(change="rank3=lost", at_s=float(lost_at_s)),)
    disturbance = Disturbance(faults=faults, detect_s=1e-3)
    report = replace(replay, disturbance=disturbance).run(policy, placement, fidelity="event")[0]
    # All its rows of layers 5, 6 and 7.
    lost, kept = work.rows_LGS[5:, 3].sum(), work.rows_LS.sum()
    assert report.lost_share == pytest.approx(lost / kept)
    assert report.dropped_share == undisturbed.dropped_share > 0
    chosen = 16 * RANKS * 8 * 8
    assert kept == round(chosen * (1 - report.dropped_share))
    assert report.step_s > undisturbed.step_s + 0.9e-3
    assert replace(replay, disturbance=disturbance).run(policy, placement)[0].lost_share == 0  # analytic: no faults


def test_a_spine_with_less_above_than_below_is_slower_where_flows_contend(equal_layers: RoutingTrace) -> None:
    placement = place("contiguous", equal_layers.loads_LE(), ranks=RANKS, slots=128)
    device = replace(H100, ranks_per_node=2, scale_out=H100.scale_out / 20)
    found = {}
    for oversubscription in (1.0, 4.0):
        cluster = gpu_cluster(device, RANKS, oversubscription=oversubscription)
        replay = replace(replay_of(equal_layers, 16, limit=1), cluster=cluster, costs=Roofline(cluster))
        found[oversubscription] = [replay.run(TOP_8, placement, fidelity=f)[0].step_s for f in FIDELITIES]
    for analytic_s, event_s in found.values():
        assert analytic_s <= event_s * (1 + 1e-9)
    assert found[1.0][0] == found[1.0][1] < found[4.0][0]


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


def test_a_layout_of_another_cluster_is_refused(qwen: RoutingTrace) -> None:
    with pytest.raises(InputError, match=r"the layout has 4 ranks on 1 nodes, the cluster 8 on 1; make it with"):
        replay_of(qwen, 4, limit=1, layout=Layout.one_node(4))


def test_without_graphs_the_step_lies_in_its_interval(qwen: RoutingTrace) -> None:
    """Launches of 100 us are longer than most kernels, and certain."""
    cluster = gpu_cluster(H100, RANKS)
    replay = replace(
        replay_of(qwen, 4, limit=1),
        phase="decode",
        costs=KernelCosts.shipped(cluster, "trtllm", "nccl"),
        execution=Execution(graph_buckets=(), launch_s=1e-4),
    )
    placement = place("contiguous", qwen.loads_LE(), ranks=RANKS, slots=128)
    report = replay.run(RoutingPolicy(selection=TopK(k=8)), placement, intervals=True)[0]
    assert report.interval_s is not None
    assert report.interval_s[0] <= report.step_s <= report.interval_s[1]

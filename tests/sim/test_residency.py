"""Experts in the host's memory: which stay, what loading the others takes, and what a policy makes of it."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorder import Recorder

from cost_models.calibrated import Calibrated
from cost_models.cluster import gpu_cluster
from cost_models.devices import device
from cost_models.ops import HostToDevice
from cost_models.profile import Profile
from cost_models.roofline import Roofline
from router.assignment import Assignment
from router.placement import PLACEMENTS, place
from router.placement.base import Placement
from router.placement.residency import keep_resident
from router.policies import RoutingPolicy
from router.policies.hardware_aware import HardwareAware
from router.policies.top_k import TopK
from router.spill import Spill
from sim.analytic import simulate_analytic
from sim.blocks import blocks_of
from sim.execution import Execution
from sim.layout import Layout
from sim.lower import Work, lower
from sim.memory import memory_use
from sim.prices import prices_of
from sim.program import Program
from sim.replay import Replay
from sim.report import Report
from traces.batching import make_steps
from traces.errors import InputError
from traces.model import ModelSpec
from traces.presets import preset
from traces.synthetic import synthetic_trace

# An expert is 3 * 8 * 16 elements of 2 bytes: 768 bytes.
TINY = ModelSpec(name="tiny", layers=2, experts=4, top_k=1, hidden=8, expert_hidden=16)
PLACEMENT = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), experts=4, ranks=2)
TOP_1 = RoutingPolicy(selection=TopK(k=1))
SOURCES = np.array([0, 0, 0, 0, 1, 1, 1, 1])


def assigned(experts_T: list[int]) -> Assignment:
    ids_TK = np.array(experts_T)[:, None]
    ones_TK = np.ones_like(ids_TK, dtype=np.float32)
    return Assignment(
        ids_TK=ids_TK,
        scores_TK=ones_TK,
        weights_TK=ones_TK,
        kept_TK=ids_TK >= 0,
        rerouted_TK=np.zeros_like(ids_TK, dtype=bool),
    )


# Layer 0 uses experts 0 and 1 of rank 0 alone, layer 1 uses all.
LAYERS = [assigned([0, 0, 0, 1, 0, 0, 0, 1]), assigned([0, 1, 2, 3, 0, 1, 2, 3])]


def work_of(policy: RoutingPolicy = TOP_1, **options: Any) -> Work:
    return lower(TINY, LAYERS, PLACEMENT, policy=policy, source_rank_T=SOURCES, **options)


def loaded_bytes(work: Work, resident_LS: Any, **execution: Any) -> Any:
    costs = Recorder()
    blocks_of(work, costs, Execution(extent="moe", **execution), resident_LS=np.array(resident_LS))
    (loads,) = (operation for operation in costs.asked if isinstance(operation, HostToDevice))
    return loads.bytes_X.tolist()


def test_the_most_loaded_slots_of_each_rank_stay() -> None:
    """Of ranks of two slots a half is one; of equal loads the lower slot's stays."""
    loads_LE = np.array([[5, 1, 2, 2], [0, 3, 4, 9]])
    assert keep_resident(PLACEMENT, loads_LE, 0.5).resident_LS.tolist() == [  # type: ignore[union-attr]
        [True, False, True, False],
        [False, True, False, True],
    ]


def test_replicas_share_their_experts_load() -> None:
    # Expert 0 has 6 rows in two slots of 3 each: less than expert 1's 4 beside it, as much as expert 2's.
    twice = Placement(slot_to_expert_LS=np.array([[0, 1, 0, 2]]), experts=3, ranks=2)
    kept = keep_resident(twice, np.array([[6, 4, 3]]), 0.5)
    assert kept.resident_LS is not None
    assert kept.resident_LS.tolist() == [[False, True, True, False]]
    assert kept.resident_LE.tolist() == [[True, True, False]]


@settings(deadline=None)
@given(data=st.data())
def test_each_rank_keeps_its_share_and_nothing_that_stays_is_less_loaded(data: st.DataObject) -> None:
    ranks, per_rank = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    slots = ranks * per_rank
    experts = data.draw(st.integers(max(per_rank, slots - ranks), slots))
    loads = data.draw(st.lists(st.integers(0, 9), min_size=2 * experts, max_size=2 * experts))
    loads_LE = np.array(loads).reshape(2, experts)
    by_loads = sorted(name for name, algorithm in PLACEMENTS.items() if not algorithm.needs)
    placement = place(data.draw(st.sampled_from(by_loads)), loads_LE, ranks=ranks, slots=slots)
    hundredths = data.draw(st.integers(1, 100))
    kept = keep_resident(placement, loads_LE, hundredths / 100)
    if kept.resident_LS is None:
        assert hundredths == 100
        return
    resident_LGS = kept.resident_LS.reshape(2, ranks, per_rank)
    wanted = math.ceil(hundredths * per_rank / 100)
    assert (resident_LGS.sum(axis=2) == wanted).all()
    load_LE = loads_LE / placement.replicas_LE
    load_LGS = np.take_along_axis(load_LE, placement.slot_to_expert_LS, axis=1).reshape(2, ranks, per_rank)
    least_kept_LG = np.where(resident_LGS, load_LGS, np.inf).min(axis=2)
    most_away_LG = np.where(resident_LGS, -np.inf, load_LGS).max(axis=2)
    assert (least_kept_LG >= most_away_LG).all()
    first = kept.take(np.array([0]))
    assert first.resident_LS is not None
    assert (first.resident_LS == kept.resident_LS[:1]).all()


def test_a_share_of_whole_slots_is_exactly_these() -> None:
    """As floats, 0.28 * 25 is a little more than 7."""
    one_rank = Placement(slot_to_expert_LS=np.arange(25)[None], experts=25, ranks=1)
    kept = keep_resident(one_rank, np.arange(25)[None], 0.28)
    assert kept.resident_LS is not None
    assert np.flatnonzero(kept.resident_LS).tolist() == list(range(18, 25))


def test_a_rank_keeps_at_least_one_slot_a_layer() -> None:
    kept = keep_resident(PLACEMENT, np.ones((2, 4)), 1e-12)
    assert kept.resident_LS is not None
    assert kept.resident_LS.tolist() == [[True, False, True, False]] * 2


@pytest.mark.parametrize("share", [0, -0.5, 1.5, math.nan])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(InputError, match=r"above 0"):
        keep_resident(PLACEMENT, np.ones((2, 4)), share)


def test_residency_of_other_slots_is_refused() -> None:
    with pytest.raises(InputError, match=r"residency of shape \(1, 4\) for slots of shape \(2, 4\)"):
        replace(PLACEMENT, resident_LS=np.ones((1, 4), dtype=bool))


AWAY = [[False, True, False, False], [False, True, True, False]]


def test_a_rank_loads_the_experts_that_it_uses_and_has_not() -> None:
    # Layer 0: rank 0 uses 0 and 1 and has 1; rank 1 uses none of its experts. Layer 1: each lacks one of its two.
    assert loaded_bytes(work_of(), AWAY) == [[768, 0], [768, 768]]
    none = [[False] * 4] * 2
    assert loaded_bytes(work_of(), none) == [[2 * 768, 0], [2 * 768, 2 * 768]]


def test_experts_are_loaded_right_before_they_run() -> None:
    costs = Roofline(gpu_cluster(device("h100_sxm"), 2))
    (block,) = blocks_of(work_of(), costs, Execution(extent="moe"), resident_LS=np.array(AWAY))
    names = [stage.name for stage in block.stages]
    assert names[names.index("experts") - 1] == "load experts"
    loads = block.stages[names.index("load experts")]
    assert loads.stream == "compute"
    # An H100's link to its host carries 64 GB/s.
    np.testing.assert_allclose(loads.seconds_LG, np.array([[768, 0], [768, 768]]) / 64e9, rtol=1e-12)


def test_where_all_experts_stay_nothing_is_loaded() -> None:
    costs = Roofline(gpu_cluster(device("h100_sxm"), 2))
    (plain,) = blocks_of(work_of(), costs, Execution(extent="moe"))
    (kept,) = blocks_of(work_of(), costs, Execution(extent="moe"), resident_LS=np.ones((2, 4), dtype=bool))
    assert [stage.name for stage in kept.stages] == [stage.name for stage in plain.stages]
    assert "load experts" not in [stage.name for stage in kept.stages]


def test_a_rank_that_loads_nothing_starts_no_copy() -> None:
    """Whatever a copy of nothing would take."""
    (block,) = blocks_of(work_of(), Recorder(), Execution(extent="moe"), resident_LS=np.array(AWAY))
    (loads,) = (stage for stage in block.stages if stage.name == "load experts")
    assert (loads.seconds_LG > 0).tolist() == [[True, False], [True, True]]


def test_ranks_that_share_an_expert_load_a_part_each() -> None:
    layout = Layout(node_of_G=np.zeros(4, dtype=np.int64), expert_tensor=2)
    sources = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    work = lower(TINY, LAYERS, PLACEMENT, policy=TOP_1, source_rank_T=sources, layout=layout)
    assert loaded_bytes(work, AWAY) == [[384, 384, 0, 0], [384, 384, 384, 384]]


def test_guests_of_a_spill_get_their_weights_from_another_rank() -> None:
    spill = RoutingPolicy(selection=TopK(k=1), capacity=Spill(factor=1.0, least_rows=1, guests=1))
    work = work_of(spill)
    assert work.rows_LS[0].tolist() == [2, 2, 0, 0, 0, 4]  # rank 1 computes at its guest place alone
    assert loaded_bytes(work, [[False] * 4] * 2)[0] == [2 * 768, 0]


def test_single_batch_overlap_loads_before_the_first_of_the_experts_products() -> None:
    resident_LS = np.array(AWAY)
    execution = Execution(extent="moe", overlap="single_batch")
    (block,) = blocks_of(work_of(), Recorder(), execution, resident_LS=resident_LS)
    names = [stage.name for stage in block.stages]
    assert names.index("load experts") == names.index("experts") - 1 < names.index("experts down")


def test_a_calibration_prices_no_loading() -> None:
    nothing = Profile(
        device="cpu", device_name="here", ranks=2, linear={}, curves={}, errors={}, probe_s=(1, 1), load_average=0
    )
    replay = replace(REPLAY, costs=Calibrated(nothing))
    with pytest.raises(InputError, match=r"^resident_share: .* know no link to the host; .* in memory with 1$"):
        replay.run(TOP_4, keep_resident(SLOTS, TRACE.loads_LE(), 0.5))


def test_memory_holds_what_stays_and_one_expert_on_its_way() -> None:
    layout = Layout.one_node(2)
    details: dict[str, Any] = {
        "tokens_per_rank": 2,
        "width": 1,
        "kv_tokens_per_rank": 0,
        "protocol": "per_rank",
        "dispatch_dtype": "bfloat16",
        "capacity_bytes": None,
    }
    everything = memory_use(TINY, PLACEMENT, layout, **details)
    assert everything.expert_bytes == 2 * 2 * 768
    # Rank 0 keeps one slot in each layer, rank 1 one in all.
    kept = replace(PLACEMENT, resident_LS=np.array(AWAY))
    assert memory_use(TINY, kept, layout, **details).expert_bytes == (2 + 1) * 768
    every = replace(PLACEMENT, resident_LS=np.ones((2, 4), dtype=bool))
    assert memory_use(TINY, every, layout, **details) == everything


def test_an_expert_costs_its_loading_where_it_stays_nowhere() -> None:
    costs = Roofline(gpu_cluster(device("h100_sxm"), 2))
    details: dict[str, Any] = {"protocol": "per_expert", "dispatch_dtype": "bfloat16", "tokens_per_rank": 8, "width": 1}
    # Two ranks of three slots: expert 0 is on both and stays on one, 1 stays, 2 and 3 do not.
    placement = Placement(
        slot_to_expert_LS=np.array([[0, 1, 2, 0, 3, 1]]),
        experts=4,
        ranks=2,
        resident_LS=np.array([[True, True, False, False, False, False]]),
    )
    prices = prices_of(TINY, placement, costs, layout=Layout.one_node(2), **details)
    assert prices.load_s_LE[0].tolist() == pytest.approx([0, 0, 768 / 64e9, 768 / 64e9])
    assert not prices_of(TINY, PLACEMENT, costs, layout=Layout.one_node(2), **details).load_s_LE.any()


# Decode of a model of gpt-oss-20b's shape, four layers of it: 16 tokens on each of 4 H100.
RANKS = 4
MODEL = replace(preset("gpt-oss-20b"), layers=4)
TRACE = synthetic_trace(MODEL, tokens=16 * RANKS * 2, zipf=0.8, candidates=16, phase="decode", seed=1)
CLUSTER = gpu_cluster(device("h100_sxm"), RANKS)
REPLAY = Replay(
    trace=TRACE,
    steps=make_steps(TRACE, phase="decode", tokens_per_rank=16, ranks=RANKS, limit=2),
    cluster=CLUSTER,
    costs=Roofline(CLUSTER),
    phase="decode",
    execution=Execution(extent="moe"),
)
SLOTS = place("lpt", TRACE.loads_LE(), ranks=RANKS, slots=MODEL.experts)
TOP_4 = RoutingPolicy(selection=TopK(k=4))


def report_of(policy: RoutingPolicy, share: float) -> Report:
    return REPLAY.run(policy, keep_resident(SLOTS, TRACE.loads_LE(), share))[0]


def test_the_less_stays_the_longer_a_step_takes_and_the_less_memory_it_needs() -> None:
    reports = [report_of(TOP_4, share) for share in (1.0, 0.75, 0.5, 0.25)]
    steps_s = [report.step_s for report in reports]
    assert steps_s == sorted(steps_s)
    assert len(set(steps_s)) == len(steps_s)
    held = [report.memory.expert_bytes for report in reports]
    assert held == sorted(held, reverse=True)
    assert all(("load experts" in report.stage_s) == (at > 0) for at, report in enumerate(reports))
    assert reports[-1].breakdown_s["experts"] >= reports[-1].stage_s["load experts"]
    assert reports[0] == REPLAY.run(TOP_4, SLOTS)[0]


def test_a_policy_that_knows_the_hardware_avoids_loading() -> None:
    """Loading an expert takes as long as computing very many rows: at a price it loads less and is faster."""
    aware = RoutingPolicy(selection=TopK(k=4), adjustment=HardwareAware(price=1.0, scope="global"))
    plain, avoiding = report_of(TOP_4, 0.5), report_of(aware, 0.5)
    assert avoiding.stage_s["load experts"] < plain.stage_s["load experts"]
    assert avoiding.step_s < plain.step_s
    assert avoiding.gate_mass < plain.gate_mass


def test_sampled_layers_take_their_own_residency() -> None:
    sampled = replace(REPLAY, sampled_layers=2)
    placement = keep_resident(SLOTS, TRACE.loads_LE(), 0.5)
    _, _, works = sampled.run(TOP_4, placement)
    assert placement.resident_LS is not None
    away_LGS = ~placement.resident_LS[sampled.layers].reshape(2, RANKS, -1)
    blocks = sampled.price(works[0], placement)[0]
    (loads,) = (stage for stage in blocks[0].stages if stage.name == "load experts")
    experts_LG = (away_LGS & (works[0][0].rows_LGS > 0)).sum(axis=2)
    np.testing.assert_allclose(loads.seconds_LG, experts_LG * MODEL.expert_bytes / 64e9, rtol=1e-12)


def test_a_step_of_replays_is_that_of_its_blocks() -> None:
    """What `Replay` adds to the step is what the loads take on the slowest ranks."""
    placement = keep_resident(SLOTS, TRACE.loads_LE(), 0.5)
    _, timelines, works = REPLAY.run(TOP_4, placement)
    blocks = blocks_of(works[0][0], REPLAY.costs, REPLAY.execution, resident_LS=placement.resident_LS)
    assert timelines[0].step_s == simulate_analytic(Program.of([blocks])).step_s

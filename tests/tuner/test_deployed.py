"""Parts of small models at the widths of large ones."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from router.subnetwork import SubNetwork
from sim.report import Report
from traces.errors import InputError
from traces.model import ModelSpec
from traces.presets import preset
from traces.synthetic import synthetic_trace
from traces.trace import RoutingTrace
from tuner.deployed import deployed_report, deployed_shape, deployed_trace

LAYERS = 4


def part(*, depth: int = LAYERS, experts: int = 16, top_k: int = 4) -> SubNetwork:
    return SubNetwork.whole(depth, experts, top_k)


@cache
def trace(of: SubNetwork) -> RoutingTrace:
    spec = ModelSpec(
        name="small", layers=of.depth, experts=of.experts, top_k=of.top_k, hidden=8, expert_hidden=8, gate="softmax"
    )
    return synthetic_trace(spec, tokens=1024, zipf=0.3, candidates=of.experts, tokens_per_request=32, seed=0)


@cache
def report(of: SubNetwork) -> Report:
    return deployed_report(trace(of), of, LAYERS, tokens_per_rank=8, kv_tokens_per_rank=8192, steps=2)


def test_each_deployed_layer_routes_as_the_recorded_one_at_its_depth() -> None:
    half = part(depth=2)
    deployed = deployed_trace(trace(half), half, LAYERS, preset("dbrx"))
    assert (deployed.model.layers, deployed.model.hidden) == (20, 6144)  # half of 40
    recorded = trace(half).expert_ids_TLC
    for layer in range(20):
        assert np.array_equal(deployed.expert_ids_TLC[:, layer], recorded[:, layer // 10])
    assert "at the widths of dbrx" in deployed.source


def test_weights_that_are_gone_free_memory_and_time() -> None:
    whole = report(part())
    half_deep, half_wide = report(part(depth=2)), report(part(experts=8))
    dbrx = preset("dbrx")
    assert whole.memory.expert_bytes == 2 * 40 * dbrx.expert_bytes  # two slots a rank
    assert half_deep.memory.expert_bytes == half_wide.memory.expert_bytes == whole.memory.expert_bytes / 2
    assert half_deep.memory.kv_cache_bytes == whole.memory.kv_cache_bytes / 2
    assert half_wide.memory.kv_cache_bytes == whole.memory.kv_cache_bytes
    assert half_deep.stage_s["attention"] == pytest.approx(whole.stage_s["attention"] / 2)
    assert half_deep.stage_s["head"] == pytest.approx(whole.stage_s["head"])
    assert half_deep.step_s < 0.6 * whole.step_s
    assert half_wide.breakdown_s["experts"] < 0.75 * whole.breakdown_s["experts"]


def test_fewer_experts_a_token_cost_less() -> None:
    steps_s = [report(part(top_k=top_k)).step_s for top_k in (1, 2, 4)]
    assert steps_s == sorted(steps_s)
    assert [report(part(top_k=top_k)).experts_per_token for top_k in (1, 2, 4)] == [1, 2, 4]


def test_k_may_differ_from_layer_to_layer() -> None:
    mixed = replace(part(), top_k_L=(4, 2, 1, 1))
    assert report(mixed).experts_per_token == 2.0
    assert report(part(top_k=1)).step_s < report(mixed).step_s < report(part()).step_s


def test_experts_that_do_not_divide_over_ranks_fill_their_slots() -> None:
    assert report(part(experts=12)).memory.expert_bytes == report(part()).memory.expert_bytes
    assert report(part(experts=4)).memory.expert_bytes == report(part(experts=8)).memory.expert_bytes


def test_a_small_model_stands_for_one_of_as_many_experts() -> None:
    assert [deployed_shape(experts).name for experts in (16, 8)] == ["dbrx", "mixtral-8x7b"]
    with pytest.raises(InputError, match="has 12 experts a layer; a model of 8 or 16 can be deployed"):
        deployed_shape(12)


def test_what_no_deployed_model_has_is_refused() -> None:
    whole = part()
    with pytest.raises(InputError, match="dbrx has 40 layers, fewer than the 41 of the model"):
        deployed_trace(trace(whole), whole, 41, preset("dbrx"))
    nulls = replace(trace(whole), model=replace(trace(whole).model, null_experts=2))
    with pytest.raises(InputError, match="its model has null experts, which dbrx has not"):
        deployed_trace(nulls, whole, LAYERS, preset("dbrx"))
    with pytest.raises(InputError, match="decode steps need 8192 streams"):
        deployed_report(trace(whole), whole, LAYERS, tokens_per_rank=1024)

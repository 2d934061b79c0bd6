"""Prices of choices against the steps that they stand for."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cost_models.cluster import Cluster, gpu_cluster
from cost_models.devices import device
from cost_models.kernel_costs import KernelCosts
from cost_models.ops import CostModel
from cost_models.roofline import Roofline
from router.assignment import Assignment
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.policies.top_k import TopK
from router.prices import RoutePrices
from sim.analytic import simulate_analytic
from sim.blocks import blocks_of
from sim.execution import Execution
from sim.layout import Layout
from sim.lower import lower
from sim.prices import prices_of
from sim.program import Program
from traces.model import ModelSpec
from traces.presets import preset

RANKS = 8
MODEL = replace(preset("gpt-oss-20b"), layers=1, weight_bytes=2.0, weight_dtype="bfloat16")
CLUSTER = gpu_cluster(device("h100_sxm"), RANKS)
COSTS: dict[str, Callable[[Cluster], CostModel]] = {
    "roofline": Roofline,
    "kernels": lambda cluster: KernelCosts.shipped(cluster, "trtllm"),
}
every_cost_model = pytest.mark.parametrize("costs", sorted(COSTS))


def placement_of(slot_to_expert: Any, ranks: int = RANKS, experts: int = MODEL.experts) -> Placement:
    return Placement(slot_to_expert_LS=np.array([slot_to_expert]), experts=experts, ranks=ranks)


def prices_for(costs: CostModel, *, tokens: int, cluster: Cluster = CLUSTER, **other: Any) -> RoutePrices:
    details: dict[str, Any] = {
        "layout": Layout.on(cluster),
        "protocol": "per_expert",
        "dispatch_dtype": "bfloat16",
        "width": MODEL.top_k,
        **other,
    }
    placement = placement_of(np.arange(MODEL.experts), details["layout"].expert_groups)
    return prices_of(MODEL, placement, costs, tokens_per_rank=tokens, **details)


def step_s(costs: CostModel, ids_TK: Any, *, tokens: int, model: ModelSpec = MODEL) -> float:
    """An MoE layer's step at these choices of each rank's `tokens` tokens."""
    ones_TK = np.ones(ids_TK.shape, dtype=np.float32)
    assignment = Assignment(
        ids_TK=ids_TK,
        scores_TK=ones_TK,
        weights_TK=ones_TK,
        kept_TK=ids_TK >= 0,
        rerouted_TK=np.zeros(ids_TK.shape, dtype=np.bool_),
    )
    work = lower(
        model,
        [assignment],
        placement_of(np.arange(MODEL.experts)),
        policy=RoutingPolicy(selection=TopK(k=MODEL.top_k)),
        source_rank_T=np.repeat(np.arange(RANKS), tokens),
        layout=Layout.on(CLUSTER),
    )
    return simulate_analytic(Program.of([blocks_of(work, costs, Execution(extent="moe"))])).step_s


def even_ids(tokens: int) -> Any:
    """Each token uses four neighbouring experts, all experts equally often, ranks alike."""
    return (np.arange(RANKS * tokens)[:, None] * 4 + np.arange(4)) % MODEL.experts


@every_cost_model
@pytest.mark.parametrize("tokens", [1, 16, 128, 4096])
def test_prices_are_finite_and_say_what_is_cheap_where(costs: str, tokens: int) -> None:
    prices = prices_for(COSTS[costs](CLUSTER), tokens=tokens)
    for value in (prices.row_s, prices.active_s, prices.hop_s_GG, prices.load_s_LE):
        assert np.isfinite(value).all()
        assert (np.asarray(value) >= 0).all()
    assert (np.diagonal(prices.hop_s_GG) == 0).all()
    assert prices.row_s + prices.active_s > 0
    np.testing.assert_allclose(prices.share_LEG.sum(axis=2), 1, rtol=1e-6)


@every_cost_model
def test_an_active_expert_costs_a_decode_step_many_rows(costs: str) -> None:
    """16 tokens a rank: 16 rows an expert of 48 MB in bfloat16, which an H100 reads in 15 us."""
    prices = prices_for(COSTS[costs](CLUSTER), tokens=16)
    read_s = 3 * MODEL.hidden * MODEL.expert_hidden * 2 / 3.35e12
    assert 0.8 * read_s < prices.active_s < 1.6 * read_s
    assert prices.active_s > 16 * prices.row_s


def test_at_prefill_a_datasheet_says_that_rows_are_all_there_is() -> None:
    prices = prices_for(Roofline(CLUSTER), tokens=4096)
    # 6 FLOPs a weight and row at 989 TFLOP/s, and 2 * (in and out) * 2 bytes of a row regrouped at 3.35 TB/s.
    row_s = 6 * MODEL.hidden * MODEL.expert_hidden / 989e12 + 2 * 2 * MODEL.row_bytes / 3.35e12
    assert prices.active_s == pytest.approx(0, abs=1e-9)
    assert prices.row_s == pytest.approx(row_s, rel=0.02)


@every_cost_model
def test_closing_an_expert_on_every_rank_saves_what_it_is_priced_at(costs: str) -> None:
    """The last of each rank's four experts closes and its rows go to the first: all ranks keep their rows."""
    model, tokens = COSTS[costs](CLUSTER), 16
    ids_TK = even_ids(tokens)
    closed_TK = np.where(ids_TK % 4 == 3, (ids_TK - 3 + 4 * (np.arange(len(ids_TK)) % 3 + 1)[:, None]) % 32, ids_TK)
    assert (np.bincount(closed_TK.ravel(), minlength=32).reshape(8, 4) > 0).sum(axis=1).tolist() == [3] * 8
    saved_s = step_s(model, ids_TK, tokens=tokens) - step_s(model, closed_TK, tokens=tokens)
    assert saved_s == pytest.approx(prices_for(model, tokens=tokens).active_s, rel=0.25)


@every_cost_model
def test_leaving_out_rows_saves_what_they_are_priced_at(costs: str) -> None:
    """At prefill each token leaves out one of four: what ranks compute and links carry falls by a quarter."""
    model, tokens = COSTS[costs](CLUSTER), 2048
    ids_TK = even_ids(tokens)
    fewer_TK = np.where((ids_TK + np.arange(len(ids_TK))[:, None] // 8) % 4 == 0, -1, ids_TK)
    prices = prices_for(model, tokens=tokens)
    left_out = (fewer_TK < 0).sum() / RANKS
    hop_s = prices.hop_s_GG.sum() / RANKS**2
    saved_s = step_s(model, ids_TK, tokens=tokens) - step_s(model, fewer_TK, tokens=tokens)
    # Permuting before and adding up after are not priced: every rank does that for its own tokens alike.
    assert 0.7 < left_out * (prices.row_s + hop_s) / saved_s < 1.3


def test_another_node_is_farther_than_the_next_rank() -> None:
    cluster = gpu_cluster(device("h100_sxm"), 16)
    hop_s_GG = prices_for(Roofline(cluster), tokens=64, cluster=cluster).hop_s_GG
    assert hop_s_GG[0, 1] > 0
    assert hop_s_GG[0, 8] > 5 * hop_s_GG[0, 1]  # 450 GB/s of NVLink against 50 GB/s of a NIC
    np.testing.assert_array_equal(hop_s_GG, hop_s_GG.T)


def test_replicas_share_and_tensor_groups_all_compute() -> None:
    # Two ranks of two slots: expert 0 is on both, 1 on the first, 2 on the second.
    model = replace(MODEL, experts=3, top_k=2)
    cluster = gpu_cluster(device("h100_sxm"), 4)
    details: dict[str, Any] = {"protocol": "per_expert", "dispatch_dtype": "bfloat16", "tokens_per_rank": 8, "width": 2}
    placement = placement_of([0, 1, 2, 0], ranks=2, experts=3)
    of_two = prices_of(
        model, placement, Roofline(gpu_cluster(device("h100_sxm"), 2)), layout=Layout.one_node(2), **details
    )
    assert of_two.share_LEG[0].tolist() == [[0.5, 0.5], [1, 0], [0, 1]]
    layout = Layout.on(cluster, expert_tensor=2)
    of_four = prices_of(model, placement, Roofline(cluster), layout=layout, **details)
    assert of_four.share_LEG[0].tolist() == [[0.5, 0.5, 0.5, 0.5], [1, 1, 0, 0], [0, 0, 1, 1]]
    assert of_four.hop_s_GG.shape == (4, 4)
    assert of_four.active_s == pytest.approx(of_two.active_s / 2, rel=0.05)  # half of the width each

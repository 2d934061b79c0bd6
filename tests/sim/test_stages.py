"""What each stage asks the cost model: the operation, and its sizes by layer and rank, by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from recorder import COLLECTIVES, Recorder

from cost_models.devices import DEVICES
from cost_models.kernels.token_traffic import bytes_between_ranks
from cost_models.ops import (
    AllToAll,
    Combine,
    CountExchange,
    DenseMlp,
    Experts,
    Gate,
    Operation,
    Permute,
    Regroup,
    Route,
    TokenExchange,
)
from router.assignment import Assignment
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.policies.top_k import TopK
from sim.blocks import blocks_of
from sim.execution import OVERLAP_PACE, Execution
from sim.layout import Layout
from sim.lower import Protocol, Work, lower
from sim.stages import Stage
from traces.model import ModelSpec

TINY = ModelSpec(name="tiny", layers=1, experts=4, top_k=2, hidden=8, expert_hidden=16)
# Rank 0 holds experts 0 and 1, rank 1 holds 2 and 3.
PLACEMENT = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3]]), experts=4, ranks=2)


def work_of(model: ModelSpec, placement: Placement = PLACEMENT, **options: Any) -> Work:
    """Three tokens, two of rank 0; the second and third have a pair dropped.

    Kept pairs by source and computing rank: [[1, 2], [1, 0]].
    """
    kept = np.array([[True, True], [True, False], [True, False]])
    assignment = Assignment(
        ids_TK=np.array([[0, 2], [2, 3], [1, 0]]),
        scores_TK=kept.astype(np.float32),
        weights_TK=kept.astype(np.float32),
        kept_TK=kept,
        rerouted_TK=np.zeros_like(kept),
    )
    policy = RoutingPolicy(selection=TopK(k=2))
    return lower(model, [assignment], placement, policy=policy, source_rank_T=np.array([0, 0, 1]), **options)


def asked_of(model: ModelSpec, protocol: Protocol = "per_expert") -> tuple[tuple[Stage, ...], dict[str, Operation]]:
    """The MoE stages of that work, and the operation that each was priced as."""
    costs = Recorder()
    (block,) = blocks_of(work_of(model, protocol=protocol), costs, Execution(extent="moe"), device=DEVICES["h100_sxm"])
    return block.stages, {stage.name: costs.operation_of(block.stages, stage.name) for stage in block.stages}


def test_stages_in_order_and_on_their_streams() -> None:
    stages, asked = asked_of(TINY)
    assert [(stage.name, type(asked[stage.name])) for stage in stages] == [
        ("gate", Gate),
        ("route", Route),
        ("permute", Permute),
        ("counts", CountExchange),
        ("dispatch", TokenExchange),
        ("regroup", Regroup),
        ("experts", Experts),
        ("ungroup", Regroup),
        ("return", TokenExchange),
        ("combine", Combine),
    ]
    for stage in stages:
        assert stage.stream == ("communication" if isinstance(asked[stage.name], COLLECTIVES) else "compute")
        assert stage.seconds_LG.shape == (1, 2)
        assert not stage.under_next


def test_each_rank_scores_and_routes_its_own_tokens() -> None:
    _, asked = asked_of(TINY)
    for name in ("gate", "route"):
        np.testing.assert_array_equal(np.broadcast_to(asked[name].tokens_X, (1, 2)), [[2, 1]])  # type: ignore[union-attr]
    assert (asked["gate"].hidden, asked["gate"].experts) == (8, 4)  # type: ignore[union-attr]


def test_a_rank_gathers_what_it_sends_and_adds_what_comes_back() -> None:
    _, asked = asked_of(TINY)
    permute, combine = asked["permute"], asked["combine"]
    assert isinstance(permute, Permute)
    assert isinstance(combine, Combine)
    assert permute.pairs_X.tolist() == [[4, 2]]  # two experts a token, dropped or not
    assert permute.rows_X.tolist() == combine.rows_X.tolist() == [[3, 1]]
    assert combine.tokens_X.tolist() == [[2, 1]]
    assert permute.row_bytes == combine.row_bytes == 16


def test_a_rank_regroups_and_computes_what_it_receives() -> None:
    _, asked = asked_of(TINY)
    for name in ("regroup", "ungroup"):
        regroup = asked[name]
        assert isinstance(regroup, Regroup)
        assert regroup.rows_X.tolist() == [[2, 2]]
        assert regroup.segments == 2 * 2  # two slots from each of two ranks
    experts = asked["experts"]
    assert isinstance(experts, Experts)
    assert experts.rows_XS.tolist() == [[[1, 1], [2, 0]]]
    assert (experts.hidden, experts.expert_hidden, experts.matrices, experts.weight_bytes) == (8, 16, 3, 2.0)


def test_what_the_links_carry() -> None:
    _, asked = asked_of(TINY)
    counts, dispatch, back = (asked[name] for name in ("counts", "dispatch", "return"))
    assert isinstance(counts, AllToAll)
    assert isinstance(dispatch, TokenExchange)
    assert isinstance(back, TokenExchange)
    assert (dispatch.direction, back.direction) == ("dispatch", "combine")
    assert counts.bytes_XGG.tolist() == [[[16, 16], [16, 16]]]  # two slots a rank, 8 bytes each
    assert bytes_between_ranks(dispatch).tolist() == [[[16, 32], [16, 0]]]
    assert bytes_between_ranks(back).tolist() == [[[16, 16], [32, 0]]]
    assert (dispatch.tokens_X.tolist(), dispatch.hidden, dispatch.top_k, dispatch.experts) == ([2], 8, 2, 4)
    assert (int(dispatch.ranks_X), int(dispatch.nodes_X), dispatch.dtype) == (2, 1, "bfloat16")


def test_only_an_exchange_of_tokens_says_what_moves() -> None:
    """The event simulation sends its rows over the cluster's links, and takes multiprocessors for them."""
    stages, asked = asked_of(TINY)
    assert {stage.name: stage.exchange for stage in stages if stage.exchange is not None} == {
        "dispatch": asked["dispatch"],
        "return": asked["return"],
    }


def test_a_normal_exchange_takes_multiprocessors_and_a_low_latency_one_none() -> None:
    low_latency, asked = asked_of(TINY, "per_expert")
    assert not any(stage.sms_share for stage in low_latency)
    assert all(stage.pace == 1 for stage in low_latency)
    assert (asked["dispatch"].mode, asked["dispatch"].sms_X) == ("low_latency", 0)  # type: ignore[union-attr]
    normal, asked = asked_of(TINY, "per_rank")
    assert {stage.name: stage.sms_share for stage in normal if stage.sms_share} == {
        "dispatch": 20 / 132,  # DeepEP's 20 of an H100's 132
        "return": 20 / 132,
    }
    assert {stage.name for stage in normal if stage.pace == OVERLAP_PACE} == {"dispatch", "return"}
    assert (asked["dispatch"].mode, asked["dispatch"].sms_X) == ("normal", 20)  # type: ignore[union-attr]
    assert asked["experts"].mode == "normal"  # type: ignore[union-attr]


def test_shared_experts_run_on_the_ranks_own_tokens_under_the_dispatch() -> None:
    stages, asked = asked_of(replace(TINY, shared_experts=2, shared_hidden=24))
    names = [stage.name for stage in stages]
    assert names.index("shared") + 1 == names.index("dispatch")
    assert [stage.name for stage in stages if stage.under_next] == ["shared"]
    shared = asked["shared"]
    assert isinstance(shared, DenseMlp)
    assert shared.rows_X.tolist() == [[2, 1]]  # every token
    assert shared.mlp_hidden == 2 * 24  # both side by side


@pytest.mark.parametrize("name", ["counts", "dispatch", "return"])
def test_a_collective_takes_all_ranks_the_same(name: str) -> None:
    stages, _ = asked_of(TINY)
    stage = next(stage for stage in stages if stage.name == name)
    assert stage.seconds_LG[0, 0] == stage.seconds_LG[0, 1]
    assert stage.group == 0  # all of them meet


def test_single_batch_overlap_runs_the_down_product_and_the_shared_expert_under_the_return() -> None:
    """Experts have three matrices, the last of which is the down product: a third of their time."""
    model = replace(TINY, shared_experts=1, shared_hidden=24)
    costs = Recorder()
    (block,) = blocks_of(work_of(model), costs, Execution(extent="moe", overlap="single_batch"))
    names = [(stage.name, stage.under_next) for stage in block.stages]
    assert names[names.index(("dispatch", False)) :] == [
        ("dispatch", False),
        ("regroup", False),
        ("experts", False),
        ("ungroup", False),
        ("experts down", True),
        ("shared", True),
        ("return", False),
        ("combine", False),
    ]
    (plain,) = blocks_of(work_of(model), Recorder(), Execution(extent="moe"))
    whole = next(stage for stage in plain.stages if stage.name == "experts").seconds_LG
    seconds = {stage.name: stage.seconds_LG for stage in block.stages}
    np.testing.assert_allclose(seconds["experts"] + seconds["experts down"], whole)
    np.testing.assert_allclose(seconds["experts"], 2 * seconds["experts down"])


def test_ranks_that_share_an_expert_compute_half_its_width_each() -> None:
    layout = Layout(node_of_G=np.zeros(2, dtype=np.int64), expert_tensor=2)
    placement = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3]]), experts=4, ranks=1)
    costs = Recorder()
    (block,) = blocks_of(work_of(TINY, placement, layout=layout), costs, Execution(extent="moe"))
    experts = costs.operation_of(block.stages, "experts")
    assert isinstance(experts, Experts)
    # All four kept pairs, on both ranks: expert 1 and 3 have none and one.
    assert experts.rows_XS.tolist() == [[[1, 1, 2, 0], [1, 1, 2, 0]]]
    assert experts.expert_hidden == 16 // 2

"""Lowering by hand: rows by slot, pairs by rank, bytes by hop."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.assignment import UNUSED, Assignment
from router.candidates import Candidates
from router.capacity import Capacity
from router.context import RouteContext
from router.placement import place
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.policies.skip import Skip
from router.policies.top_k import TopK
from router.policies.top_p import TopP
from sim.lower import Work, lower, route_operation
from traces.model import ModelSpec

# A row is 8 elements of 2 bytes: 16 bytes.
TINY = ModelSpec(name="tiny", layers=1, experts=4, top_k=2, hidden=8, expert_hidden=16)
# Rank 0 holds experts 0 and 1, rank 1 holds 2 and 3.
PLACEMENT = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3]]), experts=4, ranks=2)
TOP_2 = RoutingPolicy(selection=TopK(k=2))


def assigned(ids_TK: Any, dropped: Any = ()) -> Assignment:
    ids = np.array(ids_TK)
    kept = ids != UNUSED
    for token, column in dropped:
        kept[token, column] = False
    weights = kept.astype(np.float32)
    return Assignment(ids_TK=ids, scores_TK=weights, weights_TK=weights, kept_TK=kept)


def work_of(ids_TK: Any, *, dropped: Any = (), **options: Any) -> Work:
    """Three tokens: two of rank 0, one of rank 1."""
    return lower(
        TINY, [assigned(ids_TK, dropped)], PLACEMENT, policy=TOP_2, source_rank_T=np.array([0, 0, 1]), **options
    )


# Rank 0: token 0 to experts 0 (here) and 2, token 1 to experts 2 and 3. Rank 1: token 2 to experts 1 and 0.
IDS = [[0, 2], [2, 3], [1, 0]]


def test_rows_and_pairs_by_hand() -> None:
    work = work_of(IDS)
    assert work.rows_LS.tolist() == [[2, 1, 2, 1]]
    assert work.rows_LGS.tolist() == [[[2, 1], [2, 1]]]
    # From rank 0: token 0 once to itself; tokens 0, 1, 1 to rank 1. From rank 1: token 2 twice to rank 0.
    assert work.pairs_LGG.tolist() == [[[1, 3], [2, 0]]]
    assert work.tokens_G.tolist() == [2, 1]
    assert work.ranks == 2


def test_per_expert_sends_a_token_once_for_each_expert() -> None:
    (hop,) = work_of(IDS, protocol="per_expert").dispatch
    assert hop.bytes_LGG.tolist() == [[[16, 48], [32, 0]]]


def test_per_rank_sends_a_token_once_to_each_rank() -> None:
    # Token 1 goes to rank 1 once for its two experts there, token 2 to rank 0 once.
    work = work_of(IDS, protocol="per_rank")
    assert work.dispatch[0].bytes_LGG.tolist() == [[[16, 32], [16, 0]]]
    assert work.pairs_LGG.tolist() == [[[1, 3], [2, 0]]]  # what is computed is the same


def test_unused_and_dropped_pairs_are_neither_sent_nor_computed() -> None:
    work = work_of([[0, UNUSED], [2, 3], [1, 0]], dropped=[(1, 1), (2, 0)])
    assert work.rows_LS.tolist() == [[2, 0, 1, 0]]
    assert work.pairs_LGG.tolist() == [[[1, 1], [1, 0]]]


@pytest.mark.parametrize("protocol", ["per_expert", "per_rank"])
def test_what_goes_out_comes_back(protocol: Any) -> None:
    work = work_of(IDS, protocol=protocol)
    np.testing.assert_array_equal(work.combine[0].bytes_LGG[0], work.dispatch[0].bytes_LGG[0].T)


def test_each_layer_has_a_placement_of_its_own() -> None:
    placement = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3], [2, 3, 0, 1]]), experts=4, ranks=2)
    work = lower(TINY, [assigned(IDS)] * 2, placement, policy=TOP_2, source_rank_T=np.array([0, 0, 1]))
    assert work.rows_LS.tolist() == [[2, 1, 2, 1], [2, 1, 2, 1]]  # slots 0 and 1 now hold experts 2 and 3
    assert work.pairs_LGG.tolist() == [[[1, 3], [2, 0]], [[3, 1], [0, 2]]]


def test_counts_go_ahead_as_int64_a_slot() -> None:
    assert work_of(IDS).count_bytes == 8 * 2


def test_replicas_share_the_rows() -> None:
    # Both ranks hold both of two experts; rank 0's tokens take turns: slots 0 and 2; rank 1's starts at slot 2.
    placement = Placement(slot_to_expert_LS=np.array([[0, 1, 0, 1]]), experts=2, ranks=2)
    ids, sources = [[0, UNUSED]] * 3, np.array([0, 0, 1])
    even = lower(TINY, [assigned(ids)], placement, policy=TOP_2, source_rank_T=sources, replica_choice="even")
    assert even.rows_LS.tolist() == [[1, 0, 2, 0]]
    local = lower(TINY, [assigned(ids)], placement, policy=TOP_2, source_rank_T=sources, replica_choice="local")
    assert local.rows_LS.tolist() == [[2, 0, 1, 0]]
    assert local.pairs_LGG.tolist() == [[[2, 0], [0, 1]]]


def test_what_the_policy_itself_does() -> None:
    tokens_G = np.array([2, 1])
    plain = route_operation(TOP_2, PLACEMENT, tokens_G)
    assert (plain.width, plain.dynamic, plain.capacity, plain.replicas) == (2, False, None, False)
    with_replicas = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3, 0, 1]]), experts=4, ranks=2)
    policy = RoutingPolicy(selection=TopP(p=0.5, k_max=3), capacity=Capacity(factor=1.0, drop="position"))
    full = route_operation(policy, with_replicas, tokens_G)
    assert (full.width, full.dynamic, full.capacity, full.replicas) == (3, True, "position", True)
    assert full.tokens_X.tolist() == [2, 1]


@st.composite
def routed(draw: st.DrawFn) -> tuple[list[Assignment], dict[str, Any]]:
    """Any step under any policy on any placement: two layers, and the arguments of `lower`."""
    ranks, experts = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    slots = ranks * draw(st.integers(-(-experts // ranks), experts + 1))
    width = draw(st.integers(1, experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    selection = draw(
        st.sampled_from([TopK(k=width), TopP(p=0.4, k_max=width), Skip(threshold=0.7, k_max=width)]),
    )
    capacity = draw(
        st.sampled_from([None, Capacity(factor=0.75), Capacity(factor=0.5, drop="position", scope="global")])
    )
    policy = RoutingPolicy(selection=selection, capacity=capacity)
    source_rank_T = np.sort(rng.integers(0, ranks, draw(st.integers(0, 24))))
    assignments = []
    for layer in range(2):
        logits_TE = rng.normal(size=(source_rank_T.size, experts)).astype(np.float32)
        candidates = Candidates.from_logits(logits_TE, source_rank_T)
        context = RouteContext(layer=layer, ranks=ranks, renormalise=True)
        assignments.append(policy.route(candidates, context, {})[0])
    algorithm = draw(st.sampled_from(["contiguous", "random", "lpt"]))
    return assignments, {
        "placement": place(algorithm, rng.random((2, experts)), ranks=ranks, slots=slots),
        "policy": policy,
        "source_rank_T": source_rank_T,
        "replica_choice": draw(st.sampled_from(["even", "local"])),
    }


@settings(max_examples=150, deadline=None)
@given(step=routed())
def test_every_kept_pair_is_computed_once(step: tuple[list[Assignment], dict[str, Any]]) -> None:
    assignments, arguments = step
    work = lower(TINY, assignments, **arguments)
    placement = arguments["placement"]
    for layer, assignment in enumerate(assignments):
        kept = int(assignment.kept_TK.sum())
        assert work.rows_LS[layer].sum() == work.pairs_LGG[layer].sum() == kept
        # By expert, by source rank, and by computing rank.
        by_expert_E = np.bincount(placement.slot_to_expert_LS[layer], work.rows_LS[layer], minlength=placement.experts)
        asked_E = np.bincount(assignment.ids_TK[assignment.kept_TK], minlength=placement.experts)
        np.testing.assert_array_equal(by_expert_E, asked_E)
        kept_T = assignment.kept_TK.sum(axis=1)
        sent_G = np.bincount(arguments["source_rank_T"], kept_T, minlength=placement.ranks)
        np.testing.assert_array_equal(work.pairs_LGG[layer].sum(axis=1), sent_G)
        np.testing.assert_array_equal(work.pairs_LGG[layer].sum(axis=0), work.rows_LGS[layer].sum(axis=1))
    assert work.tokens_G.sum() == arguments["source_rank_T"].size


@settings(max_examples=150, deadline=None)
@given(step=routed())
def test_sending_once_a_rank_never_sends_more(step: tuple[list[Assignment], dict[str, Any]]) -> None:
    assignments, arguments = step
    per_expert = lower(TINY, assignments, **arguments, protocol="per_expert").dispatch[0].bytes_LGG
    per_rank = lower(TINY, assignments, **arguments, protocol="per_rank").dispatch[0].bytes_LGG
    assert (per_rank <= per_expert).all()
    np.testing.assert_array_equal(per_rank > 0, per_expert > 0)
    tokens_G = np.bincount(arguments["source_rank_T"], minlength=arguments["placement"].ranks)
    assert (per_rank <= tokens_G[None, :, None] * TINY.row_bytes).all()  # no token twice to one rank

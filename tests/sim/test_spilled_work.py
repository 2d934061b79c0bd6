"""A spilling policy in the simulator: rows, weights and stages by hand, and against the same step without it."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorder import Recorder

from cost_models.kernels.token_traffic import bytes_between_ranks
from cost_models.ops import CountExchange, Experts, WeightTransfer
from router.assignment import Assignment
from router.candidates import Candidates
from router.context import RouteContext
from router.placement import place
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.policies.top_k import TopK
from router.spill import Spill
from sim.blocks import blocks_of
from sim.execution import Execution
from sim.layout import Layout
from sim.lower import PROTOCOLS, Work, lower
from traces.model import ModelSpec

# A row is 8 elements of 2 bytes; an expert is 3 * 8 * 16 elements of 2 bytes: 768 bytes.
TINY = ModelSpec(name="tiny", layers=2, experts=4, top_k=1, hidden=8, expert_hidden=16)
PLACEMENT = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), experts=4, ranks=2)
SPILL = RoutingPolicy(selection=TopK(k=1), capacity=Spill(factor=1.0, least_rows=1, guests=1))
FREE = RoutingPolicy(selection=TopK(k=1))
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


# Layer 0: six of eight rows for expert 0, two for expert 1, all on rank 0, so that four go: the last four of expert 0.
# Layer 1 is even.
LAYERS = [assigned([0, 0, 0, 1, 0, 0, 0, 1]), assigned([0, 1, 2, 3, 0, 1, 2, 3])]


def work_of(policy: RoutingPolicy, **options: Any) -> Work:
    return lower(TINY, LAYERS, PLACEMENT, policy=policy, source_rank_T=SOURCES, **options)


def test_rows_move_to_a_guest_place() -> None:
    work = work_of(SPILL)
    # Rank by rank: two slots and a guest place.
    assert work.rows_LS.tolist() == [[2, 2, 0, 0, 0, 4], [2, 2, 0, 2, 2, 0]]
    assert work.rows_LGS.tolist() == [[[2, 2, 0], [0, 0, 4]], [[2, 2, 0], [2, 2, 0]]]
    # Expert 0's queue is tokens 0, 1, 2 of rank 0 and 4, 5, 6 of rank 1: token 2 and all of rank 1's move.
    assert work.pairs_LGG[0].tolist() == [[3, 1], [1, 3]]
    assert bytes_between_ranks(work.exchange("dispatch"))[0].tolist() == [[48, 16], [16, 48]]
    assert work.experts_moved_LGG is not None
    assert work.experts_moved_LGG.tolist() == [[[0, 1], [0, 0]], [[0, 0], [0, 0]]]
    assert work_of(FREE).experts_moved_LGG is None


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_token_goes_once_to_the_rank_where_it_is_computed(protocol: Any) -> None:
    """Both of a token's experts are on rank 0; where only one of them moves, each rank gets a copy."""
    policy = RoutingPolicy(selection=TopK(k=2), capacity=Spill(factor=1.0, least_rows=1, guests=1))
    ids_TK = np.array([[0, 1]] * 4)
    both = Assignment(
        ids_TK=ids_TK,
        scores_TK=np.ones((4, 2)),
        weights_TK=np.ones((4, 2)),
        kept_TK=np.ones((4, 2), dtype=bool),
        rerouted_TK=np.zeros((4, 2), dtype=bool),
    )
    one_layer = Placement(slot_to_expert_LS=PLACEMENT.slot_to_expert_LS[:1], experts=4, ranks=2)
    work = lower(TINY, [both], one_layer, policy=policy, source_rank_T=np.zeros(4, dtype=int), protocol=protocol)
    # Eight rows, four of which stay: all of expert 0 moves.
    assert work.rows_LS.tolist() == [[0, 4, 0, 0, 0, 4]]
    assert work.copies_LGG.tolist() == [[[4, 4], [0, 0]]]
    assert bytes_between_ranks(work.exchange("dispatch"))[0, 0, 1] == 4 * 16


def test_weights_go_ahead_of_the_rows() -> None:
    costs = Recorder()
    (block,) = blocks_of(work_of(SPILL), costs, Execution(extent="moe"))
    names = [stage.name for stage in block.stages]
    assert names[:6] == ["gate", "route", "counts", "spill weights", "permute", "dispatch"]
    (weights,) = (operation for operation in costs.asked if type(operation) is WeightTransfer)
    assert weights.bytes_XGG.tolist() == [[[0, 768], [0, 0]], [[0, 0], [0, 0]]]
    (counts,) = (operation for operation in costs.asked if isinstance(operation, CountExchange))
    assert counts.bytes_XGG.tolist() == [[[32, 32], [32, 32]]]  # every rank learns the rows of all four slots
    (experts,) = (operation for operation in costs.asked if isinstance(operation, Experts))
    assert experts.rows_XS.tolist() == work_of(SPILL).rows_LGS.tolist()


def test_a_layer_in_which_nothing_moves_waits_for_no_weights() -> None:
    """Whatever an exchange of nothing would take."""
    costs = Recorder()
    (block,) = blocks_of(work_of(SPILL), costs, Execution(extent="moe"))
    (weights,) = (stage for stage in block.stages if stage.name == "spill weights")
    assert weights.stream == "communication"
    assert (weights.seconds_LG[0] > 0).all()
    assert weights.seconds_LG[1].tolist() == [0, 0]


def test_ranks_that_share_an_experts_width_send_their_shares() -> None:
    layout = Layout(node_of_G=np.zeros(4, dtype=np.int64), expert_tensor=2)
    sources = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    work = lower(TINY, LAYERS, PLACEMENT, policy=SPILL, source_rank_T=sources, layout=layout)
    assert work.rows_LGS[0].tolist() == [[2, 2, 0], [2, 2, 0], [0, 0, 4], [0, 0, 4]]
    assert work.experts_moved_LGG is not None
    assert work.experts_moved_LGG[0].tolist() == [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    costs = Recorder()
    blocks_of(work, costs, Execution(extent="moe"))
    (weights,) = (operation for operation in costs.asked if type(operation) is WeightTransfer)
    assert weights.bytes_XGG.sum() == 768


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    ranks=st.sampled_from([2, 4]),
    tokens=st.integers(0, 60),
    skew=st.sampled_from([0.0, 2.0]),
    least_rows=st.sampled_from([1, 4]),
    extra=st.sampled_from([0, 1]),
)
def test_experts_compute_the_rows_that_they_would(
    seed: int, ranks: int, tokens: int, skew: float, least_rows: int, extra: int
) -> None:
    rng = np.random.default_rng(seed)
    sources = np.sort(rng.integers(0, ranks, tokens))
    model = ModelSpec(name="some", layers=1, experts=8, top_k=2, hidden=8, expert_hidden=16)
    placement = place("lpt", rng.random((1, 8)), ranks=ranks, slots=8 + ranks * extra)
    logits_TE = rng.normal(size=(tokens, 8)) - skew * np.arange(8)
    candidates = Candidates.from_logits(logits_TE, sources)
    context = RouteContext(layer=0, ranks=ranks, renormalise=True)
    spill = Spill(factor=1.0, least_rows=least_rows, guests=2)
    works = [
        lower(
            model,
            [policy.route(candidates, context, {})[0]],
            placement,
            policy=policy,
            source_rank_T=sources,
        )
        for policy in (
            RoutingPolicy(selection=TopK(k=2), capacity=spill),
            RoutingPolicy(selection=TopK(k=2)),
        )
    ]
    spilled, free = works
    np.testing.assert_array_equal(spilled.sent_LG, free.sent_LG)
    assert spilled.rows_LS.sum() == free.rows_LS.sum()
    own_LGS = spilled.rows_LGS[:, :, : placement.slots_per_rank]
    assert (own_LGS <= free.rows_LGS).all()
    assert spilled.rows_LGS.sum(axis=2).max(initial=0) <= free.rows_LGS.sum(axis=2).max(initial=0)
    assert spilled.experts_moved_LGG is not None
    moved = int(spilled.rows_LGS[:, :, placement.slots_per_rank :].sum())
    assert moved >= least_rows * spilled.experts_moved_LGG.sum()
    assert (moved > 0) == (spilled.experts_moved_LGG.sum() > 0)

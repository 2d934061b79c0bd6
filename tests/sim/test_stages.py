"""What each stage asks the cost model: the operation, and its sizes by layer and rank, by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cost_models.ops import (
    AllToAll,
    Combine,
    CountExchange,
    DenseMlp,
    Experts,
    Gate,
    Operation,
    Permute,
    Prediction,
    Regroup,
    Route,
    TokenExchange,
)
from router.assignment import Assignment
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.policies.top_k import TopK
from sim.lower import lower
from sim.stages import Stage, stages_of
from traces.model import ModelSpec

COLLECTIVES = (AllToAll, TokenExchange)
TINY = ModelSpec(name="tiny", layers=1, experts=4, top_k=2, hidden=8, expert_hidden=16)


class Recorder:
    """Prices everything at a second, and remembers what it was asked."""

    name = "recorder"

    def __init__(self) -> None:
        self.asked: list[Operation] = []

    included: frozenset[type] = frozenset()

    def predict(self, operation: Operation) -> Prediction:
        self.asked.append(operation)
        return Prediction.unmeasured(np.ones(1) if isinstance(operation, COLLECTIVES) else np.ones((1, 2)))

    def seconds(self, operation: Operation) -> Any:
        return self.predict(operation).seconds_X


def asked_of(model: ModelSpec) -> tuple[list[Stage], dict[str, Operation]]:
    """The stages of three tokens, two of rank 0, and the operation that each was priced as.

    Kept pairs by source and computing rank: [[1, 2], [1, 0]]; the second and third token have a pair dropped.
    """
    kept = np.array([[True, True], [True, False], [True, False]])
    assignment = Assignment(
        ids_TK=np.array([[0, 2], [2, 3], [1, 0]]),
        scores_TK=kept.astype(np.float32),
        weights_TK=kept.astype(np.float32),
        kept_TK=kept,
    )
    placement = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3]]), experts=4, ranks=2)
    policy = RoutingPolicy(selection=TopK(k=2))
    costs = Recorder()
    work = lower(model, [assignment], placement, policy=policy, source_rank_T=np.array([0, 0, 1]))
    stages = stages_of(work, model, costs)
    # A stage is priced when it is made; regroup and ungroup are the same operation, priced twice.
    return stages, {stage.name: operation for stage, operation in zip(stages, costs.asked, strict=True)}


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
    assert dispatch.bytes_XGG is not None
    assert back.bytes_XGG is not None
    assert (dispatch.direction, back.direction) == ("dispatch", "combine")
    assert counts.bytes_XGG.tolist() == [[[16, 16], [16, 16]]]  # two slots a rank, 8 bytes each
    assert dispatch.bytes_XGG.tolist() == [[[16, 32], [16, 0]]]
    assert back.bytes_XGG.tolist() == [[[16, 16], [32, 0]]]


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
    assert stage.seconds_LG.tolist() == [[1, 1]]

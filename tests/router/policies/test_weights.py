"""Weights of a policy that leaves experts out: scaled over what it chose, or as the model was trained."""

from typing import Any

import numpy as np
import pytest
import torch

from router.candidates import Candidates
from router.capacity import Capacity
from router.context import RouteContext
from router.policies import RoutingPolicy
from router.policies.null_experts import NullExperts
from router.policies.top_k import TopK
from traces.errors import InputError

# Of four experts the model gives a token its best two.
PROBS_TC = np.array([[0.5, 0.25, 0.125, 0.125], [0.4, 0.4, 0.1, 0.1]], dtype=np.float32)
IDS_TC = np.array([[2, 0, 1, 3], [0, 1, 2, 3]])
BACKENDS = {"numpy": np.asarray, "torch": torch.as_tensor}


def weights_of(
    policy: RoutingPolicy, *, backend: str = "numpy", top_k: int = 2, **candidates: Any
) -> list[list[float]]:
    array = BACKENDS[backend]
    offered = Candidates(
        ids_TC=array(IDS_TC),
        probs_TC=array(PROBS_TC),
        source_rank_T=array(np.zeros(2, dtype=np.int64)),
        experts=candidates.get("experts", 4),
        null_experts=candidates.get("null_experts", 0),
        score_kind="softmax",
    )
    context = RouteContext(layer=0, ranks=1, renormalise=True, top_k=top_k)
    return np.round(np.asarray(policy.route(offered, context, {})[0].weights_TK), 4).tolist()


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_skipped_experts_weight_goes_to_the_others_or_to_nobody(backend: str) -> None:
    top_1 = TopK(k=1)
    assert weights_of(RoutingPolicy(selection=top_1), backend=backend) == [[1.0], [1.0]]
    # .5 of .5 + .25, and .4 of .4 + .4.
    trained = weights_of(RoutingPolicy(selection=top_1, weights="trained"), backend=backend)
    assert trained == pytest.approx(np.array([[0.6667], [0.5]]))


def test_at_the_models_own_top_k_they_are_the_same() -> None:
    own = TopK(k=2)
    assert weights_of(RoutingPolicy(selection=own, weights="trained")) == weights_of(RoutingPolicy(selection=own))


def test_a_rerouted_pair_weighs_its_own_score_over_the_trained_sum() -> None:
    # Both tokens want expert 0; C = ceil(2 * 2 / 4 * .5) = 1 place each. Token 1 holds it with the larger weight,
    # .5 against .3333, so that token 0 goes on to expert 1, where token 1 is, and to expert 3: .125 of .75.
    policy = RoutingPolicy(
        selection=TopK(k=2), capacity=Capacity(factor=0.5, reroute="any", scope="global"), weights="trained"
    )
    assert weights_of(policy) == pytest.approx(np.array([[0.6667, 0.1667], [0.5, 0.5]]), abs=1e-4)


def test_null_experts_take_no_part_in_the_trained_sum() -> None:
    # Expert 3 is null, and so is 2: token 0's best is null, and its real expert 0 weighs .25 of .25.
    policy = RoutingPolicy(selection=NullExperts(k=2), weights="trained")
    assert weights_of(policy, experts=2, null_experts=2)[0] == [1.0, 0.0]


def test_a_context_must_know_the_models_top_k() -> None:
    with pytest.raises(InputError, match="weights trained needs the model's own top k"):
        weights_of(RoutingPolicy(selection=TopK(k=1), weights="trained"), top_k=0)


def test_scores_that_are_not_scaled_stay() -> None:
    candidates = Candidates(
        ids_TC=IDS_TC, probs_TC=PROBS_TC, source_rank_T=np.zeros(2, dtype=np.int64), experts=4, score_kind="softmax"
    )
    context = RouteContext(layer=0, ranks=1, renormalise=False, top_k=2)
    policy = RoutingPolicy(selection=TopK(k=1), weights="trained")
    assert policy.route(candidates, context, {})[0].weights_TK.tolist() == [[0.5], pytest.approx([0.4])]

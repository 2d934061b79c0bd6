"""Each selection on scores that a person can follow, on both backends."""

from typing import Any

import numpy as np
import pytest
import torch

from router.assignment import UNUSED
from router.backends import topk
from router.candidates import Candidates
from router.context import RouteContext, State
from router.history import RoutingHistory
from router.policies import RoutingPolicy
from router.policies.balance_bias import BalanceBias
from router.policies.base import Selection
from router.policies.expert_choice import ExpertChoice
from router.policies.group_limited import GroupLimited
from router.policies.null_experts import NullExperts
from router.policies.partners import Partners, partners_of
from router.policies.skip_by_ratio import SkipByRatio
from router.policies.top_k_by_layer import TopKByLayer
from traces.errors import InputError

BACKENDS = {"numpy": np.asarray, "torch": lambda array: torch.as_tensor(np.array(array))}
every_backend = pytest.mark.parametrize("backend", sorted(BACKENDS))


def candidates_of(scores_TE: list[list[float]], backend: str, *, nulls: int = 0) -> Candidates:
    scores_TC, ids_TC = topk(np.array(scores_TE, dtype=np.float32), len(scores_TE[0]))
    array = BACKENDS[backend]
    return Candidates(
        ids_TC=array(ids_TC),
        probs_TC=array(scores_TC),
        source_rank_T=array(np.zeros(len(scores_TE), dtype=np.int64)),
        experts=len(scores_TE[0]) - nulls,
        score_kind="softmax",
        null_experts=nulls,
    )


def history_of(**changes: Any) -> RoutingHistory:
    fields = {
        "together_LEE": np.zeros((2, 4, 4), dtype=np.int64),
        "ratio_LQ": np.zeros((2, 101)),
        "output_error_LK": np.array([[0.5, 0.0], [0.5, 0.0]]),
    }
    return RoutingHistory(**{**fields, **changes})


def chosen(
    selection: Selection,
    candidates: Candidates,
    *,
    layer: int = 0,
    history: RoutingHistory | None = None,
    state: State | None = None,
) -> tuple[list[list[int]], State]:
    """The experts of each token, and the selection's own state."""
    context = RouteContext(layer=layer, ranks=1, renormalise=True, history=history)
    assignment, next_state = RoutingPolicy(selection=selection).route(
        candidates, context, {"selection": state} if state else {}
    )
    used = [[expert for expert in ids_K if expert != UNUSED] for ids_K in assignment.ids_TK.tolist()]
    return used, next_state.get("selection", {})


@every_backend
def test_a_budget_goes_to_the_layers_that_need_it(backend: str) -> None:
    # Two layers share 4 experts. Layer 0 needs its second one (0.9 to 0.1), layer 1 hardly does (0.2 to 0.1):
    # k = (3, 1) leaves 0.0 + 0.2, (2, 2) leaves 0.1 + 0.1, (1, 3) leaves 0.9 + 0.0. Equal sums: fewer in layer 1.
    history = history_of(output_error_LK=np.array([[0.9, 0.125, 0.0], [0.25, 0.125, 0.0]]))
    policy = TopKByLayer(mean_k=2.0, k_max=3)
    candidates = candidates_of([[0.4, 0.3, 0.2, 0.1]], backend)
    assert chosen(policy, candidates, layer=0, history=history)[0] == [[0, 1, 2]]
    assert chosen(policy, candidates, layer=1, history=history)[0] == [[0]]
    # One expert less: (2, 1) leaves 0.125 + 0.25, (1, 2) leaves 0.9 + 0.125.
    smaller = TopKByLayer(mean_k=1.5, k_max=3)
    assert chosen(smaller, candidates, layer=0, history=history)[0] == [[0, 1]]
    assert chosen(smaller, candidates, layer=1, history=history)[0] == [[0]]


@every_backend
def test_each_layer_skips_by_its_own_median(backend: str) -> None:
    # Ratios of the second score to the best run evenly from 0 to 1 in layer 0, from 0.8 to 1 in layer 1.
    history = history_of(ratio_LQ=np.stack([np.linspace(0, 1, 101), np.linspace(0.8, 1, 101)]))
    candidates = candidates_of([[0.4, 0.3, 0.2, 0.1], [0.1, 0.5, 0.2, 0.2]], backend)
    median = SkipByRatio(quantile=0.5, k_max=4)
    # Layer 0: beta = 0.5. 0.3 and 0.2 are at least half of 0.4, 0.1 is not; 0.2 is not half of 0.5.
    assert chosen(median, candidates, layer=0, history=history)[0] == [[0, 1, 2], [1]]
    # Layer 1: beta = 0.9.
    assert chosen(median, candidates, layer=1, history=history)[0] == [[0], [1]]
    assert chosen(SkipByRatio(quantile=0.2, k_max=2), candidates, history=history)[0] == [[0, 1], [1, 2]]


@every_backend
def test_null_experts_take_places_and_no_work(backend: str) -> None:
    # Experts 0 and 1 are real, 2 and 3 null. The second token's two best are null.
    candidates = candidates_of([[0.4, 0.1, 0.3, 0.2], [0.1, 0.1, 0.3, 0.5], [0.5, 0.3, 0.1, 0.1]], backend, nulls=2)
    assert chosen(NullExperts(k=2), candidates)[0] == [[0], [], [0, 1]]
    assignment, _ = RoutingPolicy(selection=NullExperts(k=2)).route(
        candidates, RouteContext(layer=0, ranks=1, renormalise=True), {}
    )
    np.testing.assert_allclose(np.asarray(assignment.weights_TK), [[1, 0], [0, 0], [0.625, 0.375]], atol=1e-6)
    np.testing.assert_allclose(np.asarray(assignment.null_weights_TN), [[0.3, 0], [0.3, 0.5], [0, 0]], atol=1e-6)


@every_backend
def test_a_bias_moves_tokens_to_idle_experts(backend: str) -> None:
    # All three tokens like expert 0 best, one with 1 close behind, one with 2.
    candidates = candidates_of([[0.5, 0.375, 0.125], [0.625, 0.125, 0.25], [0.75, 0.125, 0.125]], backend)
    policy = BalanceBias(k=1, rate=0.0625)
    used, state = chosen(policy, candidates)
    # Loads 3, 0, 0 against a mean of 1: -u, +u, +u. The first gap of 0.125 is then closed: the larger score wins.
    assert (used, state["bias_E"].tolist()) == ([[0], [0], [0]], [-0.0625, 0.0625, 0.0625])
    used, state = chosen(policy, candidates, state=state)
    assert (used, state["bias_E"].tolist()) == ([[0], [0], [0]], [-0.125, 0.125, 0.125])
    # 0.5 - 0.125 < 0.375 + 0.125; 0.625 - 0.125 > 0.25 + 0.125. Loads 2, 1, 0: -u, 0, +u.
    used, state = chosen(policy, candidates, state=state)
    assert (used, state["bias_E"].tolist()) == ([[1], [0], [0]], [-0.1875, 0.125, 0.1875])
    # 0.625 - 0.1875 = 0.25 + 0.1875: equal, and the larger score wins once more; loads 2, 1, 0 again.
    used, state = chosen(policy, candidates, state=state)
    assert (used, state["bias_E"].tolist()) == ([[1], [0], [0]], [-0.25, 0.125, 0.25])
    # 0.625 - 0.25 < 0.25 + 0.25: one token each, and the biases stay.
    used, settled = chosen(policy, candidates, state=state)
    assert (used, settled["bias_E"].tolist()) == ([[1], [2], [0]], [-0.25, 0.125, 0.25])


@every_backend
def test_weights_know_nothing_of_the_bias(backend: str) -> None:
    candidates = candidates_of([[0.5, 0.375, 0.125]], backend)
    state = {"selection": {"bias_E": BACKENDS[backend](np.array([-1.0, 0.0, 0.0]))}}
    assignment, _ = RoutingPolicy(selection=BalanceBias(k=2)).route(
        candidates, RouteContext(layer=0, ranks=1, renormalise=True), state
    )
    assert assignment.ids_TK.tolist() == [[1, 2]]
    assert assignment.weights_TK.tolist() == [[0.75, 0.25]]  # 0.375 and 0.125 of 0.5


@every_backend
def test_groups_count_by_their_best_together(backend: str) -> None:
    # Groups {0,1} {2,3} {4,5}; k = 2 in one group: a group counts its best 2. 0.30 + 0.02 < 0.22 + 0.2 > 0.16 + 0.1.
    scores = [[0.30, 0.02, 0.22, 0.20, 0.16, 0.10]]
    assert chosen(GroupLimited(k=2, groups=3, kept_groups=1), candidates_of(scores, backend))[0] == [[2, 3]]
    # Two groups kept: each counts its best 1, so that {0,1} and {2,3} stay, and the best three of these are used.
    assert chosen(GroupLimited(k=3, groups=3, kept_groups=2), candidates_of(scores, backend))[0] == [[0, 2, 3]]
    # Equal groups: the lower ones.
    even = candidates_of([[0.25, 0.25, 0.25, 0.25]], backend)
    assert chosen(GroupLimited(k=2, groups=2, kept_groups=1), even)[0] == [[0, 1]]
    # All groups kept is top-k.
    assert chosen(GroupLimited(k=3, groups=3, kept_groups=3), candidates_of(scores, backend))[0] == [[0, 2, 3]]


def test_groups_that_cannot_be_are_refused_with_the_mend() -> None:
    candidates = candidates_of([[0.3, 0.02, 0.22, 0.2, 0.16, 0.1]], "numpy")
    with pytest.raises(InputError, match=r"groups is 4, which does not divide the 6 experts; use one of 1, 2, 3, 6$"):
        GroupLimited(k=2, groups=4, kept_groups=1).check(candidates)
    with pytest.raises(InputError, match=r"k is 5, but 2 groups hold 4 experts; keep at least 3 groups$"):
        GroupLimited(k=5, groups=3, kept_groups=2).check(candidates)
    with pytest.raises(InputError, match=r"kept_groups is 3 of 2 groups; keep at most these$"):
        GroupLimited(k=2, groups=2, kept_groups=3)


# Experts over tokens, which score highest: 0 by tokens 0, 2; 1 by tokens 1, 3 (as 0 does, but later); 2 by 3 and 0.
FOUR_TOKENS = [[0.5, 0.2, 0.25], [0.25, 0.5, 0.125], [0.375, 0.25, 0.125], [0.125, 0.5, 0.375]]


@every_backend
def test_experts_take_their_best_tokens(backend: str) -> None:
    # factor 1.5 of 4 tokens over 3 experts: C = 2.
    candidates = candidates_of(FOUR_TOKENS, backend)
    used, state = chosen(ExpertChoice(factor=1.5, k_max=3, mode="batch"), candidates)
    assert used == [[0, 2], [1], [0], [1, 2]]
    assert state == {}
    # A token that two took keeps its best, and nobody fills the place.
    assert chosen(ExpertChoice(factor=1.5, k_max=1, mode="batch"), candidates)[0] == [[0], [1], [0], [1]]
    # factor 0.75: C = 1. Tokens 1 and 3 score the same for expert 1: the earlier. Token 2 is left alone.
    assert chosen(ExpertChoice(factor=0.75, k_max=3, mode="batch"), candidates)[0] == [[0], [1], [], [2]]
    # Ten experts a token of three: everybody takes everything.
    everything = chosen(ExpertChoice(factor=10.0, k_max=3, mode="batch"), candidates)[0]
    assert [sorted(ids) for ids in everything] == [[0, 1, 2]] * 4


@every_backend
def test_running_thresholds_follow_a_tenth_of_the_way(backend: str) -> None:
    policy = ExpertChoice(factor=1.5, k_max=3, mode="threshold")
    used, state = chosen(policy, candidates_of(FOUR_TOKENS, backend))
    # The second best scores of the first step: 0.375, 0.5, 0.25.
    assert used == [[0, 2], [1], [0], [1, 2]]
    np.testing.assert_allclose(state["threshold_E"].tolist(), [0.375, 0.5, 0.25], rtol=1e-12)
    # A step of other scores meets those thresholds whatever else it holds; C = 1.5 * 2 / 3 = 1.
    used, state = chosen(policy, candidates_of([[0.375, 0.25, 0.375], [0.25, 0.25, 0.5]], backend), state=state)
    assert used == [[0, 2], [2]]
    np.testing.assert_allclose(state["threshold_E"].tolist(), [0.375, 0.475, 0.275], rtol=1e-12)


@every_backend
def test_a_token_keeps_to_the_partners_of_its_best(backend: str) -> None:
    together_EE = np.array([[9, 5, 1, 3], [5, 9, 0, 5], [1, 0, 4, 0], [3, 5, 0, 8]])
    history = history_of(together_LEE=np.stack([np.zeros_like(together_EE), together_EE]))
    candidates = candidates_of([[0.4, 0.1, 0.3, 0.2], [0.1, 0.5, 0.25, 0.15], [0.1, 0.3, 0.4, 0.2]], backend)
    # Two partners: of 0 they are 1 and 3; of 1 they are 0 and 3; of 2 only 0 was ever used with it.
    one_more = chosen(Partners(k=2, partners=2), candidates, layer=1, history=history)[0]
    assert one_more == [[0, 3], [1, 3], [2, 0]]
    two_more = chosen(Partners(k=3, partners=2), candidates, layer=1, history=history)[0]
    assert two_more == [[0, 3, 1], [1, 3, 0], [2, 0]]
    # One partner, the lower of equal ones: of 1 it is 0, not 3.
    assert chosen(Partners(k=3, partners=1), candidates, layer=1, history=history)[0] == [[0, 1], [1, 0], [2, 0]]
    # Layer 0 has seen nobody together.
    assert chosen(Partners(k=3, partners=2), candidates, layer=0, history=history)[0] == [[0], [1], [2]]


def test_partners_of_another_model_are_refused() -> None:
    with pytest.raises(InputError, match=r"earlier traffic is of 4 experts, the candidates are of 3; give that"):
        chosen(Partners(k=2, partners=2), candidates_of([[0.5, 0.3, 0.2]], "numpy"), history=history_of())


def test_partners_change_with_the_traffic_in_place() -> None:
    """What was worked out from one history is not given for another that lies in the same memory."""
    history = history_of()
    candidates = candidates_of([[0.4, 0.3, 0.2, 0.1]], "numpy")
    for partner in (1, 2, 3):
        history.together_LEE[:] = 0
        history.together_LEE[0, 0, partner] = 7
        assert chosen(Partners(k=2, partners=1), candidates, history=history)[0] == [[0, partner]]
    assert not partners_of(np.zeros((3, 3), dtype=np.int64), 2).any()

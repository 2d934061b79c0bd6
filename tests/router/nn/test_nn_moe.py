from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from torch.utils.flop_counter import FlopCounterMode

from router.assignment import UNUSED, Assignment
from router.candidates import Candidates
from router.capacity import Capacity
from router.context import RouteContext
from router.nn import moe
from router.nn.lm import LanguageModel, LanguageModelConfig
from router.nn.moe import MoELayer, TrainingRule
from router.policies import RoutingPolicy
from router.policies.top_k import TopK
from router.policies.top_p import TopP

TOKENS, D, F, E, K = 48, 16, 24, 8, 3
CONTEXT = RouteContext(layer=0, ranks=1, renormalise=True)
RANK_T = torch.zeros(TOKENS, dtype=torch.int64)
LAYERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"gate_kind": "sigmoid"},
    "not renormalised": {"renormalise": False},
    "sigmoid, not renormalised": {"gate_kind": "sigmoid", "renormalise": False},
    "shared": {"shared_experts": 2},
    "zero": {"null_experts": 4},
    "copy": {"null_experts": 4, "null_kind": "copy"},
    "constant": {"null_experts": 4, "null_kind": "constant", "renormalise": False},
    "mixed": {"null_experts": 4, "null_kind": "mixed"},
    "all of it": {"gate_kind": "sigmoid", "shared_experts": 1, "null_experts": 5, "null_kind": "mixed"},
}
every_layer = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())


def make(**options: Any) -> MoELayer:
    torch.manual_seed(1)
    return MoELayer(hidden=D, expert_hidden=F, experts=E, **options)


@pytest.fixture
def layer() -> MoELayer:
    return make()


@pytest.fixture
def x_TD() -> Tensor:
    return torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(2))


def swiglu(w_gate_FD: Tensor, w_up_FD: Tensor, w_down_DF: Tensor, x_D: Tensor) -> Tensor:
    out_D: Tensor = w_down_DF @ (silu(w_gate_FD @ x_D) * (w_up_FD @ x_D))
    return out_D


def expert(layer: MoELayer, number: int, x_D: Tensor) -> Tensor:
    return swiglu(layer.w_gate_EFD[number], layer.w_up_EFD[number], layer.w_down_EDF[number], x_D)


def null_expert(layer: MoELayer, number: int, x_D: Tensor) -> Tensor:
    assert layer.null is not None
    if number in layer.null.copies:
        return x_D
    if number not in layer.null.constants:
        return torch.zeros_like(x_D)
    assert layer.null.w_mix_X2D is not None
    assert layer.null.constant_XD is not None
    place = layer.null.constants.index(number)
    own, constant = torch.softmax(layer.null.w_mix_X2D[place] @ x_D, dim=0)
    return own * x_D + constant * layer.null.constant_XD[place]


def dense(layer: MoELayer, x_TD: Tensor, k: int) -> Tensor:
    """Token by token, in words that anyone can check: the k best, real or null, and the shared experts one by one."""
    logits_TX = layer.gate(x_TD)
    score_TX = torch.softmax(logits_TX, dim=-1) if layer.gate_kind == "softmax" else torch.sigmoid(logits_TX)
    out_TD = torch.zeros_like(x_TD)
    for token, score_X in enumerate(score_TX):
        best = sorted(range(len(score_X)), key=lambda expert: -float(score_X[expert]))[:k]
        real = [number for number in best if number < E]
        scale = score_X[real].sum() if layer.renormalise else 1.0
        for number in real:
            out_TD[token] += score_X[number] / scale * expert(layer, number, x_TD[token])
        for number in best:
            if number >= E:
                out_TD[token] += score_X[number] * null_expert(layer, number - E, x_TD[token])
        if layer.shared is not None:
            w_gate, w_up, w_down = (weight.detach() for weight in layer.shared.parameters())
            for first in range(0, len(w_gate), F):
                part = slice(first, first + F)
                out_TD[token] += swiglu(w_gate[part], w_up[part], w_down[:, part], x_TD[token])
    return out_TD


@every_layer
@torch.no_grad()
def test_the_deployed_path_equals_the_dense_computation(options: dict[str, Any], x_TD: Tensor) -> None:
    layer = make(**options)
    context = replace(CONTEXT, renormalise=layer.renormalise)
    out_TD, assignment, _ = layer.routed(x_TD, RoutingPolicy(selection=TopK(k=K)), context, RANK_T, {})
    torch.testing.assert_close(out_TD, dense(layer, x_TD, K), atol=1e-5, rtol=1e-5)
    assert torch.equal(assignment.kept_TK, assignment.ids_TK != UNUSED)
    assert bool(assignment.kept_TK.all()) == (layer.null is None)


@every_layer
@torch.no_grad()
def test_the_training_path_equals_it_while_nothing_overflows(options: dict[str, Any], x_TD: Tensor) -> None:
    layer = make(**options)
    every = E + layer.null_experts
    out_TD, _ = layer(x_TD, TrainingRule(top_k=K, capacity_factor=every / K))
    torch.testing.assert_close(out_TD, dense(layer, x_TD, K), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_null_kinds_take_turns() -> None:
    mixed = make(null_experts=5, null_kind="mixed").null
    assert mixed is not None
    assert (mixed.copies, mixed.constants) == ([1, 4], [2])


@torch.no_grad()
def test_null_experts_by_hand() -> None:
    null = moe.NullExperts(hidden=2, experts=3, kind="mixed")
    assert null.w_mix_X2D is not None
    assert null.constant_XD is not None
    null.w_mix_X2D.zero_()  # softmax(0, 0): half the token, half the vector
    null.constant_XD.copy_(torch.tensor([[10.0, 20.0]]))
    out_TD = null(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.25, 0.125]]))
    # Zero: nothing. Copy: .25 of (1, 2). Constant: .125 of (.5 + 5, 1 + 10).
    assert out_TD.tolist() == [[0.25 + 0.6875, 0.5 + 1.375]]


@torch.no_grad()
def test_a_token_with_null_experts_alone_does_no_expert_work(x_TD: Tensor) -> None:
    layer = make(null_experts=K, null_kind="copy")
    layer.gate.weight.zero_()
    layer.gate.weight[E:, 0] = 1000.0
    x_TD[:, 0] = 1.0
    out_TD, assignment, _ = layer.routed(x_TD, RoutingPolicy(selection=TopK(k=K)), CONTEXT, RANK_T, {})
    assert not bool(assignment.chosen_TK.any())
    torch.testing.assert_close(out_TD, x_TD)  # three copies, a third of the score each
    trained_TD, _ = layer(x_TD, TrainingRule(top_k=K))
    torch.testing.assert_close(trained_TD, x_TD)


@torch.no_grad()
def test_training_drops_the_last_choices_first(layer: MoELayer, x_TD: Tensor) -> None:
    # Capacity ceil(48 / 8 * 3 * 0.1) = 2 rows an expert: a token without a kept pair comes out as zero.
    layer.gate.weight.zero_()  # all gates equal: every token chooses the same experts
    out_TD, _ = layer(x_TD, TrainingRule(top_k=K, capacity_factor=0.1))
    assert bool(out_TD[:2].any(dim=-1).all())
    assert not bool(out_TD[2:].any())


@every_layer
def test_a_uniform_gate_has_balance_loss_equal_to_its_factor(options: dict[str, Any], x_TD: Tensor) -> None:
    # f_e sums to 1 and P_e is 1 / E: balance * E * sum(f_e / E) = balance.
    layer = make(**options)
    with torch.no_grad():
        layer.gate.weight.zero_()
    _, loss = layer(x_TD, TrainingRule(top_k=K, balance=0.25))
    assert loss.item() == pytest.approx(0.25)


def test_null_experts_are_balanced_as_one_group() -> None:
    # One token, one expert and two null ones, k = 1. With scores 1/2, 1/3, 1/6 the expert wins, f = 1, 0, 0
    # and the loss is 3 * 1/2. Where a null one wins, f = 0, 1/2, 1/2 whichever it is: 3 * 1/2 * (1/2 + 1/6) = 1.
    for scores, loss_expected in (((3, 2, 1), 1.5), ((2, 3, 1), 1.0), ((2, 1, 3), 1.0)):
        layer = MoELayer(hidden=1, expert_hidden=1, experts=1, null_experts=2)
        with torch.no_grad():
            layer.gate.weight.copy_(torch.tensor(scores).float().log()[:, None])
        _, loss = layer(torch.ones(1, 1), TrainingRule(top_k=1, balance=1.0))
        assert loss.item() == pytest.approx(loss_expected)


@every_layer
def test_every_weight_gets_a_gradient(options: dict[str, Any], x_TD: Tensor) -> None:
    layer = make(**options)
    out_TD, loss = layer(x_TD, TrainingRule(top_k=K))
    (out_TD.square().sum() + loss).backward()
    for weight in layer.parameters():
        assert weight.grad is not None
        assert bool(weight.grad.flatten(1).any(dim=1).all())


def test_experts_nobody_chose_do_no_work(layer: MoELayer, x_TD: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        for weight in (layer.w_gate_EFD, layer.w_up_EFD, layer.w_down_EDF):
            weight[E // 2 :] = torch.nan  # touching these experts would show
        layer.gate.weight[:, 0] = torch.where(torch.arange(E) < E // 2, 1000.0, -1000.0)
        x_TD[:, 0] = 1.0
    computed = []
    original = moe.expert_mlp

    def counting(rows_ND: Tensor, counts: list[int], *weights: Tensor) -> Tensor:
        computed.append((len(rows_ND), counts))
        return original(rows_ND, counts, *weights)

    monkeypatch.setattr(moe, "expert_mlp", counting)
    policy = RoutingPolicy(selection=TopP(p=0.6, k_max=K), capacity=Capacity(factor=1.0))
    out_TD, assignment, _ = layer.routed(x_TD, policy, CONTEXT, RANK_T, {})
    assert bool(out_TD.isfinite().all())
    kept = int(assignment.kept_TK.sum())
    assert kept < TOKENS * K
    ((rows, counts),) = computed
    assert rows == kept == sum(counts)
    assert counts[E // 2 :] == [0] * (E // 2)


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("null_experts", [0, 4])
def test_the_spec_counts_the_operations_that_run(x_TD: Tensor, k: int, null_experts: int) -> None:
    config = LanguageModelConfig(
        hidden=D, layers=1, experts=E, expert_hidden=F, shared_experts=1, null_experts=null_experts
    )
    model = LanguageModel(config)
    (layer,) = model.moe_layers
    with FlopCounterMode(display=False) as counter:
        _, assignment, _ = layer.routed(x_TD, RoutingPolicy(selection=TopK(k=k)), CONTEXT, RANK_T, {})
    gate = 2 * TOKENS * D * (E + null_experts)
    used = int(assignment.kept_TK.sum()) / TOKENS
    spec = model.spec()
    assert counter.get_total_flops() - gate == pytest.approx(TOKENS * spec.flops_per_token(used))
    if not null_experts:  # sparse and dense: k of 8 experts and the shared one, a multiply-add is two
        assert spec.flops_per_token(used) == 2 * (k + 1) * 3 * D * F
        assert spec.flops_per_token(E) == 2 * (8 + 1) * 3 * D * F
    else:
        assert used < k


@torch.no_grad()
def test_the_active_experts_change_from_step_to_step_with_nothing_rebuilt(layer: MoELayer) -> None:
    before = [(weight.data_ptr(), weight.clone()) for weight in layer.parameters()]
    random = torch.Generator().manual_seed(5)
    active = []
    for k in (1, 3, 2, 5):
        x_TD = torch.randn(4, D, generator=random)
        out_TD, assignment, _ = layer.routed(x_TD, RoutingPolicy(selection=TopK(k=k)), CONTEXT, RANK_T[:4], {})
        torch.testing.assert_close(out_TD, dense(layer, x_TD, k), atol=1e-5, rtol=1e-5)
        active.append(tuple(assignment.ids_TK.unique().tolist()))
    assert len(set(active)) == 4
    for (address, values), weight in zip(before, layer.parameters(), strict=True):
        assert weight.data_ptr() == address
        assert torch.equal(weight, values)


@torch.no_grad()
@pytest.mark.parametrize("shared_experts", [0, 1])
def test_dropped_pairs_give_nothing(x_TD: Tensor, shared_experts: int) -> None:
    layer = make(shared_experts=shared_experts)
    policy = RoutingPolicy(selection=TopK(k=K), capacity=Capacity(factor=0.25))
    out_TD, assignment, _ = layer.routed(x_TD, policy, CONTEXT, RANK_T, {})
    gone_T = ~assignment.kept_TK.any(dim=1)
    some_T = assignment.kept_TK.any(dim=1) & assignment.dropped_TK.any(dim=1)
    assert bool(gone_T.any())
    assert bool(some_T.any())
    expected_TD = torch.zeros_like(x_TD) if layer.shared is None else layer.shared(x_TD)
    torch.testing.assert_close(out_TD[gone_T], expected_TD[gone_T])
    for token in some_T.nonzero()[:, 0].tolist():
        for column in assignment.kept_TK[token].nonzero()[:, 0].tolist():
            given_D = expert(layer, int(assignment.ids_TK[token, column]), x_TD[token])
            expected_TD[token] += assignment.weights_TK[token, column] * given_D
    torch.testing.assert_close(out_TD[some_T], expected_TD[some_T], atol=1e-5, rtol=1e-5)


@dataclass(frozen=True, slots=True, kw_only=True)
class LastChoiceMoves(Capacity):
    """Sends the last pair of every token to its next candidate."""

    name: ClassVar[str] = "last choice moves"

    def limit(self, assignment: Assignment, candidates: Candidates, context: RouteContext) -> Assignment:
        ids_TK, scores_TK = assignment.ids_TK.clone(), assignment.scores_TK.clone()
        ids_TK[:, -1], scores_TK[:, -1] = candidates.ids_TC[:, K], candidates.probs_TC[:, K]
        moved_TK = torch.zeros_like(assignment.kept_TK)
        moved_TK[:, -1] = True
        return replace(assignment, ids_TK=ids_TK, scores_TK=scores_TK, rerouted_TK=moved_TK)


@torch.no_grad()
def test_rerouted_pairs_are_computed_by_their_new_expert(layer: MoELayer, x_TD: Tensor) -> None:
    policy = RoutingPolicy(selection=TopK(k=K), capacity=LastChoiceMoves(factor=1.0))
    out_TD, assignment, _ = layer.routed(x_TD, policy, CONTEXT, RANK_T, {})
    best_TC = torch.topk(layer.gate(x_TD), K + 1).indices
    assert torch.equal(assignment.ids_TK, best_TC[:, [0, 1, 3]])
    expected_TD = torch.zeros_like(x_TD)
    for token in range(TOKENS):
        for column in range(K):
            given_D = expert(layer, int(assignment.ids_TK[token, column]), x_TD[token])
            expected_TD[token] += assignment.weights_TK[token, column] * given_D
    torch.testing.assert_close(out_TD, expected_TD, atol=1e-5, rtol=1e-5)

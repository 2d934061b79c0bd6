import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from router.capacity import Capacity
from router.context import RouteContext
from router.nn import moe
from router.nn.moe import MoELayer, TrainingRule
from router.policies import RoutingPolicy
from router.policies.top_k import TopK
from router.policies.top_p import TopP

TOKENS, D, F, E, K = 48, 16, 24, 8, 3
CONTEXT = RouteContext(layer=0, ranks=1, renormalise=True)
RANK_T = torch.zeros(TOKENS, dtype=torch.int64)


@pytest.fixture
def layer() -> MoELayer:
    torch.manual_seed(1)
    return MoELayer(hidden=D, expert_hidden=F, experts=E)


@pytest.fixture
def x_TD() -> Tensor:
    return torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(2))


def dense(layer: MoELayer, x_TD: Tensor, k: int) -> Tensor:
    """Every expert on every token, weighted by the renormalised k best gates, token by token."""
    probs_TE = torch.softmax(layer.gate(x_TD), dim=-1)
    out_TD = torch.zeros_like(x_TD)
    for token, probs_E in enumerate(probs_TE):
        best = sorted(range(E), key=lambda expert: -float(probs_E[expert]))[:k]
        for expert in best:
            inner_F = silu(layer.w_gate_EFD[expert] @ x_TD[token]) * (layer.w_up_EFD[expert] @ x_TD[token])
            out_TD[token] += probs_E[expert] / probs_E[best].sum() * (layer.w_down_EDF[expert] @ inner_F)
    return out_TD


@torch.no_grad()
def test_the_deployed_path_equals_the_dense_computation(layer: MoELayer, x_TD: Tensor) -> None:
    policy = RoutingPolicy(selection=TopK(k=K))
    out_TD, assignment, _ = layer.routed(x_TD, policy, CONTEXT, RANK_T, {})
    assert bool(assignment.kept_TK.all())
    torch.testing.assert_close(out_TD, dense(layer, x_TD, K), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_training_path_equals_it_while_nothing_overflows(layer: MoELayer, x_TD: Tensor) -> None:
    out_TD, _ = layer(x_TD, TrainingRule(top_k=K, capacity_factor=E / K))
    torch.testing.assert_close(out_TD, dense(layer, x_TD, K), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_training_drops_the_last_choices_first(layer: MoELayer, x_TD: Tensor) -> None:
    # Capacity ceil(48 / 8 * 3 * 0.1) = 2 rows an expert: a token without a kept pair comes out as zero.
    layer.gate.weight.zero_()  # all gates equal: every token chooses the same experts
    out_TD, _ = layer(x_TD, TrainingRule(top_k=K, capacity_factor=0.1))
    assert bool(out_TD[:2].any(dim=-1).all())
    assert not bool(out_TD[2:].any())


def test_a_uniform_gate_has_balance_loss_equal_to_its_factor(layer: MoELayer, x_TD: Tensor) -> None:
    # f_e sums to 1 and P_e is 1 / E: balance * E * sum(f_e / E) = balance.
    with torch.no_grad():
        layer.gate.weight.zero_()
    _, loss = layer(x_TD, TrainingRule(top_k=K, balance=0.25))
    assert loss.item() == pytest.approx(0.25)


def test_every_weight_gets_a_gradient(layer: MoELayer, x_TD: Tensor) -> None:
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

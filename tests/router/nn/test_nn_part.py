from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.nn.evaluate import held_out_loss
from router.nn.lm import LanguageModel, LanguageModelConfig
from router.nn.moe import MoELayer, TrainingRule
from router.nn.store import TrainedModel
from router.policies import RoutingPolicy
from router.policies.opportunistic import Opportunistic
from router.policies.top_k import TopK
from router.subnetwork import SubNetwork
from traces.errors import InputError

SMALL = LanguageModelConfig(hidden=16, layers=4, heads=2, experts=6, expert_hidden=8, top_k=2, context=16)
TEXT_BS = torch.randint(256, (3, 16), generator=torch.Generator().manual_seed(1))
KINDS: list[dict[str, Any]] = [
    {},
    {"gate": "sigmoid", "shared_experts": 1},
    {"renormalise": False, "null_experts": 2, "null_kind": "mixed"},
]
every_kind = pytest.mark.parametrize("changes", KINDS, ids=lambda changes: "-".join(changes) or "plain")


def model(**changes: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(replace(SMALL, **changes)).eval()


@st.composite
def parts(draw: st.DrawFn) -> SubNetwork:
    layers = draw(st.lists(st.integers(0, 3), min_size=1, unique=True).map(sorted))
    experts = draw(st.integers(1, 6))
    ids = st.permutations(range(6)).map(lambda order: tuple(sorted(order[:experts])))
    return SubNetwork(
        layers_L=tuple(layers),
        experts_LE=tuple(draw(ids) for _ in layers),
        top_k_L=tuple(draw(st.integers(1, experts)) for _ in layers),
    )


@every_kind
@settings(deadline=None, max_examples=25)
@given(part=parts())
def test_a_part_of_the_model_answers_as_the_model_that_is_cut_out(changes: dict[str, Any], part: SubNetwork) -> None:
    whole = model(**changes)
    inside, alone = whole.routed(TEXT_BS, part.policy, part=part), whole.extract(part).routed(TEXT_BS, part.policy)
    torch.testing.assert_close(inside.logits_BSV, alone.logits_BSV, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(inside.assignments, alone.assignments, strict=True):
        assert torch.equal(ours.ids_TK, theirs.ids_TK)
    assert whole.extract(part).config.policy == part.policy


def test_parts_change_from_batch_to_batch_and_leave_the_model_as_it_was() -> None:
    whole = model()
    part = SubNetwork(layers_L=(0, 2), experts_LE=((0, 3), (1, 5)), top_k_L=(2, 1))
    before = whole.routed(TEXT_BS, SMALL.policy).logits_BSV
    cut = whole.routed(TEXT_BS, part.policy, part=part).logits_BSV
    assert not torch.allclose(before, cut)
    assert torch.equal(whole.routed(TEXT_BS, SMALL.policy).logits_BSV, before)
    assert torch.equal(whole.routed(TEXT_BS, SMALL.policy, part=SMALL.whole).logits_BSV, before)


def test_a_policy_that_looks_at_all_experts_sees_those_of_the_part() -> None:
    part = SubNetwork(layers_L=(1,), experts_LE=((0, 2, 3, 5),), top_k_L=(2,))
    policy = RoutingPolicy(selection=TopK(k=2), adjustment=Opportunistic(k0=1))
    whole = model()
    inside = whole.routed(TEXT_BS, policy, part=part)
    assert int(inside.assignments[0].ids_TK.max()) < 4
    torch.testing.assert_close(inside.logits_BSV, whole.extract(part).routed(TEXT_BS, policy).logits_BSV)


@every_kind
def test_what_trains_of_a_part_is_what_runs_of_it(changes: dict[str, Any]) -> None:
    whole = model(**changes)
    part = SubNetwork(layers_L=(0, 3), experts_LE=((0, 3, 4), (1, 2, 5)), top_k_L=(2, 1))
    rules: list[TrainingRule | None] = [None] * 4
    for layer, experts_E, top_k in zip(part.layers_L, part.experts_LE, part.top_k_L, strict=True):
        rules[layer] = TrainingRule(top_k=top_k, capacity_factor=6.0, experts=experts_E)
    with torch.no_grad():
        trained_BSV, _ = whole(TEXT_BS, rules)
    ran_BSV = whole.routed(TEXT_BS, part.policy, part=part).logits_BSV
    torch.testing.assert_close(trained_BSV, ran_BSV, atol=1e-5, rtol=1e-5)


def test_only_what_trains_gets_gradients() -> None:
    whole = model()
    rules = [TrainingRule(top_k=1, experts=(1, 4)), None, None, TrainingRule(top_k=2)]
    logits_BSV, router_loss = whole(TEXT_BS, rules)
    names, weights = zip(*whole.named_parameters(), strict=True)
    gradients = dict(
        zip(
            names,
            torch.autograd.grad(logits_BSV.sum() + router_loss, weights, materialize_grads=True),
            strict=True,
        )
    )
    for name, gradient in gradients.items():
        assert bool(gradient.any()) == (not name.startswith(("blocks.1.", "blocks.2."))), name
    used_E = gradients["blocks.0.moe.w_up_EFD"].flatten(1).any(dim=1).tolist()
    assert [expert for expert, used in enumerate(used_E) if used] == [1, 4]


def layer_of(logits_E: Sequence[float]) -> MoELayer:
    """A layer whose gate gives every token these logits, and whose experts each give their own number, from 1."""
    layer = MoELayer(hidden=1, expert_hidden=1, experts=len(logits_E))
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor(logits_E)[:, None])
        layer.w_gate_EFD.fill_(1.0)
        layer.w_up_EFD.fill_(1.0)
        layer.w_down_EDF.copy_(
            torch.arange(1.0, len(logits_E) + 1)[:, None, None] / torch.nn.functional.silu(torch.ones(()))
        )
    return layer


def test_a_pool_draws_evenly_from_the_best() -> None:
    layer = layer_of([3.0, 2.0, 1.0, 0.0])
    x_TD = torch.ones(3000, 1)
    rule = TrainingRule(top_k=1, capacity_factor=4.0, pool=3)
    out_TD, _ = layer(x_TD, rule, torch.Generator().manual_seed(0))
    drawn = torch.bincount(out_TD[:, 0].round().long(), minlength=5).tolist()
    assert drawn[0] == drawn[4] == 0  # nothing is dropped, and the fourth best is in no pool
    assert all(abs(count - 1000) < 100 for count in drawn[1:4])
    again_TD, _ = layer(x_TD, rule, torch.Generator().manual_seed(0))
    assert torch.equal(out_TD, again_TD)


def test_ranking_asks_for_routers_that_tell_experts_apart() -> None:
    def loss(logits_E: list[float]) -> float:
        return layer_of(logits_E)(torch.ones(2, 1), TrainingRule(top_k=1, balance=0.0, ranking=0.5))[1].item()

    assert loss([0.0, 0.0, 0.0]) == pytest.approx(0.5)  # uniform shares have the largest entropy, log(3)
    assert loss([9.0, 0.0, 0.0]) < 0.01


def test_impossible_parts_are_refused() -> None:
    good: dict[str, Any] = {"layers_L": (0, 2), "experts_LE": ((0, 1), (0, 3)), "top_k_L": (2, 1)}
    SubNetwork(**good)
    for changes, message in (
        ({"layers_L": ()}, "keep at least one"),
        ({"layers_L": (2, 0)}, r"layers are \[2, 0\]; give ids from 0, ascending"),
        ({"top_k_L": (1,)}, "1 layers have top_k, and 2 are kept"),
        ({"experts_LE": ((0, 1), (3, 3))}, r"experts of layer 2 are \[3, 3\]"),
        ({"experts_LE": ((0, 1), (0, 1, 2))}, "layer 0 keeps 2 experts and layer 2 3; keep as many in every layer"),
        ({"top_k_L": (0, 1)}, "layer 0: top_k is 0"),
    ):
        with pytest.raises(InputError, match=message):
            SubNetwork(**{**good, **changes})
    for changes, message in (
        ({"layers_L": (0, 4)}, "keeps layer 4; the model has 4, from 0"),
        ({"experts_LE": ((0, 1), (0, 6))}, "keeps expert 6; the model has 6, from 0"),
        ({"top_k_L": (3, 1)}, "of 2 experts cannot give a token 3"),
    ):
        with pytest.raises(InputError, match=message):
            model().extract(SubNetwork(**{**good, **changes}))


@given(part=parts())
def test_a_part_survives_json(part: SubNetwork) -> None:
    assert SubNetwork.from_json(part.to_json()) == part


def test_the_loss_of_a_part_is_that_of_the_model_cut_out(reference: TrainedModel) -> None:
    part = SubNetwork(layers_L=(1,), experts_LE=((0, 2, 5),), top_k_L=(2,))
    sizes: dict[str, Any] = {"sequences": 8, "ranks": 1, "tokens_per_rank": 8 * reference.model.config.context}
    inside = held_out_loss(reference.model, reference.corpus, part.policy, part=part, **sizes)
    alone = held_out_loss(reference.model.extract(part), reference.corpus, part.policy, **sizes)
    assert inside.mean == pytest.approx(alone.mean, rel=1e-6)
    assert inside.kept_LE.shape == (1, 3)
    assert (inside.kept_LE == alone.kept_LE).all()

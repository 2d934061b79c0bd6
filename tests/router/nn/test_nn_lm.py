import torch

from router.capacity import Capacity
from router.nn.evaluate import held_out_loss, paired_difference
from router.nn.lm import LanguageModel, LanguageModelConfig
from router.nn.moe import TrainingRule
from router.nn.store import ReferenceModel
from router.policies import RoutingPolicy
from router.policies.top_k import TopK

SMALL = LanguageModelConfig(hidden=16, layers=2, heads=2, experts=4, expert_hidden=8, top_k=2, context=16)


def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(SMALL)


def test_training_and_deployed_paths_agree() -> None:
    text_BS = torch.randint(256, (3, 16), generator=torch.Generator().manual_seed(1))
    small = model()
    with torch.no_grad():
        trained_BSV, _ = small(text_BS, TrainingRule(top_k=2, capacity_factor=2.0))
    torch.testing.assert_close(small.routed(text_BS, SMALL.policy).logits_BSV, trained_BSV, atol=1e-5, rtol=1e-5)


def test_a_prediction_does_not_see_later_bytes() -> None:
    text_BS = torch.arange(32).view(2, 16)
    changed_BS = text_BS.clone()
    changed_BS[:, 10:] += 100
    before, after = (model().routed(text, SMALL.policy).logits_BSV for text in (text_BS, changed_BS))
    torch.testing.assert_close(before[:, :10], after[:, :10], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_the_spec_counts_every_parameter() -> None:
    small = model()
    spec = small.spec()
    assert spec.expert_parameters == 3 * 16 * 8
    total = spec.layers * spec.experts * spec.expert_parameters + spec.other_parameters
    assert total == sum(weight.numel() for weight in small.parameters())
    assert spec.kv_bytes_per_token == 2 * 2 * 16 * 4


def test_policies_are_compared_on_the_same_text(reference: ReferenceModel) -> None:
    context = reference.model.config.context
    full, again, capped = (
        held_out_loss(reference.model, reference.corpus, policy, sequences=16, ranks=2, tokens_per_rank=4 * context)
        for policy in (
            reference.model.config.policy,
            reference.model.config.policy,
            RoutingPolicy(selection=TopK(k=2), capacity=Capacity(factor=0.25)),
        )
    )
    assert paired_difference(full, again) == (0.0, 0.0, 0.0)
    assert full.experts_per_token == 2
    assert full.dropped_share == 0
    assert full.chosen_LE.sum() == 16 * context * 2 * 2
    # Capacity ceil(0.25 * 128 * 2 / 8) = 8 pairs, for each of 8 experts, 2 ranks, 2 steps, 2 layers: 512 of 2048.
    assert capped.kept_LE.sum() <= 512
    assert capped.dropped_share >= 0.75
    mean, low, high = paired_difference(capped, full)
    assert low <= mean <= high
    assert list(full.by_domain) == list(reference.corpus.domains)

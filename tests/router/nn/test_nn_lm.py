from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from router.assignment import Assignment
from router.candidates import Candidates
from router.capacity import Capacity
from router.context import RouteContext
from router.nn.evaluate import held_out_loss, paired_difference
from router.nn.lm import LanguageModel, LanguageModelConfig
from router.nn.moe import TrainingRule
from router.nn.store import TrainedModel
from router.nn.text import Corpus
from router.nn.train import Hyperparameters, train
from router.policies import RoutingPolicy
from router.policies.top_k import TopK
from traces.errors import InputError
from traces.model import ModelSpec

SMALL = LanguageModelConfig(hidden=16, layers=2, heads=2, experts=4, expert_hidden=8, top_k=2, context=16)


OTHERS: list[dict[str, Any]] = [
    {},
    {"gate": "sigmoid", "shared_experts": 2},
    {"renormalise": False, "null_experts": 2, "null_kind": "copy"},
    {"gate": "sigmoid", "renormalise": False, "shared_experts": 1, "null_experts": 3, "null_kind": "mixed"},
]
every_kind = pytest.mark.parametrize("changes", OTHERS, ids=lambda changes: "-".join(changes) or "plain")


def model(**changes: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(replace(SMALL, **changes))


@every_kind
def test_training_and_deployed_paths_agree(changes: dict[str, Any]) -> None:
    text_BS = torch.randint(256, (3, 16), generator=torch.Generator().manual_seed(1))
    small = model(**changes)
    with torch.no_grad():
        trained_BSV, _ = small(text_BS, [TrainingRule(top_k=2, capacity_factor=4.0)] * 2)
    torch.testing.assert_close(small.routed(text_BS, SMALL.policy).logits_BSV, trained_BSV, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, r"top_k is 5; with 4 experts use 1 to 4"),
        ({"top_k": 7, "null_experts": 2}, r"top_k is 7; with 4 experts and 2 null ones use 1 to 6"),
        ({"shared_experts": -1}, r"shared_experts is -1; it must be at least 0"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(SMALL, **changes)


def test_a_prediction_does_not_see_later_bytes() -> None:
    text_BS = torch.arange(32).view(2, 16)
    changed_BS = text_BS.clone()
    changed_BS[:, 10:] += 100
    before, after = (model().routed(text, SMALL.policy).logits_BSV for text in (text_BS, changed_BS))
    torch.testing.assert_close(before[:, :10], after[:, :10], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[:, 10:], after[:, 10:])


@every_kind
def test_the_spec_counts_every_parameter(changes: dict[str, Any]) -> None:
    small = model(**changes)
    spec = small.spec()
    assert spec.expert_parameters == 3 * 16 * 8
    in_layers = spec.layers * (spec.experts * spec.expert_parameters + spec.shared_parameters)
    assert in_layers + spec.other_parameters == sum(weight.numel() for weight in small.parameters())
    assert spec.shared_parameters == spec.shared_experts * spec.expert_parameters
    assert spec.kv_bytes_per_token == 2 * 2 * 16 * 4
    for field, value in changes.items():
        assert getattr(spec, field) == value
    assert ModelSpec(**spec.to_json()) == spec


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondChoiceMoves(Capacity):
    """Sends every token's second pair to its third candidate."""

    name: ClassVar[str] = "second choice moves"

    def limit(self, assignment: Assignment, candidates: Candidates, context: RouteContext) -> Assignment:
        ids_TK, moved_TK = assignment.ids_TK.clone(), torch.zeros_like(assignment.kept_TK)
        ids_TK[:, 1], moved_TK[:, 1] = candidates.ids_TC[:, 2], True
        return replace(assignment, ids_TK=ids_TK, rerouted_TK=moved_TK)


def test_rerouted_pairs_count_where_they_are_computed(reference: TrainedModel) -> None:
    config, corpus = reference.model.config, reference.corpus
    policy = RoutingPolicy(selection=TopK(k=2), capacity=SecondChoiceMoves(factor=1.0))
    run = held_out_loss(reference.model, corpus, policy, sequences=8, ranks=1, tokens_per_rank=8 * config.context)
    assert (run.rerouted_share, run.dropped_share, run.experts_per_token) == (0.5, 0, 2)
    assert (run.rerouted_LE <= run.kept_LE).all()
    assert run.rerouted_LE.sum() == run.tokens * config.layers
    assert np.array_equal(run.chosen_LE, run.kept_LE)


def test_null_experts_are_learnt_and_used(corpus: Corpus) -> None:
    config = LanguageModelConfig(
        hidden=32, layers=2, heads=2, experts=8, expert_hidden=16, top_k=3, context=32, null_experts=2
    )
    hyper = Hyperparameters(steps=100, batch=8, limit_s=600.0)
    trained, run = train(config, corpus, hyper, lambda done, message: None)
    assert run.steps == 100
    loss = held_out_loss(trained, corpus, config.policy, sequences=16, ranks=1, tokens_per_rank=8 * 32)
    untrained = held_out_loss(
        LanguageModel(config), corpus, config.policy, sequences=16, ranks=1, tokens_per_rank=8 * 32
    )
    assert loss.mean < untrained.mean - 1.5  # log(256) = 5.55 before
    # Of 3 choices a token, 2 in 10 go to null experts when all are used alike.
    null_share_L = 1 - loss.chosen_LE.sum(axis=1) / (loss.tokens * config.top_k)
    assert (null_share_L > 0.02).all()
    assert (null_share_L < 0.6).all()
    assert loss.dropped_share == loss.rerouted_share == 0
    assert loss.experts_per_token == pytest.approx(3 * (1 - null_share_L.mean()))


def test_policies_are_compared_on_the_same_text(reference: TrainedModel) -> None:
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

"""Importance of experts and layers, by hand and by law."""

import numpy as np
import pytest
import torch

from router.elastic.importance import expert_importance, importance_text, losses_without, recorded_loss, without
from router.nn.lm import LanguageModel, LanguageModelConfig
from router.nn.store import TrainedModel
from router.subnetwork import SubNetwork
from traces.errors import InputError

ONE_LAYER = LanguageModelConfig(hidden=2, layers=1, heads=1, experts=3, expert_hidden=1, top_k=2, context=4)


@pytest.fixture
def by_hand() -> LanguageModel:
    """A layer that two kinds of token enter: (√2, 0), bytes a, and (0, √2), bytes b.

    Attention adds nothing, and normalising scales a row to a mean square of one. The gate gives tokens a the logits
    log 6, log 3, log 1 and tokens b log 1, log 1, log 8; an expert gives its input's length, √2 silu(√2), times 1, 2
    or 3.
    """
    model = LanguageModel(ONE_LAYER).eval()
    root = 2**0.5
    with torch.no_grad():
        model.embedding.weight.zero_()
        model.embedding.weight[ord("a"), 0] = model.embedding.weight[ord("b"), 1] = 1.0
        (moe,) = model.moe_layers
        model.get_parameter("blocks.0.attention.w_out.weight").zero_()
        moe.gate.weight.copy_(torch.tensor([[6.0, 1.0], [3.0, 1.0], [1.0, 8.0]]).log() / root)
        moe.w_gate_EFD.fill_(1.0)
        moe.w_up_EFD.fill_(1.0)
        moe.w_down_EDF.zero_()
        moe.w_down_EDF[:, 0, 0] = torch.tensor([1.0, 2.0, 3.0])
    return model


TEXT_BS = torch.tensor([list(b"aaab")])
SIZE = 2**0.5 / (1 + np.exp(-(2**0.5))) * 2**0.5  # √2 · silu(√2), what an expert of factor 1 gives


def test_gate_mass_and_reap_by_hand(by_hand: LanguageModel) -> None:
    found = expert_importance(by_hand, TEXT_BS, ONE_LAYER.whole)
    # Tokens a use experts 0 and 1 at 6/9 and 3/9; the token b expert 2 at 8/9, and of the equal others expert 0 at 1/9.
    np.testing.assert_array_equal(found.tokens_LE, [[4, 3, 1]])
    np.testing.assert_allclose(found.gate_mass_LE, [[3 * 6 / 9 + 1 / 9, 3 * 3 / 9, 8 / 9]], rtol=1e-4)
    # The mean over the tokens that use it: (3 · 6/9 + 1/9) / 4 · 1, 3/9 · 2, 8/9 · 3.
    np.testing.assert_allclose(found.reap_LE, [[SIZE * 19 / 36, SIZE * 2 / 3, SIZE * 8 / 3]], rtol=1e-4)
    assert found.score_LE("gate_mass") is found.gate_mass_LE
    assert found.score_LE("reap") is found.reap_LE


def test_experts_are_judged_as_the_part_runs(by_hand: LanguageModel) -> None:
    part = SubNetwork(layers_L=(0,), experts_LE=((1, 2),), top_k_L=(1,))
    found = expert_importance(by_hand, TEXT_BS, part)
    np.testing.assert_array_equal(found.tokens_LE, [[3, 1]])  # each token its best of experts 1 and 2, at weight 1
    np.testing.assert_allclose(found.gate_mass_LE, [[3.0, 1.0]], rtol=1e-4)
    np.testing.assert_allclose(found.reap_LE, [[2 * SIZE, 3 * SIZE]], rtol=1e-4)


def test_an_expert_that_no_token_uses_matters_nothing(by_hand: LanguageModel) -> None:
    found = expert_importance(by_hand, torch.tensor([list(b"aaaa")]), ONE_LAYER.whole)
    assert found.tokens_LE[0, 2] == found.gate_mass_LE[0, 2] == found.reap_LE[0, 2] == 0


def test_every_pair_is_counted_once(trained: TrainedModel) -> None:
    part = SubNetwork(layers_L=(0, 2), experts_LE=((0, 1, 4), (2, 3, 7)), top_k_L=(2, 1))
    text_BS = importance_text(trained.corpus, trained.model.config.context)
    found = expert_importance(trained.model, text_BS, part)
    assert found.tokens_LE.sum(axis=1).tolist() == [2 * text_BS.numel(), text_BS.numel()]
    np.testing.assert_allclose(found.gate_mass_LE.sum(axis=1), text_BS.numel(), rtol=1e-5)  # weights sum to one


def test_a_domains_text_is_its_own_and_none_of_what_is_measured(trained: TrainedModel) -> None:
    corpus = trained.corpus
    text = {name: importance_text(corpus, 32, name) for name in (None, *corpus.domains)}
    assert len({rows.shape for rows in text.values()}) == 1
    measured_NS, _ = corpus.sequences(256, 33, 0, use="measure")
    measured = b"".join(row.tobytes() for row in measured_NS)
    for index, name in enumerate(corpus.domains):
        recorded = np.array_split(corpus.held_out[index], 2)[0].tobytes()
        assert all(bytes(row.tolist()) in recorded for row in text[name][:8])
        assert not all(bytes(row.tolist()) in measured for row in text[name])
    with pytest.raises(InputError, match="no domain 'poems' in the text; it has code"):
        importance_text(corpus, 32, "poems")


def test_a_layer_that_does_nothing_is_not_missed(trained: TrainedModel) -> None:
    whole = trained.model.config.whole
    idle = trained.model.extract(whole)
    with torch.no_grad():
        idle.get_parameter("blocks.1.attention.w_out.weight").zero_()
        idle.moe_layers[1].w_down_EDF.zero_()
    losses = losses_without(idle, trained.corpus, whole)
    assert losses[1] == pytest.approx(recorded_loss(idle, trained.corpus, whole, sequences=64), rel=1e-6)
    assert len(losses) == whole.depth


def test_without_leaves_the_others_as_they_were() -> None:
    part = SubNetwork(layers_L=(1, 4, 5), experts_LE=((0, 1), (2, 3), (4, 5)), top_k_L=(2, 1, 2))
    assert without(part, 1).to_json() == {"layers": [1, 5], "experts": [[0, 1], [4, 5]], "top_k": [2, 2]}

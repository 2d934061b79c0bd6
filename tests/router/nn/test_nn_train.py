from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from router.elastic import RECIPES, make_recipe
from router.nn import train as training
from router.nn.lm import LanguageModelConfig
from router.nn.moe import TrainingRule
from router.nn.recipe import Recipe, Rules
from router.nn.store import TrainedModel
from router.nn.text import Corpus
from router.nn.train import Hyperparameters, Spent, train
from tests.router.tiny import SHORT, TINY
from traces.errors import InputError, MoerouteError
from traces.progress import quiet


def test_training_again_gives_the_same_weights(reference: TrainedModel) -> None:
    model, spent = train(TINY, reference.corpus, SHORT, quiet)
    assert spent.steps == reference.info["steps"]
    for ours, theirs in zip(model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_training_ends_in_time_and_lowers_the_loss(corpus: Corpus) -> None:
    reports: list[tuple[float, str]] = []
    hyper = replace(SHORT, steps=None, limit_s=2.0)
    _, spent = train(TINY, corpus, hyper, lambda done, message: reports.append((done, message)))
    assert spent.seconds >= 2.0
    assert spent.loss < 5.0  # log(256) = 5.55 before training
    done = [share for share, _ in reports]
    assert done == sorted(done)
    assert done[-1] == 1.0
    assert "nats/byte" in reports[0][1]


def test_a_diverging_run_is_an_error(corpus: Corpus) -> None:
    with pytest.raises(MoerouteError, match="diverged"):
        train(TINY, corpus, replace(SHORT, learning_rate=float("inf")), quiet)


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_stopped_run_goes_on_to_the_same_weights(
    name: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, hyper = make_recipe(name), replace(SHORT, steps=6, limit_s=None)
    through, spent = train(TINY, corpus, hyper, quiet, recipe=recipe)

    monkeypatch.setattr(training, "_CHECKPOINT_EVERY_S", 0.0)
    checkpoint = tmp_path / "checkpoint.pt"
    messages: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train(TINY, corpus, hyper, quiet, recipe=_Stopping(recipe, after=4), checkpoint=checkpoint)
    resumed, again = train(
        TINY, corpus, hyper, lambda done, message: messages.append(message), recipe=recipe, checkpoint=checkpoint
    )
    assert "going on" in messages[0]
    assert "step 4" in messages[0]
    assert (again.steps, again.flops, again.loss) == (spent.steps, spent.flops, spent.loss)
    for ours, theirs in zip(resumed.parameters(), through.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class _Stopping(Recipe):
    """A recipe that is interrupted, and passes for the one it wraps."""

    def __init__(self, recipe: Recipe, after: int) -> None:
        self._recipe, self._left = recipe, 2 * after  # two parts of a batch a step

    def __repr__(self) -> str:
        return repr(self._recipe)

    def draw(self, rule: TrainingRule, config: LanguageModelConfig, random: np.random.Generator) -> Rules:
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        return self._recipe.draw(rule, config, random)


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_not_gone_on_from(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_CHECKPOINT_EVERY_S", 0.0)
    checkpoint = tmp_path / "checkpoint.pt"
    train(TINY, corpus, replace(SHORT, steps=2), quiet, checkpoint=checkpoint)
    messages: list[str] = []
    for seed, size in ((1, None), (2, 500)):
        checkpoint.write_bytes(checkpoint.read_bytes()[:size])
        hyper = replace(SHORT, steps=3, seed=seed)
        _, spent = train(TINY, corpus, hyper, lambda done, message: messages.append(message), checkpoint=checkpoint)
        assert spent.steps == 3
    assert sum("no checkpoint to go on from" in message for message in messages) == 2


def test_equal_budgets_of_flops_buy_more_steps_of_sparser_training(corpus: Corpus) -> None:
    def steps(top_k: int) -> int:
        hyper = replace(SHORT, steps=None, limit_s=None, flops=1e9)
        return train(replace(TINY, top_k=top_k), corpus, hyper, quiet)[1].steps

    # A token of a layer: projections 2*4*32^2 = 8192, scores and values 4*32*32 = 4096, gate 2*32*8 = 512, an expert
    # 6*32*16 = 3072; two layers and the head 2*32*256 = 16384, three times, for the 128 tokens of a step:
    # k = 2: 3 * 128 * (16384 + 2 * (12800 + 6144)) = 20,840,448; k = 8: 34,996,224.
    assert (steps(2), steps(8)) == (48, 29)


def test_a_run_needs_a_limit(corpus: Corpus) -> None:
    with pytest.raises(InputError, match="no end"):
        replace(SHORT, steps=None, limit_s=None)


def test_the_learning_rate_follows_the_flops() -> None:
    hyper = Hyperparameters(steps=None, limit_s=None, flops=100.0)
    assert hyper.done(Spent(steps=10**6, seconds=1e6, flops=25.0)) == 0.25
    assert replace(hyper, steps=10).done(Spent(steps=5, seconds=1e6, flops=25.0)) == 0.5

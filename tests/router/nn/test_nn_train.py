from dataclasses import replace

import pytest
import torch

from router.nn.store import ReferenceModel
from router.nn.train import train
from traces.errors import MoerouteError


def test_training_again_gives_the_same_weights(reference: ReferenceModel) -> None:
    model, run = train(reference.model.config, reference.corpus, reference.recipe, lambda done, message: None)
    assert run.steps == reference.info["steps"]
    for ours, theirs in zip(model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_training_ends_in_time_and_lowers_the_loss(reference: ReferenceModel) -> None:
    reports: list[tuple[float, str]] = []
    recipe = replace(reference.recipe, steps=10**6, limit_s=2.0)
    _, run = train(
        reference.model.config, reference.corpus, recipe, lambda done, message: reports.append((done, message))
    )
    assert run.steps < 10**6
    assert run.seconds >= 2.0
    assert run.loss < 5.0  # log(256) = 5.55 before training
    done = [share for share, _ in reports]
    assert done == sorted(done)
    assert done[-1] == 1.0
    assert "nats/byte" in reports[0][1]


def test_a_diverging_run_is_an_error(reference: ReferenceModel) -> None:
    recipe = replace(reference.recipe, learning_rate=float("inf"))
    with pytest.raises(MoerouteError, match="diverged"):
        train(reference.model.config, reference.corpus, recipe, lambda done, message: None)

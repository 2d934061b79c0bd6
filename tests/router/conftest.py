from collections.abc import Iterator
from pathlib import Path

import pytest

from router.nn.recipe import Plain
from router.nn.store import TrainedModel, reference_model, trained_model
from router.nn.text import Corpus, load_corpus
from router.nn.train import Hyperparameters
from tests.router.tiny import SHORT, SMALL, TINY


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    return load_corpus()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def reference(cache: Path) -> TrainedModel:
    return reference_model(config=TINY, hyper=SHORT)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    folder = tmp_path_factory.mktemp("trained")
    return trained_model(Plain(), config=SMALL, hyper=Hyperparameters(steps=12, batch=4), folder=folder)

from collections.abc import Iterator
from pathlib import Path

import pytest

from router.nn.lm import LanguageModelConfig
from router.nn.store import TrainedModel, reference_model
from router.nn.text import Corpus, load_corpus
from router.nn.train import Hyperparameters

TINY = LanguageModelConfig(hidden=32, layers=2, heads=2, experts=8, expert_hidden=16, top_k=2, context=32)
SHORT = Hyperparameters(steps=8, batch=4)


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

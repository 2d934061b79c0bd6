import pytest

from router.nn.lm import LanguageModelConfig
from router.nn.recipe import Plain
from router.nn.store import TrainedModel, trained_model
from router.nn.train import Hyperparameters

# Three layers, so that there is an order in which layers are missed.
SMALL = LanguageModelConfig(hidden=32, layers=3, heads=2, experts=8, expert_hidden=16, top_k=2, context=32)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    folder = tmp_path_factory.mktemp("trained")
    return trained_model(Plain(), config=SMALL, hyper=Hyperparameters(steps=12, batch=4), folder=folder)

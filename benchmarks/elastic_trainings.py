"""The trainings of the elastic study: every recipe and every shape trained alone, on equal budgets of FLOPs.

Each training is a process of its own with one thread. A model that is there is not trained again, and a training that
was stopped goes on.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from router.elastic import RECIPES, make_recipe
from router.nn.lm import LanguageModelConfig
from router.nn.store import TrainedModel, load_model, trained_model
from router.nn.train import Hyperparameters
from traces.errors import InputError

# Six layers give depth something to cut; half the reference model's widths buy twice its steps.
CONFIG = LanguageModelConfig(hidden=64, layers=6, heads=4, experts=16, expert_hidden=64, top_k=4, context=128)
# (depth, experts, top k) of the parts that are compared with the same shape trained alone, chosen before any was seen.
SHAPES = ((6, 16, 2), (6, 16, 1), (6, 8, 4), (6, 8, 2), (4, 16, 4), (4, 8, 2))
ALONE = "alone"
FULL_SEEDS, FULL_FLOPS = (0, 1, 2), 4.5e12
REDUCED_SEEDS, REDUCED_FLOPS = (0,), 0.4e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One model of the study. `shape`: (depth, experts, top k) where it is trained alone."""

    recipe: str
    seed: int
    flops: float
    shape: tuple[int, int, int] | None = None

    @property
    def id(self) -> str:
        """Its name, and that of its folder."""
        if self.shape is None:
            return f"{self.recipe}-{self.seed}"
        return "-".join([ALONE, *("{}x{}k{}".format(*self.shape).split()), str(self.seed)])

    @property
    def config(self) -> LanguageModelConfig:
        """Its shape."""
        if self.shape is None:
            return CONFIG
        depth, experts, top_k = self.shape
        return replace(CONFIG, layers=depth, experts=experts, top_k=top_k)

    @property
    def hyper(self) -> Hyperparameters:
        """As the reference model, but for the budget, in FLOPs, and one thread."""
        return Hyperparameters(steps=None, limit_s=None, flops=self.flops, shards=1, seed=self.seed)

    def load(self, models: Path) -> TrainedModel | None:
        """The trained model, if it is there and of these settings."""
        try:
            found = load_model(models / self.id)
        except InputError:
            return None
        hyper = {**asdict(self.hyper), "betas": list(self.hyper.betas)}
        config = replace(self.config, top_k=make_recipe(self.recipe).own_top_k(self.config))
        same = found.info["hyperparameters"] == hyper and found.model.config == config
        return found if same and found.info["recipe"]["name"] == self.recipe else None


def trainings(seeds: Sequence[int], flops: float) -> list[Training]:
    """All of them, seed by seed, so that a study that is stopped has whole seeds."""
    return [
        training
        for seed in seeds
        for training in (
            *(Training(recipe=recipe, seed=seed, flops=flops) for recipe in RECIPES),
            *(Training(recipe="plain", seed=seed, flops=flops, shape=shape) for shape in SHAPES),
        )
    ]


def train_all(wanted: Sequence[Training], models: Path, processes: int = 2) -> Iterator[Training]:
    """Train what is not there; each training as its model is ready, in their order."""
    with get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(_train, [(training, models) for training in wanted])


def _train(work: tuple[Training, Path]) -> Training:
    training, models = work
    if training.load(models) is None:
        trained_model(
            make_recipe(training.recipe),
            config=training.config,
            hyper=training.hyper,
            folder=models / training.id,
            progress=partial(_report, training.id),
        )
    return training


def _report(name: str, done: float, message: str) -> None:
    if done == 1.0:
        print(f"{name}: {message}", file=sys.stderr, flush=True)

"""Recipe: which part of the model trains on a step, and how it routes there."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from router.nn.lm import LanguageModelConfig
from router.nn.moe import TrainingRule

Rules = tuple[TrainingRule | None, ...]


class Recipe(ABC):
    """A way to train, one rule a layer and step; the loop, the optimizer and the text are the same for all.

    The loop asks once for each part of a batch that it takes the gradient of, so that one step learns from several
    draws. `source` is the paper.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""

    def own_top_k(self, config: LanguageModelConfig) -> int:
        """The k that the trained model has as its own: `config`'s, unless the recipe trains with another."""
        return config.top_k

    @abstractmethod
    def draw(self, rule: TrainingRule, config: LanguageModelConfig, random: np.random.Generator) -> Rules:
        """The rule of each layer, None for one that is left out. `rule` is that of plain training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain(Recipe):
    """Top-k of all experts in all layers, always: how models are trained that nobody means to stretch."""

    name: ClassVar[str] = "plain"
    source: ClassVar[str] = "Shazeer et al., arXiv 1701.06538"

    def draw(self, rule: TrainingRule, config: LanguageModelConfig, random: np.random.Generator) -> Rules:
        """The same everywhere."""
        return (rule,) * config.layers

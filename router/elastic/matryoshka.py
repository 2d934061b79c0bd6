"""Matryoshka MoE: the number of experts differs from layer to layer and step to step."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from router.nn.lm import LanguageModelConfig
from router.nn.moe import TrainingRule
from router.nn.recipe import Recipe, Rules


@dataclass(frozen=True, slots=True, kw_only=True)
class Matryoshka(Recipe):
    """Each layer draws its k evenly from 1 to 2 K - 1, K the model's top k: K on average, as plain training costs.

    The first experts of a token must then do alone, and the later ones add to them. Layers draw apart, which the paper
    finds better than one k for all of a batch; its range of k is another.
    """

    name: ClassVar[str] = "matryoshka"
    source: ClassVar[str] = "M-MoE, arXiv 2509.26520"

    def draw(self, rule: TrainingRule, config: LanguageModelConfig, random: np.random.Generator) -> Rules:
        """A k a layer."""
        most = min(2 * config.top_k - 1, config.experts)
        return tuple(
            replace(rule, top_k=int(top_k)) for top_k in random.integers(1, most, size=config.layers, endpoint=True)
        )

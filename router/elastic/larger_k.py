"""More experts a token throughout training: the control at equal FLOPs of what claims to need fewer."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from router.nn.lm import LanguageModelConfig
from router.nn.moe import TrainingRule
from router.nn.recipe import Recipe, Rules


@dataclass(frozen=True, slots=True, kw_only=True)
class LargerK(Recipe):
    """Plain training with `factor` times the model's top k.

    Each token costs more, so that a budget of FLOPs buys fewer steps: who wants many experts at run time could simply
    have trained with them.
    """

    name: ClassVar[str] = "larger_k"
    source: ClassVar[str] = "the control of EMoE, arXiv 2509.21892"
    factor: int = 2

    def own_top_k(self, config: LanguageModelConfig) -> int:
        """`factor` times as many, never more than there are experts."""
        return min(self.factor * config.top_k, config.experts)

    def draw(self, rule: TrainingRule, config: LanguageModelConfig, random: np.random.Generator) -> Rules:
        """The same everywhere."""
        return (replace(rule, top_k=self.own_top_k(config)),) * config.layers

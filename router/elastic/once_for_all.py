"""Once for all: a step trains a part of the model, less deep, with fewer experts, or with fewer of them a token."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from router.nn.lm import LanguageModelConfig
from router.nn.moe import TrainingRule
from router.nn.recipe import Recipe, Rules


@dataclass(frozen=True, slots=True, kw_only=True)
class OnceForAll(Recipe):
    """Depth, width and sparsity are drawn apart; each is the model's own with probability `whole_share`.

    Else: depth, half of the layers or more, of which the first and the last always stay; width, a quarter of the
    experts or more, at least K of them, drawn in each layer; sparsity, 1 to K experts a token, the same in all layers.
    A step on a part costs less, so that a budget of FLOPs buys more steps. The technical report names the three axes;
    what is drawn, and how often, is ours.
    """

    name: ClassVar[str] = "once_for_all"
    source: ClassVar[str] = "ERNIE 5.0, arXiv 2602.04705"
    whole_share: float = 0.5

    def draw(self, rule: TrainingRule, config: LanguageModelConfig, random: np.random.Generator) -> Rules:
        """A part of the model."""
        narrower, shallower, sparser = (random.random(3) >= self.whole_share).tolist()
        top_k = int(random.integers(1, config.top_k, endpoint=True)) if sparser else config.top_k
        least = max(config.experts // 4, config.top_k)
        experts = int(random.integers(least, config.experts, endpoint=True)) if narrower else config.experts
        rules: list[TrainingRule | None] = []
        for _ in range(config.layers):
            drawn = np.sort(random.permutation(config.experts)[:experts]).tolist()
            rules.append(replace(rule, top_k=top_k, experts=None if experts == config.experts else tuple(drawn)))
        inner = max(config.layers - 2, 0)
        if shallower and inner:
            skipped = int(random.integers(0, min(inner, config.layers // 2), endpoint=True))
            for layer in 1 + random.permutation(inner)[:skipped]:
                rules[layer] = None
        return tuple(rules)

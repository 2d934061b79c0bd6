"""EMoE: experts meet more partners in training than a token uses, so that more of them can work together later."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from router.nn.lm import LanguageModelConfig
from router.nn.moe import TrainingRule
from router.nn.recipe import Recipe, Rules


@dataclass(frozen=True, slots=True, kw_only=True)
class CoActivation(Recipe):
    """A token's k experts are drawn from its best ones, as many as k to `reach` * k.

    How many stand in the pool is drawn anew in each layer, so that an expert is used the oftener the higher it ranks,
    and a step costs what it costs in plain training. `ranking` is the factor on the entropy of the router's shares: it
    rewards routers that tell experts apart, and so a ranking that holds beyond the first k (the hierarchical router
    loss; the distance from uniform shares is log(E) less the entropy). The paper's abstract names both parts; how the
    pool is drawn, and the two figures, are ours.
    """

    name: ClassVar[str] = "emoe"
    source: ClassVar[str] = "EMoE, arXiv 2509.21892"
    reach: int = 3
    ranking: float = 0.01

    def draw(self, rule: TrainingRule, config: LanguageModelConfig, random: np.random.Generator) -> Rules:
        """A pool a layer."""
        widest = min(self.reach * config.top_k, config.experts)
        pools = random.integers(config.top_k, widest, size=config.layers, endpoint=True)
        return tuple(replace(rule, pool=int(pool), ranking=self.ranking) for pool in pools)

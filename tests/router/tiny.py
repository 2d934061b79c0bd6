"""Models so small that training them takes no time."""

from router.nn.lm import LanguageModelConfig
from router.nn.train import Hyperparameters

TINY = LanguageModelConfig(hidden=32, layers=2, heads=2, experts=8, expert_hidden=16, top_k=2, context=32)
# Three layers, so that there is an order in which layers are missed.
SMALL = LanguageModelConfig(hidden=32, layers=3, heads=2, experts=8, expert_hidden=16, top_k=2, context=32)
SHORT = Hyperparameters(steps=8, batch=4)

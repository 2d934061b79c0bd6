"""FLOPs of the reference model: multiplications and additions of its matrix products, a token."""

from router.nn.lm import LanguageModelConfig
from router.nn.recipe import Rules
from router.subnetwork import SubNetwork

# The gradients by activations and by weights each take a product as large as the forward one.
_TRAINING_PASSES = 3


def forward_flops_per_token(config: LanguageModelConfig, part: SubNetwork | None = None) -> float:
    """FLOPs of one token of a whole context through the part (None: all of the model)."""
    part = part or config.whole
    return _head(config) + sum(_layer(config, part.experts, top_k) for top_k in part.top_k_L)


def training_flops_per_token(config: LanguageModelConfig, rules: Rules) -> float:
    """FLOPs of a token of a training step under `rules`, a rule a layer; padding to the capacity is not counted."""
    layers = [
        _layer(config, config.experts if rule.experts is None else len(rule.experts), rule.top_k)
        for rule in rules
        if rule is not None
    ]
    return _TRAINING_PASSES * (_head(config) + sum(layers))


def _head(config: LanguageModelConfig) -> float:
    return 2.0 * config.hidden * config.vocab


def _layer(config: LanguageModelConfig, experts: int, top_k: int) -> float:
    """Projections, scores and values of attention over the context, the gate, and the experts of a token."""
    hidden = config.hidden
    attention = 2.0 * 4 * hidden**2 + 2.0 * 2 * config.context * hidden
    gate = 2.0 * hidden * (experts + config.null_experts)
    return attention + gate + 2.0 * 3 * hidden * config.expert_hidden * (top_k + config.shared_experts)

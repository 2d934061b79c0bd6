from collections.abc import Iterator

import numpy as np
import pytest

from router.elastic import RECIPES, make_recipe
from router.elastic.co_activation import CoActivation
from router.elastic.once_for_all import OnceForAll
from router.nn.flops import forward_flops_per_token, training_flops_per_token
from router.nn.lm import LanguageModelConfig
from router.nn.moe import TrainingRule
from router.nn.recipe import Recipe, Rules
from router.subnetwork import SubNetwork
from traces.errors import InputError

CONFIG = LanguageModelConfig(hidden=32, layers=6, heads=2, experts=16, expert_hidden=16, top_k=4, context=32)
RULE = TrainingRule(top_k=4, capacity_factor=1.5, balance=0.01)


def draws(recipe: Recipe, count: int = 400, config: LanguageModelConfig = CONFIG) -> Iterator[Rules]:
    random = np.random.default_rng(0)
    return (recipe.draw(RULE, config, random) for _ in range(count))


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_draw_is_a_part_of_the_model(name: str) -> None:
    for rules in draws(make_recipe(name)):
        assert len(rules) == CONFIG.layers
        for rule in rules:
            if rule is not None:
                experts = CONFIG.experts if rule.experts is None else len(rule.experts)
                assert 1 <= rule.top_k <= experts
                assert rule.pool is None or rule.top_k <= rule.pool <= experts
                assert rule.experts is None or list(rule.experts) == sorted(set(rule.experts))
                assert (rule.capacity_factor, rule.balance) == (1.5, 0.01)


def test_plain_and_emoe_cost_the_same_and_matryoshka_does_on_average() -> None:
    cost = {
        name: np.mean([training_flops_per_token(CONFIG, rules) for rules in draws(make_recipe(name), 4000)])
        for name in RECIPES
    }
    assert cost["plain"] == cost["emoe"] == 3 * forward_flops_per_token(CONFIG)
    assert cost["matryoshka"] == pytest.approx(cost["plain"], rel=0.02)
    assert cost["larger_k"] > cost["plain"] > cost["once_for_all"]


def test_larger_k_doubles_the_experts_of_a_token() -> None:
    (rules,) = draws(make_recipe("larger_k"), 1)
    assert {rule.top_k for rule in rules if rule is not None} == {8}
    assert {name: make_recipe(name).own_top_k(CONFIG) for name in RECIPES} == {
        **dict.fromkeys(RECIPES, 4),
        "larger_k": 8,
    }


def test_emoe_draws_from_up_to_three_times_k_in_each_layer() -> None:
    pools = {rule.pool for rules in draws(CoActivation()) for rule in rules if rule is not None}
    assert pools == set(range(4, 13))
    assert any(len({rule.pool for rule in rules if rule is not None}) > 1 for rules in draws(CoActivation()))
    small = LanguageModelConfig(experts=6, top_k=4)
    assert {rule.pool for rules in draws(CoActivation(), config=small) for rule in rules if rule} == {4, 5, 6}


def test_matryoshka_draws_each_layer_apart() -> None:
    drawn = [[rule.top_k for rule in rules if rule is not None] for rules in draws(make_recipe("matryoshka"))]
    assert {top_k for row in drawn for top_k in row} == set(range(1, 8))
    assert np.mean([len(set(row)) for row in drawn]) > 3


def test_once_for_all_draws_depth_width_and_sparsity_apart() -> None:
    all_rules = list(draws(OnceForAll(), 2000))
    depths = [sum(rule is not None for rule in rules) for rules in all_rules]
    first = [next(rule for rule in rules if rule is not None) for rules in all_rules]
    assert set(depths) == {3, 4, 5, 6}
    assert all(rules[0] is not None and rules[-1] is not None for rules in all_rules)
    assert {4 if rule.experts is None else len(rule.experts) for rule in first} == set(range(4, 16))
    assert {rule.top_k for rule in first} == {1, 2, 3, 4}
    # Half the draws keep an axis whole, and one in four (depth), 13 (width) or 4 (sparsity) of the others draws all.
    shares = [
        np.mean(whole)
        for whole in (
            [depth == 6 for depth in depths],
            [rule.experts is None for rule in first],
            [rule.top_k == 4 for rule in first],
        )
    ]
    assert shares == pytest.approx([0.5 + 0.5 / 4, 0.5 + 0.5 / 13, 0.5 + 0.5 / 4], abs=0.04)
    assert np.corrcoef(depths, [rule.top_k for rule in first])[0, 1] == pytest.approx(0, abs=0.06)


def test_once_for_all_leaves_a_model_of_two_layers_whole() -> None:
    shallow = LanguageModelConfig(layers=2)
    assert all(None not in rules for rules in draws(OnceForAll(whole_share=0.0), config=shallow))


def test_unknown_recipes_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"unknown recipe 'x'; known are plain, larger_k, emoe, matryoshka, once_for_all"
    ):
        make_recipe("x")


def test_flops_of_a_part_are_those_of_a_model_of_its_shape() -> None:
    part = SubNetwork(layers_L=(0, 3), experts_LE=((0, 1, 2), (3, 5, 9)), top_k_L=(2, 1))
    own = LanguageModelConfig(
        hidden=32, layers=2, heads=2, experts=3, expert_hidden=16, top_k=2, context=32, top_k_L=(2, 1)
    )
    assert forward_flops_per_token(CONFIG, part) == forward_flops_per_token(own)
    # Head 2*32*256 = 16384; a layer 2*4*32^2 + 4*32*32 + 2*32*3 = 12480; an expert 6*32*16 = 3072, 2 + 1 a token.
    assert forward_flops_per_token(own) == 16384 + 2 * 12480 + 3 * 3072

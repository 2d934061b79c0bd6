"""Elastic models: recipes that train a model to run in parts, and the parts that are cut out of it."""

from router.elastic.co_activation import CoActivation
from router.elastic.larger_k import LargerK
from router.elastic.matryoshka import Matryoshka
from router.elastic.once_for_all import OnceForAll
from router.nn.recipe import Plain, Recipe
from traces.errors import InputError

RECIPES: dict[str, type[Recipe]] = {
    recipe.name: recipe for recipe in (Plain, LargerK, CoActivation, Matryoshka, OnceForAll)
}


def make_recipe(name: str) -> Recipe:
    """The recipe called `name`, as published or as its file says; `InputError` names the known ones."""
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; known are {', '.join(RECIPES)}")
    return RECIPES[name]()

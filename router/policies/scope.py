"""Over which tokens a policy looks: all of a step, or each source rank's own."""

from collections.abc import Callable
from typing import Any, Literal

from router.backends import Array, bincount, namespace

Scope = Literal["source_rank", "global"]


def scopes_of(source_rank_T: Array, ranks: int, scope: Scope) -> tuple[Array, int]:
    """The scope that each token is in, and how many there are."""
    if scope == "source_rank":
        return source_rank_T, ranks
    return namespace(source_rank_T).zeros_like(source_rank_T), 1


def by_scope(
    plan: Callable[[Any, int | None], Array], used_TC: Array, source_rank_T: Array, ranks: int, scope: Scope
) -> Array:
    """What `plan(tokens, source rank or None for all)` makes of each scope's tokens, put together as `used_TC` is."""
    if scope == "global":
        return plan(slice(None), None)
    xp = namespace(used_TC)
    planned_TC = xp.zeros_like(used_TC)
    for source, tokens in enumerate(bincount(source_rank_T, ranks).tolist()):
        if tokens:
            rows = xp.nonzero(source_rank_T == source)[0]
            planned_TC[rows] = plan(rows, source)
    return planned_TC

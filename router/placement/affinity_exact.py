"""The affinity-aware placement of one small layer, proven best: a choice of sets of experts, by HiGHS.

Letters of this file: E experts, G ranks, N nodes, T tokens, U different sets of experts that they use, B what a node
could hold: a division of E / N experts over its ranks.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Held = tuple[int, ...]  # experts, ascending


def fewest_visits(
    ids_TK: NDArray[np.integer],
    load_E: NDArray[np.float64],
    *,
    ranks: int,
    nodes: int,
    most_rows: float,
    most_squares: float,
    node_cost: float,
) -> NDArray[np.int64]:
    """The rank of each expert [E], E / G on each, that makes visits of ranks + `node_cost` * visits of nodes least.

    No rank has more than `most_rows`, and the squares of all ranks' rows sum up to `most_squares` at most; some
    placement must keep that. -1 in `ids_TK`: none. At most 62 experts, and few of them: 8 on 4 ranks of 2 nodes are 210
    divisions, 16 on 8 of 4 are 5,460, 32 on 16 of 4 a thousand million.

    1. What a node holds costs the tokens that have an expert of it, and of each of its ranks: visits are its sum.
    2. Which of all that nodes could hold they do: every expert once, at the least cost (set partitioning).
    """
    from scipy.optimize import LinearConstraint, milp  # takes 0.2 s to load

    experts = load_E.size
    bits_TK = np.where(ids_TK < 0, 0, 1 << np.maximum(ids_TK, 0).astype(np.int64))
    uses_U, tokens_U = np.unique(np.bitwise_or.reduce(bits_TK, axis=1), return_counts=True)

    @cache
    def visitors(held: Held) -> int:
        return int(tokens_U[(uses_U & sum(1 << expert for expert in held)) != 0].sum())

    @cache
    def rows(held: Held) -> float:
        return float(load_E[list(held)].sum())

    divided_B = [
        by_rank
        for on_node in combinations(range(experts), experts // nodes)
        for by_rank in _divisions(on_node, experts // ranks)
        if max(map(rows, by_rank)) <= most_rows
    ]
    held_B = [sum(by_rank, start=()) for by_rank in divided_B]
    cost_B = [
        node_cost * visitors(tuple(sorted(held))) + sum(map(visitors, by_rank))
        for held, by_rank in zip(held_B, divided_B, strict=True)
    ]
    holds_EB = np.array([[expert in held for held in held_B] for expert in range(experts)], dtype=np.float64)
    squares_B = np.array([sum(rows(held) ** 2 for held in by_rank) for by_rank in divided_B]) / most_squares
    found = milp(
        np.array(cost_B),
        integrality=np.ones(len(cost_B), dtype=np.int64),
        constraints=[LinearConstraint(holds_EB, 1, 1), LinearConstraint(squares_B[None], 0, 1)],
        options={"mip_rel_gap": 0.0},
    )
    assert found.success, found.message
    rank_E = np.empty(experts, dtype=np.int64)
    by_rank_G = [held for place in np.flatnonzero(found.x > 0.5) for held in divided_B[place]]
    for rank, held in enumerate(by_rank_G):
        rank_E[list(held)] = rank
    return rank_E


def _divisions(held: Held, size: int) -> Iterator[Sequence[Held]]:
    """Every way to divide experts into sets of `size`, none twice.

    >>> list(_divisions((0, 1, 2, 3), 2))
    [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]
    """
    if not held:
        yield ()
        return
    for others in combinations(held[1:], size - 1):
        rest = tuple(expert for expert in held[1:] if expert not in others)
        yield from (((held[0], *others), *division) for division in _divisions(rest, size))

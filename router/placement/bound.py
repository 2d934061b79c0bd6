"""Bounds: the balancedness that no placement exceeds, where groups of experts stay on one node too."""

from collections.abc import Iterator
from itertools import combinations
from math import factorial

import numpy as np
from numpy.typing import NDArray

from router.balance import balancedness_bound, least_largest_replica_L
from router.placement import PLACEMENTS
from router.placement.problem import PlacementProblem

_MOST_SHARINGS = 1000  # ways to share out groups over nodes; with more, the bound without groups stands for theirs


def bound_of(problem: PlacementProblem, loads_LE: NDArray[np.float64], algorithm: str) -> float:
    """The bound of the ranks and slots, or where an algorithm keeps all experts of a group on one node, theirs.

    With groups: of all ways to share them out evenly over nodes, the least that the worst node's busiest rank can have.
    That is the node's mean rank load, or the smallest largest replica with one replica a rank of the node.
    """
    bound_by_groups = _keeps_all(problem, algorithm) and problem.nodes > 1 and problem.groups % problem.nodes == 0
    if not bound_by_groups or _sharings_of(problem) > _MOST_SHARINGS:
        return balancedness_bound(loads_LE, problem.ranks, problem.slots)
    per_node = problem.groups // problem.nodes
    ranks, slots = problem.ranks_per_node, problem.slots // problem.nodes
    loads_LGX = loads_LE.reshape(problem.layers, problem.groups, -1)
    busiest_L = {}
    for groups in combinations(range(problem.groups), per_node):
        of_node_LE = loads_LGX[:, list(groups)].reshape(problem.layers, -1)
        largest_L = least_largest_replica_L(of_node_LE, ranks, slots)
        busiest_L[groups] = np.maximum(of_node_LE.sum(axis=1) / ranks, largest_L)
    least_L = np.full(problem.layers, np.inf)
    for sharing in _sharings(tuple(range(problem.groups)), per_node):
        least_L = np.minimum(least_L, np.max([busiest_L[groups] for groups in sharing], axis=0))
    mean_L = loads_LE.sum(axis=1) / problem.ranks
    return float(np.mean(np.divide(mean_L, least_L, out=np.ones(problem.layers), where=least_L > 0)))


def _keeps_all(problem: PlacementProblem, algorithm: str) -> bool:
    """Whether no replica leaves its group's node. Moves under a budget, which are no algorithm of the registry, may."""
    known = PLACEMENTS.get(algorithm)
    return known is not None and known.keeps_groups and not (known.may_leave and problem.away_slots)


def _sharings_of(problem: PlacementProblem) -> int:
    """How many ways there are to share out the groups evenly over the nodes, whichever node is which."""
    per_node = problem.groups // problem.nodes
    same = int(factorial(per_node) ** problem.nodes) * factorial(problem.nodes)  # orders of a sharing
    return factorial(problem.groups) // same


def _sharings(groups: tuple[int, ...], per_node: int) -> Iterator[list[tuple[int, ...]]]:
    """Every way to put the groups into sets of `per_node`.

    >>> [sharing for sharing in _sharings((0, 1, 2, 3), 2)]
    [[(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0, 3), (1, 2)]]
    """
    if not groups:
        yield []
        return
    first, *others = groups
    for more in combinations(others, per_node - 1):
        left = tuple(group for group in others if group not in more)
        for sharing in _sharings(left, per_node):
            yield [(first, *more), *sharing]

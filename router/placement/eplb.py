"""EPLB: the placement that engines rebalance with, from its description by DeepSeek. Here as the baseline.

It looks at loads alone. It may put two replicas of one expert on one rank, where the second relieves nothing, since
neither of its steps asks where the other replicas are.
"""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from router.placement.bins import lpt_bins
from router.placement.problem import PlacementProblem


def eplb(problem: PlacementProblem) -> NDArray[np.int64]:
    """Slots [L, S] that balance loads over ranks; hierarchical where the groups divide over the nodes, else global.

    1. Groups, heaviest first, go to the lightest node that has not its share of groups yet.
    2. Inside a node each redundant slot, one by one, goes to the expert with the largest load per replica.
    3. Inside a node replicas, heaviest first, go to the lightest rank that has a free slot.

    Global is the same with one group and one node. Ties go to the lower index. Source: deepseek-ai/EPLB, README.
    """
    hierarchical = problem.groups % problem.nodes == 0
    groups, nodes = (problem.groups, problem.nodes) if hierarchical else (1, 1)
    slot_to_expert_LS = np.empty((problem.layers, problem.slots), dtype=np.int64)
    _plan(problem.even_where_none_LE, (groups, nodes, problem.ranks // nodes), slot_to_expert_LS)
    return slot_to_expert_LS


@numba.njit(cache=True)
def _plan(loads_LE: Any, sizes: tuple[int, int, int], slot_to_expert_LS: Any) -> None:
    """Steps 1 to 3 of `eplb`; `sizes`: groups, nodes and ranks of one node."""
    groups, nodes, ranks = sizes
    layers, experts = loads_LE.shape
    slots = slot_to_expert_LS.shape[1] // nodes
    in_group = experts // groups
    for layer in range(layers):
        load_E = loads_LE[layer]
        group_NX = lpt_bins(load_E.reshape(groups, in_group).sum(axis=1), nodes)
        for node in range(nodes):
            expert_X = np.empty(experts // nodes, dtype=np.int64)
            for place, group in enumerate(group_NX[node]):
                for member in range(in_group):
                    expert_X[place * in_group + member] = group * in_group + member
            item_S, load_S = _replicate(load_E[expert_X], slots)
            packed_GS = lpt_bins(load_S, ranks)
            for slot in range(slots):
                item = packed_GS[slot // (slots // ranks), slot % (slots // ranks)]
                slot_to_expert_LS[layer, node * slots + slot] = expert_X[item_S[item]]


@numba.njit(cache=True)
def _replicate(load_X: Any, slots: int) -> Any:
    """Of each slot, the expert (its place in `load_X`) and the load per replica: [S] and [S]."""
    replicas_X = np.ones(load_X.size, dtype=np.int64)
    item_S = np.empty(slots, dtype=np.int64)
    item_S[: load_X.size] = np.arange(load_X.size)
    for slot in range(load_X.size, slots):
        heaviest = np.argmax(load_X / replicas_X)
        replicas_X[heaviest] += 1
        item_S[slot] = heaviest
    return item_S, (load_X / replicas_X)[item_S]

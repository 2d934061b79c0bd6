"""Hierarchical placement: groups of experts to nodes, replicas inside each node. Tokens go to fewer nodes that way."""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from router.placement.bins import lpt_bins
from router.placement.pack import TOLERANCE, box_bound, search_box
from router.placement.problem import PlacementProblem
from traces.errors import InputError


def hierarchical(problem: PlacementProblem) -> NDArray[np.int64]:
    """Slots [L, S] in which every replica of an expert lies on the node of the expert's group.

    1. Groups to nodes, equally many each, by longest processing time, then by swaps: what no placement inside the nodes
       could undercut, the larger of the mean rank load and of the largest replica, is least on the worst node.
    2. In each node replicas, dealt and evened out as in `balanced`; where the worst node's bound is not reached, other
       numbers of replicas for its hot experts are tried.

    Errors: `InputError` where groups do not divide over nodes.
    """
    check_groups(problem)
    loads_LE = problem.even_where_none_LE
    slot_to_expert_LS = np.empty((problem.layers, problem.slots), dtype=np.int64)
    _fill_layers(loads_LE, problem.groups, problem.ranks_per_node, problem.nodes, slot_to_expert_LS)
    return slot_to_expert_LS


def check_groups(problem: PlacementProblem) -> None:
    """Raise `InputError` where groups do not divide over nodes."""
    if problem.groups % problem.nodes:
        raise InputError(
            f"{problem.groups} groups of experts do not divide over {problem.nodes} nodes; give the model's groups, "
            "a number of nodes that divides them, or use another placement"
        )


@numba.njit(cache=True)
def _fill_layers(loads_LE: Any, groups: int, ranks_per_node: int, nodes: int, slot_to_expert_LS: Any) -> None:
    layers, experts = loads_LE.shape
    slots_of_node = slot_to_expert_LS.shape[1] // nodes
    experts_NX = np.empty((nodes, experts // nodes), dtype=np.int64)
    load_NX = np.empty(experts_NX.shape)
    held_GP = np.empty((ranks_per_node, slots_of_node // ranks_per_node), dtype=np.int64)
    load_G = np.empty(ranks_per_node)
    for layer in range(layers):
        load_E = loads_LE[layer]
        node_of_group = groups_to_nodes(load_E, groups, nodes, ranks_per_node, slots_of_node)
        bound = 0.0
        for node in range(nodes):
            sort_experts_of(node, node_of_group, load_E, experts_NX[node], load_NX[node])
            bound = max(bound, box_bound(load_NX[node], ranks_per_node, slots_of_node))
        for node in range(nodes):
            search_box(load_NX[node], bound, held_GP, load_G)
            held_S = held_GP.reshape(-1)
            for slot in range(slots_of_node):
                slot_to_expert_LS[layer, node * slots_of_node + slot] = experts_NX[node, held_S[slot]]


@numba.njit(cache=True)
def groups_to_nodes(load_E: Any, groups: int, nodes: int, ranks_per_node: int, slots_of_node: int) -> Any:
    """The node of each group, equally many groups a node: the largest bound of a node is as low as swaps make it."""
    size = load_E.size // groups
    load_X = np.empty(groups)
    for group in range(groups):
        load_X[group] = load_E[group * size : (group + 1) * size].sum()
    node_X = np.empty(groups, dtype=np.int64)
    for node, group_X in enumerate(lpt_bins(load_X, nodes)):
        node_X[group_X] = node
    bound_N = np.empty(nodes)
    experts_X, sorted_X = np.empty(load_E.size // nodes, dtype=np.int64), np.empty(load_E.size // nodes)
    for node in range(nodes):
        sort_experts_of(node, node_X, load_E, experts_X, sorted_X)
        bound_N[node] = box_bound(sorted_X, ranks_per_node, slots_of_node)
    swapped = True
    while swapped:
        swapped = False
        worst = int(np.argmax(bound_N))
        best = (bound_N[worst] * (1 - TOLERANCE / 10), -1, -1, 0.0, 0.0)
        for mine in range(groups):
            for theirs in range(groups):
                other = node_X[theirs]
                if node_X[mine] != worst or other == worst:
                    continue
                node_X[mine], node_X[theirs] = other, worst
                sort_experts_of(worst, node_X, load_E, experts_X, sorted_X)
                bound = box_bound(sorted_X, ranks_per_node, slots_of_node)
                if bound < best[0]:
                    sort_experts_of(other, node_X, load_E, experts_X, sorted_X)
                    others = box_bound(sorted_X, ranks_per_node, slots_of_node)
                    if others < best[0]:
                        best = (max(bound, others), mine, theirs, bound, others)
                node_X[mine], node_X[theirs] = worst, other
        _, mine, theirs, bound, others = best
        if mine >= 0:
            other = node_X[theirs]
            node_X[mine], node_X[theirs] = other, worst
            bound_N[worst], bound_N[other] = bound, others
            swapped = True
    return node_X


@numba.njit(cache=True)
def sort_experts_of(node: int, node_of_group: Any, load_E: Any, experts_X: Any, load_X: Any) -> None:
    """The experts of a node's groups by falling load, ties to the lower one, and their loads."""
    size = load_E.size // node_of_group.size
    filled = 0
    for group in range(node_of_group.size):
        if node_of_group[group] == node:
            for expert in range(group * size, (group + 1) * size):
                experts_X[filled] = expert
                filled += 1
    order_X = np.argsort(-load_E[experts_X], kind="mergesort")
    experts_X[:] = experts_X[order_X]
    for place in range(filled):
        load_X[place] = load_E[experts_X[place]]

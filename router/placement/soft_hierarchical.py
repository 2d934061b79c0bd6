"""Soft-hierarchical placement: every expert at home on its group's node, some redundant slots for other nodes' experts.

Hierarchical placement keeps tokens on few nodes and pays with balance: a node with hot groups stays hot. Here redundant
slots may hold replicas of other nodes' experts, as many as `away_share` allows: a knob between the two.
"""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from router.placement.hierarchical import check_groups, groups_to_nodes, hierarchical
from router.placement.pack import pack_box
from router.placement.problem import PlacementProblem

_EVEN = 5e-3  # above the mean: what is nearer is not worth a replica on another node


def soft_hierarchical(problem: PlacementProblem) -> NDArray[np.int64]:
    """Slots [L, S] in which each expert has a replica on its group's node, and further ones there or elsewhere.

    1. Groups to nodes as in `hierarchical`, one slot at home for each expert.
    2. Redundant slots one by one, to relieve what is worst: the largest replica, or the node with the most load, of
       which the expert that sheds most gets a replica on the lightest node with room, while away slots are left.
    3. The slots that are left relieve the largest replicas at home.
    4. Inside each node replicas are dealt and evened out as in `balanced`.

    Where no slot may leave, it is `hierarchical`.

    Errors: `InputError` where groups do not divide over nodes.
    """
    if problem.away_slots == 0:
        return hierarchical(problem)
    check_groups(problem)
    slot_to_expert_LS = np.empty((problem.layers, problem.slots), dtype=np.int64)
    _fill_layers(
        problem.even_where_none_LE,
        problem.groups,
        problem.ranks_per_node,
        problem.nodes,
        problem.away_slots,
        slot_to_expert_LS,
    )
    return slot_to_expert_LS


@numba.njit(cache=True)
def _fill_layers(
    loads_LE: Any, groups: int, ranks_per_node: int, nodes: int, away: int, slot_to_expert_LS: Any
) -> None:
    layers, experts = loads_LE.shape
    slots_of_node = slot_to_expert_LS.shape[1] // nodes
    held_GP = np.empty((ranks_per_node, slots_of_node // ranks_per_node), dtype=np.int64)
    load_G = np.empty(ranks_per_node)
    for layer in range(layers):
        load_E = loads_LE[layer]
        node_of_group = groups_to_nodes(load_E, groups, nodes, ranks_per_node, slots_of_node)
        home_E = node_of_group[np.arange(experts) // (experts // groups)]
        count_NE = _replicas_by_node(load_E, home_E, nodes, ranks_per_node, slots_of_node, away)
        level_E = load_E / count_NE.sum(axis=0)
        load_NE = count_NE * level_E
        bound = max(level_E.max(), load_NE.sum(axis=1).max() / ranks_per_node)
        for node in range(nodes):
            here_X = np.flatnonzero(count_NE[node])
            here_X = here_X[np.argsort(-load_NE[node][here_X], kind="mergesort")]
            pack_box(load_NE[node][here_X], count_NE[node][here_X], bound, held_GP, load_G)
            held_S = held_GP.reshape(-1)
            for slot in range(slots_of_node):
                slot_to_expert_LS[layer, node * slots_of_node + slot] = here_X[held_S[slot]]


@numba.njit(cache=True)
def _replicas_by_node(load_E: Any, home_E: Any, nodes: int, ranks_per_node: int, slots_of_node: int, away: int) -> Any:
    """How many replicas of each expert lie on each node: [N, E]."""
    experts = load_E.size
    count_NE = np.zeros((nodes, experts), dtype=np.int64)
    for expert in range(experts):
        count_NE[home_E[expert], expert] = 1
    room_N = np.full(nodes, slots_of_node - experts // nodes)
    replicas_E = np.ones(experts, dtype=np.int64)
    level_E = load_E.copy()
    load_N = np.zeros(nodes)
    for expert in range(experts):
        load_N[home_E[expert]] += load_E[expert]
    most = ranks_per_node  # replicas of an expert on a node
    while room_N.sum() > 0:
        expert, node = _most_relief(load_E, home_E, count_NE, level_E, load_N, room_N, (ranks_per_node, most), away > 0)
        if expert < 0:
            most += ranks_per_node  # all experts are on every rank of the nodes with room already
            continue
        away -= node != home_E[expert]
        room_N[node] -= 1
        count_NE[node, expert] += 1
        replicas_E[expert] += 1
        level = load_E[expert] / replicas_E[expert]
        for other in range(nodes):
            before = (count_NE[other, expert] - (other == node)) * level_E[expert]
            load_N[other] += count_NE[other, expert] * level - before
        level_E[expert] = level
    return count_NE


@numba.njit(cache=True)
def _most_relief(
    load_E: Any, home_E: Any, count_NE: Any, level_E: Any, load_N: Any, room_N: Any, limits: Any, may_leave: bool
) -> tuple[int, int]:
    """The expert and the node of the next replica; no expert (-1) where none may have another on a node with room.

    `limits`: ranks of a node, and the replicas of an expert that it may hold.
    """
    ranks_per_node, most = limits
    worst, light = np.argmax(load_N), -1
    for node in range(load_N.size):
        if room_N[node] > 0 and (light < 0 or load_N[node] < load_N[light]):
            light = node
    largest = int(np.argmax(level_E))
    if level_E[largest] * ranks_per_node > load_N[worst]:
        home = home_E[largest]
        if room_N[home] > 0 and count_NE[home, largest] < most:
            return largest, home
        if may_leave and count_NE[light, largest] < most:
            return largest, light
    chosen, sheds = -1, 0.0
    if may_leave and load_N[worst] > (1 + _EVEN) * load_N.mean():
        for expert in range(load_E.size):
            mine, theirs = count_NE[worst, expert], count_NE[light, expert]
            if mine == 0 or theirs >= most:
                continue
            level = load_E[expert] / (np.rint(load_E[expert] / level_E[expert]) + 1) if level_E[expert] > 0 else 0.0
            shed = mine * (level_E[expert] - level)
            more = (theirs + 1) * level - theirs * level_E[expert]
            if shed > sheds and load_N[light] + more < load_N[worst]:
                chosen, sheds = expert, shed
    if chosen >= 0:
        return chosen, light
    at, stays = -1, False
    for expert in range(load_E.size):
        node = home_E[expert]
        if room_N[node] == 0 or count_NE[node, expert] == most:
            continue
        # One that is all at home first: another replica there takes no load back from other nodes.
        all_home = count_NE[:, expert].sum() == count_NE[node, expert]
        if chosen < 0 or (all_home, level_E[expert]) > (stays, level_E[chosen]):
            chosen, at, stays = expert, node, all_home
    return chosen, at

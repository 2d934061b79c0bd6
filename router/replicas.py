"""Replicas: which of an expert's slots computes a token's pair.

Either each source takes an expert's replicas in turn, all or the near ones; or a split of the whole step's rows
(`router.splits`) says how many each replica computes, which is dealt to the sources.
"""

from typing import Any, Literal, get_args

import numba
import numpy as np
from array_api_compat import is_numpy_array
from numpy.typing import NDArray

from router.assignment import Assignment
from router.backends import Array, bincount, namespace, rank_within_group
from router.placement.base import Placement
from router.splits import SPLITS, split
from router.splits.deal import deal

ReplicaChoice = Literal["even", "local", "nearest", "least_loaded", "water_filling", "fewest_active"]
REPLICA_CHOICES: tuple[ReplicaChoice, ...] = get_args(ReplicaChoice)

# How near the replicas are that a source takes in turn, where there are any: on its rank, then on its node.
_ANYWHERE, _OWN_RANK, _OWN_NODE = range(3)
_NEARNESS: dict[str, int] = {"even": _ANYWHERE, "local": _OWN_RANK, "nearest": _OWN_NODE}


def asks_counts(choice: ReplicaChoice, placement: Placement) -> bool:
    """Whether ranks must know the rows of each other's tokens before they choose."""
    return choice in SPLITS and placement.slots > placement.experts


def choose_slots(
    assignment: Assignment,
    placement: Placement,
    layer: int,
    source_rank_T: Array,
    choice: ReplicaChoice,
    *,
    node_of_G: NDArray[np.int64] | None = None,
    rows_GS: NDArray[np.int64] | None = None,
) -> Array:
    """The physical slot that computes each pair: [T, K] integer, -1 where the pair is unused or dropped.

    `even`: the pairs that one source rank sends to one expert take its replicas in turn. `local`: a replica on the
    token's own rank if there is one, else as `even`. `nearest`: the same, but before it leaves its node, in turn those
    on it; `node_of_G`: the node of each of the placement's ranks, neighbours together (None: all are on one). For these
    each source rank needs only its own tokens, so a real rank that calls this with its part of the step gets its part
    of the answer.

    `least_loaded`, `water_filling`, `fewest_active`: as the split of that name says, pairs in the order of their tokens
    to their source's share of each replica, in the order of slots. It needs the rows of the whole step: `rows_GS`, from
    `deal_rows`; None: this is the whole step.
    """
    if asks_counts(choice, placement):
        if rows_GS is None:
            rows_GE = rows_by_expert(assignment, source_rank_T, placement)
            rows_GS = deal_rows(rows_GE, placement, layer, choice, node_of_G=node_of_G)
        return _as_dealt(assignment, placement, layer, source_rank_T, rows_GS)
    if placement.slots == placement.experts:
        return _only_slots(assignment, placement, layer)
    return _in_turn(assignment, placement, layer, source_rank_T, *replica_runs(placement, layer, choice, node_of_G))


def deal_rows(
    rows_GE: NDArray[np.int64],
    placement: Placement,
    layer: int,
    choice: ReplicaChoice,
    *,
    node_of_G: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """The rows of each source rank that each slot computes, [G, S], where `choice` is a split of the whole step.

    `rows_GE`: kept pairs by source rank and expert. All who call this with the same find the same.
    """
    rows_EX = split(choice, rows_GE.sum(axis=0), placement, layer)
    return np.asarray(
        deal(
            rows_GE,
            rows_EX,
            placement.expert_slots_LEX[layer],
            placement.replicas_LE[layer],
            placement.slots_per_rank,
            _nodes(placement, node_of_G),
        )
    )


def rows_by_expert(assignment: Assignment, source_rank_T: Array, placement: Placement) -> NDArray[np.int64]:
    """Kept pairs by source rank and expert: [G, E], on the host."""
    if is_numpy_array(assignment.ids_TK):
        rows_GE = np.zeros((placement.ranks, placement.experts), dtype=np.int64)
        _count(assignment.ids_TK, assignment.kept_TK, source_rank_T, rows_GE)
        return rows_GE
    xp = namespace(assignment.ids_TK)
    groups = placement.ranks * placement.experts
    key_TK = source_rank_T[:, None] * placement.experts + assignment.ids_TK
    key_TK = xp.where(assignment.kept_TK, key_TK, xp.full_like(key_TK, groups))
    rows_N = bincount(xp.reshape(key_TK, (-1,)), groups + 1)[:groups]
    return np.asarray(rows_N.cpu().numpy().reshape(placement.ranks, placement.experts))


def replica_runs(
    placement: Placement, layer: int, choice: ReplicaChoice, node_of_G: NDArray[np.int64] | None
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The replicas that each source rank takes in turn: which one is the first, and how many, both [G, E].

    Slots, and so replicas, lie rank by rank and ranks node by node, so that those on a node are neighbours. Of several
    on the own rank it is the last alone. Splits take no turns: they have none where no expert has replicas.
    """
    first_GE, length_GE = _runs(
        placement.expert_slots_LEX[layer],
        placement.replicas_LE[layer],
        placement.slots_per_rank,
        _nodes(placement, node_of_G),
        _NEARNESS.get(choice, _ANYWHERE),
    )
    return first_GE, length_GE


def _nodes(placement: Placement, node_of_G: NDArray[np.int64] | None) -> NDArray[np.int64]:
    return np.zeros(placement.ranks, dtype=np.int64) if node_of_G is None else node_of_G


@numba.njit(cache=True)
def _runs(slots_EX: Any, replicas_E: Any, slots_per_rank: int, node_of_G: Any, nearness: int) -> Any:
    ranks, experts = node_of_G.size, replicas_E.size
    first_GE = np.zeros((ranks, experts), dtype=np.int32)
    length_GE = np.empty((ranks, experts), dtype=np.int32)
    for rank in range(ranks):
        length_GE[rank] = replicas_E
    if nearness == _ANYWHERE:
        return first_GE, length_GE
    for expert in range(experts):
        if replicas_E[expert] == 1:
            continue
        for replica in range(replicas_E[expert]):
            home = slots_EX[expert, replica] // slots_per_rank
            if nearness == _OWN_NODE:
                before = slots_EX[expert, replica - 1] // slots_per_rank if replica else -1
                is_first = replica == 0 or node_of_G[before] != node_of_G[home]
                for rank in range(ranks):
                    if node_of_G[rank] == node_of_G[home]:
                        first_GE[rank, expert] = replica if is_first else first_GE[rank, expert]
                        length_GE[rank, expert] = replica - first_GE[rank, expert] + 1
        for replica in range(replicas_E[expert]):
            home = slots_EX[expert, replica] // slots_per_rank
            first_GE[home, expert] = replica
            length_GE[home, expert] = 1
    return first_GE, length_GE


def _only_slots(assignment: Assignment, placement: Placement, layer: int) -> Array:
    """Where no expert has replicas."""
    slot_E = placement.expert_slots_LEX[layer][:, 0]
    if is_numpy_array(assignment.ids_TK):
        slot_TK = np.empty(assignment.ids_TK.shape, dtype=np.int64)
        _look_up(assignment.ids_TK, assignment.kept_TK, slot_E, slot_TK)
        return slot_TK
    xp = namespace(assignment.ids_TK)
    slots = xp.asarray(slot_E, device=assignment.ids_TK.device)
    slot_TK = slots[xp.where(assignment.kept_TK, assignment.ids_TK, xp.zeros_like(assignment.ids_TK))]
    return xp.where(assignment.kept_TK, slot_TK, xp.full_like(slot_TK, -1))


def _in_turn(
    assignment: Assignment, placement: Placement, layer: int, source_rank_T: Array, first_GE: Any, length_GE: Any
) -> Array:
    """Each source starts at another replica of its run, so that small steps do not all go to the first one."""
    slots_EX = placement.expert_slots_LEX[layer]
    if is_numpy_array(assignment.ids_TK):
        slot_TK = np.empty(assignment.ids_TK.shape, dtype=np.int64)
        _take_turns(assignment.ids_TK, assignment.kept_TK, source_rank_T, slots_EX, first_GE, length_GE, slot_TK)
        return slot_TK
    xp = namespace(assignment.ids_TK)
    expert_TK, source_TK, turn_TK = _turns(assignment, placement, source_rank_T)
    slots, first, length = (xp.asarray(on_host, device=expert_TK.device) for on_host in (slots_EX, first_GE, length_GE))
    replica_TK = first[source_TK, expert_TK] + (turn_TK + source_TK) % length[source_TK, expert_TK]
    slot_TK = slots[expert_TK, replica_TK]
    return xp.where(assignment.kept_TK, slot_TK, xp.full_like(slot_TK, -1))


def _as_dealt(
    assignment: Assignment, placement: Placement, layer: int, source_rank_T: Array, rows_GS: NDArray[np.int64]
) -> Array:
    """Each source's pairs of an expert fill its shares of the replicas, one after the other."""
    slots_EX = placement.expert_slots_LEX[layer]
    if is_numpy_array(assignment.ids_TK):
        slot_TK = np.empty(assignment.ids_TK.shape, dtype=np.int64)
        _fill_shares(
            assignment.ids_TK,
            assignment.kept_TK,
            source_rank_T,
            slots_EX,
            placement.replicas_LE[layer],
            rows_GS.copy(),
            slot_TK,
        )
        return slot_TK
    xp = namespace(assignment.ids_TK)
    expert_TK, source_TK, turn_TK = _turns(assignment, placement, source_rank_T)
    slots, rows = (xp.asarray(values, device=expert_TK.device) for values in (slots_EX, rows_GS))
    slots_TKX = slots[expert_TK]
    share_TKX = rows[source_TK[:, :, None], xp.where(slots_TKX >= 0, slots_TKX, xp.zeros_like(slots_TKX))]
    filled_TKX = turn_TK[:, :, None] >= xp.cumulative_sum(share_TKX, axis=-1)
    replica_TK = xp.sum(xp.astype(filled_TKX, xp.int64), axis=-1)
    slot_TK = slots[expert_TK, xp.where(assignment.kept_TK, replica_TK, xp.zeros_like(replica_TK))]
    return xp.where(assignment.kept_TK, slot_TK, xp.full_like(slot_TK, -1))


def _turns(assignment: Assignment, placement: Placement, source_rank_T: Array) -> tuple[Array, Array, Array]:
    """The expert of each pair, its source, and how many of the source's pairs come before it there: all [T, K].

    Expert 0 for dropped pairs, which take no turn.
    """
    xp = namespace(assignment.ids_TK)
    kept_TK = assignment.kept_TK
    expert_TK = xp.where(kept_TK, assignment.ids_TK, xp.zeros_like(assignment.ids_TK))
    source_TK = xp.broadcast_to(source_rank_T[:, None], expert_TK.shape)
    groups = placement.ranks * placement.experts
    key_TK = xp.where(kept_TK, source_TK * placement.experts + expert_TK, xp.full_like(expert_TK, groups))
    turn_TK = xp.reshape(rank_within_group(xp.reshape(key_TK, (-1,)), groups + 1), key_TK.shape)
    return expert_TK, source_TK, turn_TK


@numba.njit(cache=True)
def _count(ids_TK: Any, kept_TK: Any, source_rank_T: Any, rows_GE: Any) -> None:
    for token in range(ids_TK.shape[0]):
        source = np.uintp(source_rank_T[token])
        for column in range(ids_TK.shape[1]):
            if kept_TK[token, column]:
                rows_GE[source, np.uintp(ids_TK[token, column])] += 1


@numba.njit(cache=True)
def _look_up(ids_TK: Any, kept_TK: Any, slot_E: Any, slot_TK: Any) -> None:
    for token in range(ids_TK.shape[0]):
        for column in range(ids_TK.shape[1]):
            slot_TK[token, column] = slot_E[np.uintp(ids_TK[token, column])] if kept_TK[token, column] else -1


@numba.njit(cache=True)
def _take_turns(
    ids_TK: Any, kept_TK: Any, source_rank_T: Any, slots_EX: Any, first_GE: Any, length_GE: Any, slot_TK: Any
) -> None:
    """`_in_turn` on numpy arrays."""
    next_GE = first_GE.copy()  # whose turn it is
    for rank in range(first_GE.shape[0]):
        for expert in range(first_GE.shape[1]):
            next_GE[rank, expert] += rank % length_GE[rank, expert]
    for token in range(ids_TK.shape[0]):
        source = np.uintp(source_rank_T[token])
        for column in range(ids_TK.shape[1]):
            if not kept_TK[token, column]:
                slot_TK[token, column] = -1
                continue
            asked = np.uintp(ids_TK[token, column])
            replica = next_GE[source, asked]
            first = first_GE[source, asked]
            next_GE[source, asked] = replica + 1 if replica + 1 < first + length_GE[source, asked] else first
            slot_TK[token, column] = slots_EX[asked, np.uintp(replica)]


@numba.njit(cache=True)
def _fill_shares(
    ids_TK: Any, kept_TK: Any, source_rank_T: Any, slots_EX: Any, replicas_E: Any, left_GS: Any, slot_TK: Any
) -> None:
    """`_as_dealt` on numpy arrays; `left_GS` counts down to 0."""
    for token in range(ids_TK.shape[0]):
        source = np.uintp(source_rank_T[token])
        for column in range(ids_TK.shape[1]):
            slot_TK[token, column] = -1
            if not kept_TK[token, column]:
                continue
            expert = np.uintp(ids_TK[token, column])
            for replica in range(replicas_E[expert]):
                slot = np.uintp(slots_EX[expert, replica])
                if left_GS[source, slot] > 0:
                    left_GS[source, slot] -= 1
                    slot_TK[token, column] = slots_EX[expert, replica]
                    break
            assert slot_TK[token, column] >= 0  # rows were dealt of other counts than these

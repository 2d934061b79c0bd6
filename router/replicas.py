"""Replicas: which of an expert's slots computes a token's pair."""

from typing import Any, Literal

import numba
import numpy as np
from array_api_compat import is_numpy_array

from router.assignment import Assignment
from router.backends import Array, namespace, rank_within_group
from router.placement.base import Placement

ReplicaChoice = Literal["even", "local"]


def choose_slots(
    assignment: Assignment, placement: Placement, layer: int, source_rank_T: Array, choice: ReplicaChoice
) -> Array:
    """The physical slot that computes each pair: [T, K] integer, -1 where the pair is unused or dropped.

    `even`: the pairs that one source rank sends to one expert take its replicas in turn. `local`: a replica on the
    token's own rank if there is one, else as `even`. Each source rank needs only its own tokens, so a real rank
    that calls this with its part of the step gets its part of the answer.
    """
    if is_numpy_array(assignment.ids_TK):
        slot_TK = np.empty(assignment.ids_TK.shape, dtype=np.int64)
        _choose(
            assignment.ids_TK,
            assignment.kept_TK,
            source_rank_T,
            placement.expert_slots_LEX[layer],
            placement.replicas_LE[layer],
            (placement.ranks, placement.slots_per_rank if choice == "local" else 0),
            slot_TK,
        )
        return slot_TK
    xp = namespace(assignment.ids_TK)
    device = assignment.ids_TK.device
    slots_EX = xp.asarray(placement.expert_slots_LEX[layer], device=device)
    replicas_E = xp.asarray(placement.replicas_LE[layer], device=device)
    kept_TK = assignment.kept_TK
    expert_TK = xp.where(kept_TK, assignment.ids_TK, xp.zeros_like(assignment.ids_TK))
    if slots_EX.shape[1] == 1:
        slot_TK = slots_EX[:, 0][expert_TK]
    else:
        source_TK = xp.broadcast_to(source_rank_T[:, None], expert_TK.shape)
        groups = placement.ranks * placement.experts
        key_TK = xp.where(kept_TK, source_TK * placement.experts + expert_TK, xp.full_like(expert_TK, groups))
        turn_TK = xp.reshape(rank_within_group(xp.reshape(key_TK, (-1,)), groups + 1), key_TK.shape)
        # Each source starts at another replica, so that small steps do not all go to the first one.
        replica_TK = (turn_TK + source_TK) % replicas_E[expert_TK]
        slot_TK = slots_EX[expert_TK, replica_TK]
        if choice == "local":
            rank_EX = xp.where(slots_EX >= 0, slots_EX // placement.slots_per_rank, slots_EX)
            is_local_TKX = rank_EX[expert_TK] == source_TK[:, :, None]
            local_slot_TK = xp.max(
                xp.where(is_local_TKX, slots_EX[expert_TK], xp.full_like(rank_EX[expert_TK], -1)), axis=-1
            )
            slot_TK = xp.where(local_slot_TK >= 0, local_slot_TK, slot_TK)
    return xp.where(kept_TK, slot_TK, xp.full_like(slot_TK, -1))


@numba.njit(cache=True)
def _choose(
    ids_TK: Any,
    kept_TK: Any,
    source_rank_T: Any,
    slots_EX: Any,
    replicas_E: Any,
    setting: tuple[int, int],
    slot_TK: Any,
) -> None:
    """`choose_slots` on numpy arrays; `setting`: ranks, and the slots of one where local replicas go first (else 0)."""
    ranks, local_slots = setting
    several = slots_EX.shape[1] > 1
    next_GE = np.zeros((ranks, replicas_E.size) if several else (1, 1), dtype=np.int32)  # whose turn it is
    if several:
        for rank in range(ranks):
            for expert in range(replicas_E.size):
                next_GE[rank, expert] = rank % replicas_E[expert]
    for token in range(ids_TK.shape[0]):
        source = np.uintp(source_rank_T[token])
        for column in range(ids_TK.shape[1]):
            if not kept_TK[token, column]:
                slot_TK[token, column] = -1
                continue
            chosen: Any = np.uintp(ids_TK[token, column])
            replica: Any = np.int64(0)
            if several:
                replica = next_GE[source, chosen]
                next_GE[source, chosen] = replica + 1 if replica + 1 < replicas_E[chosen] else 0
                if local_slots:
                    for other in range(replicas_E[chosen]):
                        if slots_EX[chosen, other] // local_slots == source_rank_T[token]:
                            replica = other
            slot_TK[token, column] = slots_EX[chosen, np.uintp(replica)]

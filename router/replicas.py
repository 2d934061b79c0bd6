"""Replicas: which of an expert's slots computes a token's pair."""

from typing import Literal

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

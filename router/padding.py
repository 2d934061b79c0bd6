"""Padding: how many places a capacity that pads gives to each expert, and how they lie over the expert's slots."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.assignment import Assignment
from router.backends import Array
from router.candidates import Candidates
from router.capacity import Limit
from router.context import RouteContext
from router.placement.base import Placement
from router.replicas import ReplicaChoice


def places_by_scope(
    limit: Limit, assignment: Assignment, source_rank_T: Array, ranks: int, experts: int
) -> NDArray[np.int64]:
    """The places of each expert: by source rank, [G], or for all of them, [1], where that is the limit's scope."""
    routed = Candidates(
        ids_TC=assignment.ids_TK,
        probs_TC=assignment.scores_TK,
        source_rank_T=source_rank_T,
        experts=experts,
        score_kind="none",
    )
    context = RouteContext(layer=0, ranks=ranks, renormalise=False)
    return np.array(limit.places_of(assignment, routed, context), dtype=np.int64)


def places_by_slot(
    places_G: NDArray[Any], placement: Placement, layer: int, group_of_G: NDArray[Any], choice: ReplicaChoice
) -> NDArray[np.int64]:
    """The places that each source has in each slot, [G, S], where source g has `places_G[g]` for every expert.

    They lie as that many pairs for each expert would: taking replicas in turn, or all on the source's own rank where
    `choice` is `local` and the expert is there. `group_of_G`: the placement's rank that each source belongs to.
    """
    slot_S = np.arange(placement.slots)
    expert_S = placement.slot_to_expert_LS[layer]
    replicas_S = placement.replicas_LE[layer][expert_S]
    number_S = (placement.expert_slots_LEX[layer][expert_S] == slot_S[:, None]).argmax(axis=1)
    turn_GS = (number_S - group_of_G[:, None]) % replicas_S
    places_GS = (places_G[:, None] - turn_GS + replicas_S - 1) // replicas_S
    if choice == "local":
        own_GS = slot_S // placement.slots_per_rank == group_of_G[:, None]
        for source, own_S in enumerate(own_GS):
            at_home_S = np.isin(expert_S, expert_S[own_S])
            last_own = {int(expert_S[slot]): int(slot) for slot in np.flatnonzero(own_S)}
            places_GS[source, at_home_S] = 0
            places_GS[source, list(last_own.values())] = places_G[source]
    return np.asarray(places_GS, dtype=np.int64)

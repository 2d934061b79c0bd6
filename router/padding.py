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
from router.replicas import ReplicaChoice, asks_counts, replica_runs
from traces.errors import InputError


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


def check_padding(choice: ReplicaChoice, placement: Placement) -> None:
    """Raise `InputError` for a choice by the whole step's counts: places lie fixed before anyone knows them."""
    if asks_counts(choice, placement):
        raise InputError(
            f"replica_choice {choice}, but the capacity pads: its places are fixed before counts are known; "
            "use even, local or nearest, or pad: false"
        )


def places_by_slot(
    places_G: NDArray[Any],
    placement: Placement,
    layer: int,
    group_of_G: NDArray[Any],
    choice: ReplicaChoice,
    node_of_G: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """The places that each source has in each slot, [G, S], where source g has `places_G[g]` for every expert.

    They lie as that many pairs for each expert would, on the replicas that `choose_slots` takes in turn; `node_of_G` as
    there. `group_of_G`: the placement's rank that each source belongs to. Errors: as `check_padding`.
    """
    check_padding(choice, placement)
    expert_S = placement.slot_to_expert_LS[layer]
    replica_S = (placement.expert_slots_LEX[layer][expert_S] == np.arange(placement.slots)[:, None]).argmax(axis=1)
    first_GS, length_GS = (
        run_GE[group_of_G][:, expert_S] for run_GE in replica_runs(placement, layer, choice, node_of_G)
    )
    turn_GS = (replica_S - first_GS - group_of_G[:, None]) % length_GS
    places_GS = (places_G[:, None] - turn_GS + length_GS - 1) // length_GS
    in_run_GS = (first_GS <= replica_S) & (replica_S < first_GS + length_GS)
    return np.asarray(np.where(in_run_GS, places_GS, 0), dtype=np.int64)

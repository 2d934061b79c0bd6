"""Lost ranks: what remains of a placement when a rank is gone."""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from router.placement.base import Placement
from router.placement.problem import check_loads
from traces.errors import InputError


def without_rank(placement: Placement, lost: int, loads_LE: NDArray[np.integer | np.floating]) -> Placement:
    """The placement on the other ranks, renumbered in order, with every expert that only the lost rank held put back.

    Heaviest first, such an expert takes the slot of a replica: the one after whose loss, with the load shared evenly
    by those that remain, the fullest of the ranks that change has the least load. Nothing else moves; the result may be
    made better with `router.moves.improve`. Which experts stay in memory is to be chosen anew.

    Errors: `InputError` if there is no such rank, it is the only one, the other slots cannot hold all experts, or the
    loads are of other layers or experts.
    """
    if not 0 <= lost < placement.ranks:
        raise InputError(f"rank {lost} is gone, but there are only ranks 0 to {placement.ranks - 1}")
    if placement.ranks == 1:
        raise InputError("rank 0 is gone, and there is no other; use at least 2 ranks")
    ranks, size = placement.ranks - 1, placement.slots_per_rank
    if ranks * size < placement.experts:
        raise InputError(
            f"{ranks} ranks × {size} slots hold {ranks * size}, fewer than {placement.experts} experts; "
            "add redundant slots"
        )
    load_LE = np.ascontiguousarray(loads_LE, dtype=np.float64)
    check_loads(load_LE)
    if load_LE.shape != (placement.layers, placement.experts):
        raise InputError(
            f"loads of shape {load_LE.shape} for a placement of {placement.layers} layers of {placement.experts} "
            "experts; give one a layer and expert"
        )
    remaining_LS = np.delete(placement.slot_to_expert_LS, np.s_[lost * size : (lost + 1) * size], axis=1)
    remaining_LS = np.ascontiguousarray(remaining_LS, dtype=np.int64)
    for expert_S, load_E in zip(remaining_LS, load_LE, strict=True):
        _put_back(expert_S, load_E, np.argsort(-load_E, kind="stable"), ranks)
    return Placement(slot_to_expert_LS=remaining_LS, experts=placement.experts, ranks=ranks)


@numba.njit(cache=True)
def _put_back(expert_S: Any, load_E: Any, heaviest_first_E: Any, ranks: int) -> None:
    """Give slots of replicas to the experts without any, in place."""
    size = expert_S.size // ranks
    replicas_E = np.zeros(load_E.size, dtype=np.int64)
    for expert in expert_S:
        replicas_E[expert] += 1
    load_G = np.zeros(ranks)
    for slot, expert in enumerate(expert_S):
        load_G[slot // size] += load_E[expert] / replicas_E[expert]
    for orphan in heaviest_first_E:
        if replicas_E[orphan]:
            continue
        best_slot, best_most = -1, np.inf
        for slot, given in enumerate(expert_S):
            if replicas_E[given] > 1:
                most = _most_after(expert_S, load_E, replicas_E, load_G, slot, orphan)
                if most < best_most:
                    best_slot, best_most = slot, most
        given = expert_S[best_slot]
        more = load_E[given] / (replicas_E[given] - 1) - load_E[given] / replicas_E[given]
        load_G[best_slot // size] += load_E[orphan] - load_E[given] / replicas_E[given]
        expert_S[best_slot] = orphan
        for slot, expert in enumerate(expert_S):
            if expert == given:
                load_G[slot // size] += more
        replicas_E[given] -= 1
        replicas_E[orphan] = 1


@numba.njit(cache=True)
def _most_after(expert_S: Any, load_E: Any, replicas_E: Any, load_G: Any, slot: int, orphan: int) -> float:
    """The load of the fullest rank that changes if `orphan` takes `slot`."""
    size = expert_S.size // load_G.size
    given = expert_S[slot]
    share = load_E[given] / replicas_E[given]
    more = load_E[given] / (replicas_E[given] - 1) - share
    most = 0.0
    for rank in range(load_G.size):
        after, changes = load_G[rank], False
        for other in range(rank * size, (rank + 1) * size):
            if other == slot:
                after += load_E[orphan] - share
                changes = True
            elif expert_S[other] == given:
                after += more
                changes = True
        if changes:
            most = max(most, after)
    return most

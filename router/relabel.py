"""Relabel: another placement's ranks renumbered, so that few of its experts need to move."""

import numpy as np
from numpy.typing import NDArray

from router.matching import matched_ranks
from router.placement.base import Placement
from traces.errors import InputError


def relabel(before: Placement, after: Placement, *, nodes: int = 1) -> Placement:
    """`after` with its ranks renumbered, layer by layer, so that as few slots as possible change their expert's rank.

    All ranks have equal slots and links, so that any order of them is as good; a plan made anew gives them at random.
    Where `nodes` are more than one, ranks that `after` has on one node stay on one node together: nodes are renumbered
    as wholes, and ranks within them (`router.matching`).

    Errors: `InputError` if the placements are not of the same layers, experts and ranks, or ranks do not divide over
    nodes.
    """
    if (before.layers, before.experts, before.ranks) != (after.layers, after.experts, after.ranks):
        raise InputError(
            f"a placement of {after.layers} layers of {after.experts} experts on {after.ranks} ranks cannot take the "
            f"numbers of one of {before.layers} of {before.experts} on {before.ranks}; give two of the same"
        )
    if nodes < 1 or after.ranks % nodes:
        raise InputError(f"{after.ranks} ranks do not divide over {nodes} nodes; use a divisor of the ranks")
    slots_LGS = after.slot_to_expert_LS.reshape(after.layers, after.ranks, -1)
    resident_LGS = None if after.resident_LS is None else after.resident_LS.reshape(slots_LGS.shape)
    from_LG = np.stack([matched_ranks(kept_GG, nodes) for kept_GG in _kept_LGG(before, after)])
    layer_L1 = np.arange(after.layers)[:, None]
    return Placement(
        slot_to_expert_LS=slots_LGS[layer_L1, from_LG].reshape(after.layers, -1),
        experts=after.experts,
        ranks=after.ranks,
        resident_LS=None if resident_LGS is None else resident_LGS[layer_L1, from_LG].reshape(after.layers, -1),
    )


def _kept_LGG(before: Placement, after: Placement) -> NDArray[np.float32]:
    """The slots of a rank of `after` whose expert a rank of `before` holds: [L, G before, G after]."""
    held_LGE = (_slots_LGE(before) > 0).astype(np.float32)
    return np.asarray(held_LGE @ _slots_LGE(after).transpose(0, 2, 1))


def _slots_LGE(placement: Placement) -> NDArray[np.float32]:
    """How many slots of each rank hold each expert."""
    slots_LGE = np.zeros((placement.layers, placement.ranks, placement.experts), dtype=np.float32)
    rank_S = np.arange(placement.slots) // placement.slots_per_rank
    np.add.at(slots_LGE, (np.arange(placement.layers)[:, None], rank_S[None], placement.slot_to_expert_LS), 1)
    return slots_LGE

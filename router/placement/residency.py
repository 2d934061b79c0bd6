"""Residency: which slots keep their expert in GPU memory, where it cannot hold them all."""

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from router.placement.base import Placement
from traces.errors import InputError

_ROUNDING = 1e-9  # 0.07 of 100 slots are 7, though floats say a little more


def keep_resident(placement: Placement, loads_LE: NDArray[np.integer | np.floating], share: float) -> Placement:
    """The placement with `share` of each rank's slots resident in every layer, rounded up: those of most earlier load.

    Replicas share an expert's load evenly; of equal loads the lower slot stays. The experts of all other slots lie in
    host memory, and are loaded in each step in which they have a row. A share of 1 changes nothing. Errors:
    `InputError` unless 0 < share <= 1.
    """
    if not 0 < share <= 1:
        raise InputError(f"resident_share is {share:g}; it must be above 0, and 1 where all experts fit")
    if share == 1:
        return placement
    kept = max(math.ceil(share * placement.slots_per_rank - _ROUNDING), 1)
    of_replica_LE = np.asarray(loads_LE, dtype=np.float64) / placement.replicas_LE
    load_LS = np.take_along_axis(of_replica_LE, placement.slot_to_expert_LS, axis=1)
    load_LGS = load_LS.reshape(placement.layers, placement.ranks, -1)
    order_LGS = np.argsort(-load_LGS, axis=2, kind="stable")
    resident_LGS = np.zeros(load_LGS.shape, dtype=np.bool_)
    np.put_along_axis(resident_LGS, order_LGS[:, :, :kept], True, axis=2)
    return replace(placement, resident_LS=resident_LGS.reshape(load_LS.shape))

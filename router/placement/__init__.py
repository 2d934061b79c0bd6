"""Placement algorithms by name. A placement is planned from earlier traffic, never from the step it serves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.placement.active_aware import active_aware
from router.placement.affinity import affinity
from router.placement.balanced import balanced
from router.placement.base import Placement
from router.placement.contiguous import contiguous
from router.placement.cost_aware import cost_aware
from router.placement.eplb import eplb
from router.placement.hierarchical import hierarchical
from router.placement.lpt import lpt
from router.placement.permuted import permuted
from router.placement.problem import Need, PlacementProblem
from router.placement.round_robin import round_robin
from router.placement.soft_hierarchical import soft_hierarchical
from traces.errors import InputError

_LACKS: dict[Need, str] = {
    "steps": "the loads of single steps, which a file of loads may have too",
    "tokens": "the experts of single tokens",
    "seconds": "a cost model",
}


@dataclass(frozen=True, slots=True)
class PlacementAlgorithm:
    """`plan`: from a problem to the expert of each slot [L, S]; `needs`: what it reads beside the loads.

    `keeps_groups`: the model's groups of experts lie on one node each. `may_leave`: as many redundant slots as
    `away_share` allows may hold experts of groups of other nodes all the same. `numbered`: the number that a rank has
    matters, as where tokens are to stay on it from layer to layer.
    """

    plan: Callable[[PlacementProblem], NDArray[np.int64]]
    source: str
    needs: tuple[Need, ...] = ()
    keeps_groups: bool = False
    may_leave: bool = False
    numbered: bool = False


PLACEMENTS: dict[str, PlacementAlgorithm] = {
    "contiguous": PlacementAlgorithm(contiguous, "what engines do by default", numbered=True),
    "round_robin": PlacementAlgorithm(round_robin, "vLLM"),
    "random": PlacementAlgorithm(permuted, "the honest baseline"),
    "lpt": PlacementAlgorithm(lpt, "Graham 1969"),
    "eplb": PlacementAlgorithm(eplb, "DeepSeek's EPLB"),
    "balanced": PlacementAlgorithm(balanced, "moeroute"),
    "hierarchical": PlacementAlgorithm(hierarchical, "moeroute, after DeepSeek's EPLB", keeps_groups=True),
    "soft_hierarchical": PlacementAlgorithm(soft_hierarchical, "moeroute", keeps_groups=True, may_leave=True),
    "active_aware": PlacementAlgorithm(active_aware, "moeroute, after METRO, arXiv 2512.09277", ("steps",)),
    "affinity": PlacementAlgorithm(affinity, "moeroute, after ExFlow, arXiv 2401.08383", ("tokens",), numbered=True),
    "cost_aware": PlacementAlgorithm(cost_aware, "moeroute", ("steps", "seconds")),
}


def plan(algorithm: str, problem: PlacementProblem) -> Placement:
    """Place the experts of each layer; equal problems have equal placements.

    Errors: `InputError` for an unknown algorithm, or one that reads what the problem does not know.
    """
    if algorithm not in PLACEMENTS:
        raise InputError(f"unknown placement {algorithm!r}; known are {', '.join(sorted(PLACEMENTS))}")
    chosen = PLACEMENTS[algorithm]
    for need in chosen.needs:
        if not problem.knows(need):
            raise InputError(f"placement {algorithm} needs {_LACKS[need]}; plan it from a trace")
    return Placement(slot_to_expert_LS=chosen.plan(problem), experts=problem.experts, ranks=problem.ranks)


def place(
    algorithm: str, loads_LE: NDArray[np.integer | np.floating], *, ranks: int, slots: int, **more: Any
) -> Placement:
    """Place the experts of each layer by their earlier loads `loads_LE` (any unit) into `slots` slots on `ranks` ranks.

    `more`: what else a `PlacementProblem` may know. Errors: as `plan` and `PlacementProblem`.
    """
    return plan(algorithm, PlacementProblem(loads_LE=loads_LE.astype(np.float64), ranks=ranks, slots=slots, **more))

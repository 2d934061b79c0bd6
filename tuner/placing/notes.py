"""Notes: what there is to say about a question before its answer."""

import numpy as np
from numpy.typing import NDArray

from router.placement.problem import PlacementProblem
from tuner.placing.request import PlacingRequest


def notes_on(request: PlacingRequest, problem: PlacementProblem) -> list[str]:
    """What was taken for granted, and what a rank that is gone, groups on one node and layers without load mean."""
    return [
        *_about_now(request, problem.experts),
        *_about_the_gone(request),
        *_about_groups(request, problem),
        *_without_load(problem.loads_LE),
    ]


def facts_on(request: PlacingRequest, problem: PlacementProblem) -> str:
    """Where the ranks lie, and what the plan is compared with."""
    where = f"{problem.ranks} ranks on {problem.nodes} node{'s' if problem.nodes > 1 else ''}"
    groups = f", {problem.groups} groups of experts" if problem.groups > 1 else ""
    now = "contiguous" if request.current_LS is None else "as given"
    return f"{where}{groups}. Now: {now}; random: experts in random order, as many slots."


def _about_now(request: PlacingRequest, experts: int) -> list[str]:
    if request.current_LS is not None:
        return []
    taken = f"taken as contiguous in {request.slots_for(experts)} slots"
    return [f"what runs now was not given: {taken}; --current FILE says it"]


def _about_the_gone(request: PlacingRequest) -> list[str]:
    gone = request.gone
    if gone is None:
        return []
    now = "what runs now is what is left, with the experts that only it held put back in place of replicas"
    uneven = "; nodes are uneven without it, so plans take all ranks for neighbours" if request.nodes > 1 else ""
    notes = [f"rank {gone} is gone: {now}{uneven}"]
    if gone < request.ranks - 1:
        notes.append(f"ranks are numbered without it: rank R of the plan is rank R + 1 from R = {gone} on")
    return notes


def _about_groups(request: PlacingRequest, problem: PlacementProblem) -> list[str]:
    if request.asks_for_groups and problem.nodes == 1:
        return [f"on one node all {problem.groups} groups are together, whatever the plan"]
    return []


def _without_load(loads_LE: NDArray[np.float64]) -> list[str]:
    empty = np.flatnonzero(loads_LE.sum(axis=1) == 0).tolist()
    if not empty:
        return []
    which = f"layer {empty[0]} has" if len(empty) == 1 else f"layers {', '.join(map(str, empty))} have"
    return [f"{which} no load: placed as if every expert had the same"]

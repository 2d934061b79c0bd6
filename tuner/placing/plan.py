"""Plans: what runs now, and what each algorithm makes of the traffic, timed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from time import process_time
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from router.balance import moved_share
from router.lost_ranks import without_rank
from router.moves import improve
from router.placement import PLACEMENTS, plan
from router.placement.base import Placement, slots_in
from router.placement.problem import PlacementProblem
from router.relabel import relabel
from traces.errors import InputError
from traces.progress import Progress, quiet
from tuner.placing.current import placement_of
from tuner.placing.request import BEST, MOVES, PlacingRequest

T = TypeVar("T")

BASELINES = ("contiguous", "random")
_TIMED, _TIMED_S = 5, 0.2  # so often, or until it took so long


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Plan:
    """A placement, planned in `plan_s` of processor time; `moved_share` of its slots are new to their rank."""

    algorithm: str
    placement: Placement
    plan_s: float
    moved_share: float


def problem_of(
    request: PlacingRequest,
    loads_LE: NDArray[np.float64],
    *,
    steps_WLE: NDArray[np.integer] | None = None,
    model_groups: int = 1,
) -> PlacementProblem:
    """The request with its loads, on the ranks that are left: without a rank, nodes are uneven and count as one.

    Where no groups are asked for, they are the model's, and any redundant slot may leave its group's node.

    Errors: `InputError` as `PlacementProblem`, and for slots that may leave groups that there are not.
    """
    groups = model_groups if request.groups is None else request.groups
    away_share = request.away_share
    if away_share is None:
        away_share = 0.0 if request.asks_for_groups else 1.0
    elif groups == 1:
        raise InputError(f"an away_share of {away_share:g} is of slots that leave their group's node; give groups too")
    ranks, nodes, slots = request.ranks, request.nodes, request.slots_for(loads_LE.shape[1])
    if request.gone is not None:
        ranks, nodes, slots = ranks - 1, 1, slots - slots // ranks
    return PlacementProblem(
        loads_LE=loads_LE,
        ranks=ranks,
        slots=slots,
        nodes=nodes,
        groups=groups,
        away_share=away_share,
        seed=request.seed,
        steps_WLE=steps_WLE,
    )


def running_now(request: PlacingRequest, loads_LE: NDArray[np.float64]) -> Placement:
    """The placement before: the one that is given, or contiguous; where a rank is gone, as it gets on without it.

    Errors: `InputError` where it is of another model, or does not hold the experts.
    """
    layers, experts = loads_LE.shape
    if request.current_LS is None:
        every_rank = PlacementProblem(loads_LE=loads_LE, ranks=request.ranks, slots=request.slots_for(experts))
        before = plan("contiguous", every_rank)
    else:
        before = placement_of(request.current_LS, layers=layers, experts=experts, ranks=request.ranks)
        if request.budget_share is not None and before.slots != request.slots_for(experts):
            raise InputError(
                f"a budget moves slots of the placement that runs now, which has {before.slots}, "
                f"not {request.slots_for(experts)}; ask for {before.slots} slots or leave out the budget"
            )
    return before if request.gone is None else without_rank(before, request.gone, loads_LE)


def plans_of(
    request: PlacingRequest,
    problem: PlacementProblem,
    before: Placement,
    algorithms: Sequence[str],
    progress: Progress = quiet,
) -> list[Plan]:
    """A plan by each of the algorithms, their ranks renumbered so that as few slots as possible move.

    Which number a rank has changes nothing but what must be copied, unless the algorithm means it.
    """
    made = []
    for place, algorithm in enumerate(algorithms):
        progress(place / len(algorithms), f"planning: {algorithm}")
        placement, plan_s = _timed(algorithm, request, problem, before)
        if algorithm != MOVES and not PLACEMENTS[algorithm].numbered:
            placement = relabel(before, placement, nodes=problem.nodes)
        made.append(
            Plan(
                algorithm=algorithm,
                placement=placement,
                plan_s=plan_s,
                moved_share=moved_share(before, placement),
            )
        )
    return made


def servable(request: PlacingRequest, problem: PlacementProblem) -> list[str]:
    """The algorithms to choose from: the one asked for, or moves under the budget, or all that what is known serves.

    Groups that were asked for are kept on nodes; those that the model has may be, if they divide over nodes.
    """
    if request.budget_share is not None:
        return [MOVES]
    if request.algorithm != BEST:
        return [request.algorithm]
    by_groups = _by_groups(problem)
    on_nodes = problem.groups > 1 and problem.nodes > 1
    if on_nodes and request.asks_for_groups:
        return by_groups
    if not on_nodes or problem.groups % problem.nodes:
        by_groups = []
    return [
        name
        for name, algorithm in PLACEMENTS.items()
        if all(problem.knows(need) for need in algorithm.needs)
        and name != "random"
        and (not algorithm.keeps_groups or name in by_groups)
    ]


def best_by_tokens(request: PlacingRequest, problem: PlacementProblem) -> str:
    """The algorithm that balances tokens best; groups stay on their nodes but for the share that may leave."""
    if request.budget_share is not None:
        return MOVES
    if request.algorithm != BEST:
        return request.algorithm
    if problem.groups == 1 or problem.nodes == 1:
        return "balanced"
    return "soft_hierarchical" if problem.away_slots else "hierarchical"


def _by_groups(problem: PlacementProblem) -> list[str]:
    """The algorithms that keep groups on nodes, but for those that plan as others do where no slot may leave."""
    return [
        name
        for name, algorithm in PLACEMENTS.items()
        if algorithm.keeps_groups and (problem.away_slots or not algorithm.may_leave)
    ]


def _timed(
    algorithm: str, request: PlacingRequest, problem: PlacementProblem, before: Placement
) -> tuple[Placement, float]:
    """A plan and its processor time: of the algorithm alone, the median of a few times, or of one where it takes long.

    The first layer is planned before, alone, so that nothing is left to compile.
    """
    if algorithm == MOVES:
        return _timed_moves(request, problem, before)
    plan(algorithm, _first_layer(problem))  # says too what the algorithm needs and the problem lacks
    slots_LS, plan_s = _median_s(lambda: PLACEMENTS[algorithm].plan(problem))
    return Placement(slot_to_expert_LS=slots_LS, experts=problem.experts, ranks=problem.ranks), plan_s


def _timed_moves(request: PlacingRequest, problem: PlacementProblem, before: Placement) -> tuple[Placement, float]:
    assert request.budget_share is not None
    slots = before.slot_to_expert_LS.size
    fills = slots_in(request.budget_share, slots)
    if fills == 0:
        raise InputError(
            f"a budget of {request.budget_share:g} of {slots} slots moves none; give more: one slot is {1 / slots:.2g}"
        )
    improve(before.take(np.zeros(1, dtype=np.int64)), problem.loads_LE[:1], fills=fills)
    return _median_s(lambda: improve(before, problem.loads_LE, fills=fills))


def _median_s(planned: Callable[[], T]) -> tuple[T, float]:
    times_s: list[float] = []
    while len(times_s) < _TIMED and sum(times_s) < _TIMED_S:
        start_s = process_time()
        result = planned()
        times_s.append(process_time() - start_s)
    return result, median(times_s)


def _first_layer(problem: PlacementProblem) -> PlacementProblem:
    """The same problem of one layer, its arrays laid out alike."""

    def first(values_XLX: NDArray[np.integer] | None) -> NDArray[np.integer] | None:
        return None if values_XLX is None else np.ascontiguousarray(values_XLX[:, :1])

    return replace(
        problem, loads_LE=problem.loads_LE[:1], steps_WLE=first(problem.steps_WLE), ids_TLK=first(problem.ids_TLK)
    )

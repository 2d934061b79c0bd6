"""Placing by loads alone: how balanced tokens would be. What a step gains, only a trace can say."""

import numpy as np
from numpy.typing import NDArray

from router.balance import active_bound, active_by_rank_WLG, balancedness, rank_loads_LG
from router.placement import plan
from router.placement.base import Placement
from router.placement.bound import bound_of
from traces.loads import Loads
from tuner.placing.answer import Answer, Balance, Candidate, Three, token_balance
from tuner.placing.gain import Gain, gain_of
from tuner.placing.notes import facts_on, notes_on
from tuner.placing.plan import Plan, best_by_tokens, plans_of, problem_of, running_now
from tuner.placing.request import PlacingRequest
from tuner.placing.verdict import limit_of, verdict_by_balance

_COMPARED = ("contiguous", "random", "eplb")
_PLAN_SHARE = 0.6  # of the steps, where single ones are known; the rest is later traffic to judge the plan on
_WINDOWS = 10  # of consecutive steps among those
_FEWEST_STEPS = 5


def place_by_loads(request: PlacingRequest, loads: Loads) -> Answer:
    """Plan on the loads, or where single steps are known on the earlier ones, and judge by the later.

    Errors: `InputError` where slots, ranks, groups or the algorithm do not go with the loads.
    """
    notes = [*loads.skipped]
    planned_LE, later_WLE = loads.loads_LE, None
    planned_WLE = loads.steps_WLE
    if loads.steps_WLE is not None and len(loads.steps_WLE) >= _FEWEST_STEPS:
        earlier = int(_PLAN_SHARE * len(loads.steps_WLE))
        planned_WLE, later_WLE = loads.steps_WLE[:earlier], loads.steps_WLE[earlier:]
        planned_LE = planned_WLE.sum(axis=0).astype(np.float64)
        notes.append(
            f"planned on the first {earlier} of {len(loads.steps_WLE)} steps, judged by the later {len(later_WLE)}"
        )
    elif loads.steps_WLE is not None:
        notes.append(f"{len(loads.steps_WLE)} steps are too few to hold some out: judged by what it was planned on")
    judged_LE = planned_LE if later_WLE is None else later_WLE.sum(axis=0).astype(np.float64)

    before = running_now(request, planned_LE)
    problem = problem_of(request, planned_LE, steps_WLE=planned_WLE)
    notes += notes_on(request, problem)
    chosen_name = best_by_tokens(request, problem)
    names = dict.fromkeys((*_COMPARED, chosen_name))
    plans = plans_of(request, problem, before, list(names))
    candidates = [_scored(made, judged_LE, later_WLE) for made in plans]
    chosen = next(candidate for candidate in candidates if candidate.plan.algorithm == chosen_name)
    placements = Three(before=before, after=chosen.plan.placement, random=plan("random", problem))
    tokens, planned = (
        token_balance(placements, loads_LE, bound_of(problem, loads_LE, chosen.plan.algorithm))
        for loads_LE in (judged_LE, planned_LE)
    )
    gain = None if later_WLE is None else _gain(before, chosen.plan.placement, later_WLE, request.seed)
    rank_loads = (rank_loads_LG(before, judged_LE), rank_loads_LG(chosen.plan.placement, judged_LE))
    limit = limit_of(problem, judged_LE, tokens.upper_bound)
    verdict = verdict_by_balance(tokens, planned, rank_loads, gain, limit=limit, moved_share=chosen.plan.moved_share)
    return Answer(
        chosen=chosen,
        before=before,
        tokens=tokens,
        planned=planned,
        active=None if later_WLE is None else _active(placements, later_WLE),
        gain=gain,
        gain_of=None if gain is None else "rows of the busiest rank",
        steps=None,
        rank_loads_LG=rank_loads,
        candidates=candidates,
        worth_it=verdict.worth_it,
        verdict=verdict.words,
        facts=(f"Loads: {loads.source}.", facts_on(request, problem)),
        notes=notes,
        gone=request.gone,
    )


def _scored(made: Plan, judged_LE: NDArray[np.float64], later_WLE: NDArray[np.int64] | None) -> Candidate:
    return Candidate(
        plan=made,
        tokens=balancedness(rank_loads_LG(made.placement, judged_LE)),
        active=None if later_WLE is None else balancedness(active_by_rank_WLG(made.placement, later_WLE)),
    )


def _gain(before: Placement, after: Placement, later_WLE: NDArray[np.int64], seed: int) -> Gain:
    """What the busiest ranks of each later step have less, layers together, by windows of consecutive steps."""

    def busiest(placement: Placement) -> list[NDArray[np.float64]]:
        rows_W = np.array([rank_loads_LG(placement, step_LE).max(axis=1).sum() for step_LE in later_WLE])
        return np.array_split(rows_W, min(_WINDOWS, len(rows_W)))

    return gain_of(busiest(before), busiest(after), seed=seed)


def _active(placements: Three[Placement], later_WLE: NDArray[np.int64]) -> Balance:
    return Balance(
        **{
            name: balancedness(active_by_rank_WLG(placement, later_WLE))
            for name, placement in placements._asdict().items()
        },
        upper_bound=active_bound(later_WLE, placements.after.ranks, placements.after.slots),
    )

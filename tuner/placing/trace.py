"""Placing by a trace: plan on earlier requests, choose by simulated steps of later ones, judge by the last."""

from collections.abc import Sequence

import numpy as np

from router.balance import active_bound, balancedness, fewest_active_on_busiest_WL, rank_loads_LG
from router.placement.base import Placement
from router.placement.bound import bound_of
from sim.rebalancing import migration_s
from traces.progress import Progress
from traces.trace import RoutingTrace
from tuner.placing.answer import Answer, Balance, Candidate, Steps, Three, token_balance
from tuner.placing.gain import gain_of
from tuner.placing.plan import BASELINES, plans_of, servable
from tuner.placing.request import PlacingRequest
from tuner.placing.serving_setup import ServingSetup
from tuner.placing.setting import Setting
from tuner.placing.steps import Scored
from tuner.placing.verdict import limit_of, verdict_by_steps

_PLANNED, _CHOSEN = 0.6, 0.8  # shares of the progress when plans are made, and when one is chosen


def place_by_trace(request: PlacingRequest, trace: RoutingTrace, serving: ServingSetup, progress: Progress) -> Answer:
    """The plan that a choice on later requests prefers, judged by requests that neither has seen.

    1. Requests are cut, in order: plan, choose, and several held-out windows.
    2. Every algorithm that can plan by the first part does; random and contiguous are always shown.
    3. The best is the one whose simulated steps of the second part are shortest.
    4. It is judged against what runs now by the steps of the held-out windows, each simulated under both.

    Errors: `InputError` where the trace is too short, or something does not fit together.
    """
    setting = Setting.of(request, trace, serving)
    to_choose_from = servable(request, setting.problem)
    candidates = _candidates(setting, list(dict.fromkeys((*BASELINES, *to_choose_from))), progress)
    chosen = min((c for c in candidates if c.plan.algorithm in to_choose_from), key=_step_s)
    random = next(candidate for candidate in candidates if candidate.plan.algorithm == "random")
    placements = Three(before=setting.before, after=chosen.plan.placement, random=random.plan.placement)
    simulated = _on_held_out(setting, placements, progress)
    return _judged(setting, candidates, chosen, placements, simulated, choices=len(to_choose_from))


def _candidates(setting: Setting, algorithms: Sequence[str], progress: Progress) -> list[Candidate]:
    """A plan by each of the algorithms, scored on the requests that choose."""
    plans = plans_of(
        setting.request,
        setting.problem,
        setting.before,
        algorithms,
        lambda done, message: progress(_PLANNED * done, message),
    )
    loads_LE = setting.windows.choose.rows_WLE().sum(axis=0)
    stand = setting.stand(setting.windows.choose)
    candidates = []
    for place, made in enumerate(plans):
        progress(_PLANNED + (_CHOSEN - _PLANNED) * place / len(plans), f"choosing: {made.algorithm}")
        scored = stand.score(made.placement)
        candidates.append(
            Candidate(
                plan=made,
                tokens=balancedness(rank_loads_LG(made.placement, loads_LE)),
                active=balancedness(scored.active_WLG),
                step_s=scored.step_s,
            )
        )
    return candidates


def _step_s(candidate: Candidate) -> float:
    assert candidate.step_s is not None
    return candidate.step_s


def _on_held_out(setting: Setting, placements: Three[Placement], progress: Progress) -> Three[Scored]:
    stand = setting.stand(*setting.windows.held_out)
    scored = []
    for place, placement in enumerate(placements):
        progress(_CHOSEN + (1 - _CHOSEN) * place / len(placements), "judging by later requests")
        scored.append(stand.score(placement))
    return Three(*scored)


def _judged(
    setting: Setting,
    candidates: Sequence[Candidate],
    chosen: Candidate,
    placements: Three[Placement],
    simulated: Three[Scored],
    *,
    choices: int,
) -> Answer:
    request, problem = setting.request, setting.problem
    before, after, random = simulated
    rows_WLE = np.concatenate([window.rows_WLE() for window in setting.windows.held_out])
    judged_LE = rows_WLE.sum(axis=0).astype(np.float64)
    tokens, planned = (
        token_balance(placements, loads_LE, bound_of(problem, loads_LE, chosen.plan.algorithm))
        for loads_LE in (judged_LE, problem.loads_LE)
    )
    gain = gain_of(before.step_s_XW, after.step_s_XW, seed=request.seed)
    steps = Steps(
        before_s=before.step_s,
        after_s=after.step_s,
        random_s=random.step_s,
        gain_over_random=gain_of(random.step_s_XW, after.step_s_XW, seed=request.seed),
        parts_s=(before.parts_s, after.parts_s),
        bytes_by_tier=(before.bytes_by_tier, after.bytes_by_tier),
        migration_s=migration_s(placements.before, placements.after, setting.model, setting.costs, setting.layout),
        busiest_active=(
            float(before.active_WLG.max(axis=2).mean()),
            float(after.active_WLG.max(axis=2).mean()),
            float(fewest_active_on_busiest_WL(rows_WLE, problem.ranks).mean()),
        ),
        memory=after.memory,
        costs=setting.costs.name,
    )
    verdict = verdict_by_steps(
        tokens,
        planned,
        gain,
        steps,
        limit=limit_of(problem, judged_LE, tokens.upper_bound),
        moved_share=chosen.plan.moved_share,
        choices=choices,
        horizon_steps=request.horizon_steps,
    )
    active = Balance(
        before=balancedness(before.active_WLG),
        after=balancedness(after.active_WLG),
        random=balancedness(random.active_WLG),
        upper_bound=active_bound(rows_WLE, problem.ranks, problem.slots),
    )
    return Answer(
        chosen=chosen,
        before=placements.before,
        tokens=tokens,
        planned=planned,
        active=active,
        gain=gain,
        gain_of="step time",
        steps=steps,
        rank_loads_LG=(rank_loads_LG(placements.before, judged_LE), rank_loads_LG(placements.after, judged_LE)),
        candidates=candidates,
        worth_it=verdict.worth_it,
        verdict=verdict.words,
        facts=setting.facts,
        notes=(*setting.notes, *_about_active(active, steps)),
        gone=request.gone,
    )


def _about_active(active: Balance, steps: Steps) -> list[str]:
    """Where fewer active experts look like a loss: a mean that falls more than the most is less even."""
    before, after, _ = steps.busiest_active
    if active.after >= active.before or after >= before:
        return []
    return ["active experts are less even, but fewer on the busiest rank too, and that is what a step pays for"]

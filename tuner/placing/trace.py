"""Placing by a trace: plan on earlier requests, choose by simulated steps of later ones, judge by the last."""

from collections.abc import Sequence

import numpy as np

from router.balance import balancedness, rank_loads_LG
from router.placement.base import Placement
from router.placement.bound import bound_of
from sim.rebalancing import migration_s
from traces.progress import Progress
from traces.trace import RoutingTrace
from tuner.placing.active import active_bound, fewest_on_busiest_WL
from tuner.placing.answer import Answer, Balance, Candidate, PlacingRequest, Steps, Three, token_balance
from tuner.placing.deployment import Deployment
from tuner.placing.gain import gain_of
from tuner.placing.plan import BASELINES, plans_of, servable
from tuner.placing.setting import Setting
from tuner.placing.steps import Scored
from tuner.placing.verdict import verdict_by_steps

_PLANNED, _CHOSEN = 0.6, 0.8  # shares of the progress when plans are made, and when one is chosen


def place_by_trace(request: PlacingRequest, trace: RoutingTrace, deployment: Deployment, progress: Progress) -> Answer:
    """The plan that a choice on later requests prefers, judged by requests that neither has seen.

    1. Requests are cut, in order: plan, choose, and several held-out windows.
    2. Every algorithm that can plan by the first part does; random and contiguous are always shown.
    3. The best is the one whose simulated steps of the second part are shortest.
    4. It is judged against what runs now by the steps of the held-out windows, each simulated under both.

    Errors: `InputError` where the trace is too short, or something does not fit together.
    """
    setting = Setting.of(request, trace, deployment)
    to_choose_from = servable(request, setting.problem)
    candidates = _candidates(setting, list(dict.fromkeys((*BASELINES, *to_choose_from))), progress)
    chosen = min((c for c in candidates if c.algorithm in to_choose_from), key=_step_s)
    random = next(candidate for candidate in candidates if candidate.algorithm == "random")
    placements = Three(before=setting.before, after=chosen.placement, random=random.placement)
    simulated = _on_held_out(setting, placements, progress)
    return _judged(setting, candidates, chosen, placements, simulated)


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
                algorithm=made.algorithm,
                placement=made.placement,
                plan_s=made.plan_s,
                moved_share=made.moved_share,
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
) -> Answer:
    request, problem = setting.request, setting.problem
    before, after, random = simulated
    rows_WLE = np.concatenate([window.rows_WLE() for window in setting.windows.held_out])
    judged_LE = rows_WLE.sum(axis=0).astype(np.float64)
    tokens, planned = (
        token_balance(placements, loads_LE, bound_of(problem, loads_LE, chosen.algorithm))
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
            float(fewest_on_busiest_WL(rows_WLE, problem.ranks).mean()),
        ),
        costs=setting.costs.name,
        facts=setting.facts,
    )
    verdict = verdict_by_steps(
        tokens, planned, gain, steps, moved_share=chosen.moved_share, horizon_steps=request.horizon_steps
    )
    too_large = [] if after.memory.fits else ["it does not fit into a rank's memory; moeroute simulate says what helps"]
    return Answer(
        chosen=chosen,
        before=placements.before,
        tokens=tokens,
        planned=planned,
        active=Balance(
            before=balancedness(before.active_WLG),
            after=balancedness(after.active_WLG),
            random=balancedness(random.active_WLG),
            upper_bound=active_bound(rows_WLE, problem.ranks, problem.slots),
        ),
        gain=gain,
        gain_of="step time",
        steps=steps,
        rank_loads_LG=(rank_loads_LG(placements.before, judged_LE), rank_loads_LG(placements.after, judged_LE)),
        candidates=candidates,
        worth_it=verdict.worth_it,
        verdict=verdict.words,
        notes=(*setting.notes, *too_large),
    )

"""Verdict: whether to change the placement, in one sentence with its reason."""

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from cost_models.units import GB, human_seconds
from router.balance import balancedness_bound
from router.placement.problem import PlacementProblem
from sim.memory import MemoryUse
from tuner.placing.answer import Balance, Steps
from tuner.placing.gain import Gain

LEAST_GAIN = 0.01  # what saves less is lost in what a cost model does not know
_AS_GOOD_AS = 0.98  # of the bound: nothing left to gain that anyone would notice
_BALANCED = 0.9  # a bound below it is what the slots do not allow, not what the placement spoils
_KEPT = 0.5  # of the balance that was planned: if later traffic keeps less of it, it has drifted
_PROMISED = 0.02  # of balancedness: of a plan that promised less, nothing can drift
_NETWORK_OVER_EXPERTS = 2.0
_ROUNDING = 1e-9
_NOTHING = 0.0005  # what reads 0.0%
_SAME = "the plan is what runs now"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`words`: "worth it: …" or "not worth it: … because …"."""

    worth_it: bool
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What allows no better balance, and what would."""

    what: str
    more: str


def limit_of(problem: PlacementProblem, loads_LE: NDArray[np.float64], upper_bound: float) -> Limit:
    """Groups that are kept on nodes, where the bound is lower than that of the slots alone; or else the slots."""
    if upper_bound < balancedness_bound(loads_LE, problem.ranks, problem.slots) - _ROUNDING:
        return Limit(what="groups kept on nodes", more="redundant slots that may leave their node (--away-share)")
    more = "more redundant slots" if problem.slots > problem.experts else "redundant slots"
    return Limit(what="these slots", more=more)


def verdict_by_balance(
    tokens: Balance,
    planned: Balance,
    rank_loads_LG: tuple[NDArray[np.float64], NDArray[np.float64]],
    gain: Gain | None,
    *,
    limit: Limit,
    moved_share: float,
) -> Verdict:
    """By the busiest ranks' loads before and after; `gain` where it is of later steps than were planned on."""
    before, after = (float(loads_LG.max(axis=1).sum()) for loads_LG in rank_loads_LG)
    saved = gain.mean if gain is not None else 1 - after / before if before else 0.0
    sure = gain is None or gain.interval is None or gain.interval[0] > 0
    if saved >= LEAST_GAIN and sure:
        later = f" (90% interval {_percents(gain)} over later steps)" if gain is not None and gain.interval else ""
        return Verdict(
            worth_it=True,
            words=f"worth it: the busiest rank has {saved:.1%} fewer rows{later}, balancedness {tokens.before:.3f} → "
            f"{tokens.after:.3f} of at most {tokens.upper_bound:.3f}; what a step gains by it, a trace would say"
            f"{_and_yet(tokens, planned, limit)}",
        )
    why = _balanced_already(tokens, limit)
    if why is None and moved_share == 0:
        why = _SAME
    why = why or _drifted(tokens, planned)
    if why is None and gain is not None and not sure:
        why = f"the saving of {saved:.1%} may be chance (90% interval {_percents(gain)})"
    return _no(why or f"the busiest rank {_rows_in_words(saved)}")


def verdict_by_steps(
    tokens: Balance,
    planned: Balance,
    gain: Gain,
    steps: Steps,
    *,
    limit: Limit,
    moved_share: float,
    choices: int,
    horizon_steps: int,
) -> Verdict:
    """By simulated steps of held-out windows, by what moving the weights takes, and by whether they fit.

    `choices`: how many plans there were to choose from.
    """
    sure = gain.interval is None or gain.interval[0] > 0
    pays = steps.pays_after_steps
    if not steps.memory.fits:
        return _no(_too_large(steps.memory))
    if moved_share == 0:
        found = _SAME if choices == 1 else f"{_SAME}, since none was found whose steps are shorter"
        return _no(_balanced_already(tokens, limit) or found)
    if gain.mean < LEAST_GAIN or not sure:
        return _no(_why_no_gain(tokens, planned, gain, steps, limit))
    if pays is None or pays > horizon_steps:
        late = "never pays" if pays is None else f"pays only after {steps_in_words(pays)}, not in {horizon_steps:,}"
        return _no(
            f"a step takes {gain.mean:.1%} less, but moving {moved_share:.0%} of the slots takes "
            f"{human_seconds(steps.migration_s)} and {late}"
        )
    shown = "one held-out window, so without an interval"
    if gain.interval is not None:
        shown = f"90% interval {_percents(gain)} over {gain.windows} held-out windows"
    return Verdict(
        worth_it=True,
        words=f"worth it: a step takes {gain.mean:.1%} less ({shown}), and moving {moved_share:.0%} of the slots pays "
        f"for itself after {steps_in_words(pays)}{_and_yet(tokens, planned, limit)}",
    )


def _rows_in_words(saved: float) -> str:
    """What a busiest rank has, by the share of its rows that is saved.

    >>> _rows_in_words(0.004), _rows_in_words(0.0), _rows_in_words(-0.2)
    ('has only 0.4% fewer rows', 'has as many rows', 'would even have 20.0% more rows')
    """
    if abs(saved) < _NOTHING:
        return "has as many rows"
    return f"has only {saved:.1%} fewer rows" if saved > 0 else f"would even have {-saved:.1%} more rows"


def _why_no_gain(tokens: Balance, planned: Balance, gain: Gain, steps: Steps, limit: Limit) -> str:
    found = f"a step {'takes only' if gain.mean >= 0 else 'would even take'} {abs(gain.mean):.1%} "
    found += "less" if gain.mean >= 0 else "more"
    if gain.interval is not None and gain.interval[0] <= 0 <= gain.interval[1]:
        found += f", which may be chance (90% interval {_percents(gain)})"
    parts = steps.parts_s[0]
    network_s = parts.get("dispatch", 0.0) + parts.get("combine", 0.0)
    experts_s = parts.get("experts", 0.0)
    shares = f"{network_s / steps.before_s:.0%} of a step, experts {experts_s / steps.before_s:.0%}"
    reasons = [_balanced_already(tokens, limit), _drifted(tokens, planned)]
    if network_s > _NETWORK_OVER_EXPERTS * experts_s:
        reasons.append(f"the network is what limits: sending tokens takes {shares}")
    else:
        reasons.append(f"balance moves little of it: sending tokens takes {shares}")
    return f"{found}: {next(reason for reason in reasons if reason)}"


def _balanced_already(tokens: Balance, limit: Limit) -> str | None:
    if tokens.before < _AS_GOOD_AS * tokens.upper_bound:
        return None
    figures = f"balancedness {tokens.before:.3f} of at most {tokens.upper_bound:.3f}"
    if tokens.upper_bound >= _BALANCED:
        return f"loads are already balanced ({figures})"
    return f"{limit.what} allow no better balance ({figures}); {limit.more} would"


def _and_yet(tokens: Balance, planned: Balance, limit: Limit) -> str:
    """What to mind of a plan that is worth it: balance that later traffic does not keep, or that has a low bound."""
    more = f"{limit.more} would allow more" if tokens.upper_bound < _BALANCED else None
    return "".join(f"; {but}" for but in (_drifted(tokens, planned), more) if but)


def _too_large(memory: MemoryUse) -> str:
    assert memory.capacity_bytes is not None
    needs, has = (f"{bytes_ / GB:,.1f}" for bytes_ in (memory.total_bytes, memory.capacity_bytes))
    return f"a rank needs {needs} GB and has {has}; moeroute simulate says what helps"


def _drifted(tokens: Balance, planned: Balance) -> str | None:
    """Whether later traffic keeps too little of the balance that was planned."""
    promised, kept = planned.after - planned.before, tokens.after - tokens.before
    if promised <= _PROMISED or kept >= _KEPT * promised:
        return None
    return (
        f"later loads differ from those planned on (balancedness {planned.before:.3f} → "
        f"{planned.after:.3f} there, {tokens.before:.3f} → {tokens.after:.3f} later)"
    )


def steps_in_words(steps: float) -> str:
    """A number of steps, whole ones.

    >>> steps_in_words(0.2), steps_in_words(1234.5)
    ('1 step', '1,235 steps')
    """
    whole = ceil(steps)
    return "1 step" if whole <= 1 else f"{whole:,} steps"


def _no(because: str) -> Verdict:
    return Verdict(worth_it=False, words=f"not worth it: {because}")


def _percents(gain: Gain) -> str:
    assert gain.interval is not None
    low, high = (f"{100 * end:.1f}".replace("-", "−") for end in gain.interval)
    return f"{low} to {high}%"

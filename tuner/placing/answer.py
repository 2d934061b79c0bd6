"""Answer: what `moeroute place` says, from loads or from a trace."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from router.balance import balancedness, rank_loads_LG
from router.placement.base import Placement
from sim.memory import MemoryUse
from tuner.placing.gain import Gain
from tuner.placing.plan import Plan

T = TypeVar("T")


class Three(NamedTuple, Generic[T]):
    """The same of what runs now, of the plan, and of a random placement."""

    before: T
    after: T
    random: T


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Balancedness of the placement that runs now, the planned one and a random one, and what none can exceed."""

    before: float
    after: float
    random: float
    upper_bound: float


def token_balance(placements: Three[Placement], loads_LE: NDArray[np.float64], upper_bound: float) -> Balance:
    """Balancedness of loads where replicas share evenly."""
    return Balance(
        **{name: balancedness(rank_loads_LG(placement, loads_LE)) for name, placement in placements._asdict().items()},
        upper_bound=upper_bound,
    )


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Candidate:
    """One plan, scored on what the choice was made by: tokens, and where there is a trace, active experts and steps."""

    plan: Plan
    tokens: float
    active: float | None = None
    step_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Figures alone, SI but for `plan_ms`."""
        return {
            "algorithm": self.plan.algorithm,
            "plan_ms": 1e3 * self.plan.plan_s,
            "balancedness": self.tokens,
            "active_balancedness": self.active,
            "step_s": self.step_s,
            "slots_moved_share": self.plan.moved_share,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What simulated steps of held-out windows take, before, after and with a random placement: means a step.

    `parts_s`: of the mean rank, by part of the step, before and after. `bytes_by_tier` likewise. `migration_s`: going
    from the one placement to the other. `busiest_active`: experts of the rank with most of them, before, after, and the
    fewest possible. `memory`: of the fullest rank, after. `costs`: what the steps were priced on.
    """

    before_s: float
    after_s: float
    random_s: float
    gain_over_random: Gain
    parts_s: tuple[dict[str, float], dict[str, float]]
    bytes_by_tier: tuple[dict[str, float], dict[str, float]]
    migration_s: float
    busiest_active: tuple[float, float, float]
    memory: MemoryUse
    costs: str

    @property
    def pays_after_steps(self) -> float | None:
        """Steps until the migration has paid for itself; None: never."""
        saved_s = self.before_s - self.after_s
        return self.migration_s / saved_s if saved_s > 0 else None


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Answer:
    """The chosen plan beside what runs now.

    `tokens` and `active`: balancedness of the loads that the plan is judged on, which are later ones than it was
    planned on where the traffic has a time. `gain`: the share that is saved, of `gain_of`. `rank_loads_LG`: of those
    loads, before and after. `candidates`: all that were tried, the chosen one among them. `facts`: what was asked and
    what steps are; `notes`: what to mind. `gone`: the rank that is lost, without which ranks are numbered.
    """

    chosen: Candidate
    before: Placement
    tokens: Balance
    planned: Balance
    active: Balance | None
    gain: Gain | None
    gain_of: str | None
    steps: Steps | None
    rank_loads_LG: tuple[NDArray[np.float64], NDArray[np.float64]]
    candidates: Sequence[Candidate]
    worth_it: bool
    verdict: str
    facts: Sequence[str]
    notes: Sequence[str]
    gone: int | None = None

    @property
    def after(self) -> Placement:
        """The plan."""
        return self.chosen.plan.placement

    def to_json(self) -> dict[str, Any]:
        """As the command prints it: SI units but for `plan_ms`, shares as fractions."""
        steps, gain = self.steps, self.gain
        return {
            "slot_to_expert": self.after.slot_to_expert_LS.tolist(),
            "ranks": self.after.ranks,
            "slots": self.after.slots,
            "gone": self.gone,
            "algorithm": self.chosen.plan.algorithm,
            "plan_ms": 1e3 * self.chosen.plan.plan_s,
            "balancedness": asdict(self.tokens),
            "planned_balancedness": asdict(self.planned),
            "active_balancedness": None if self.active is None else asdict(self.active),
            "slots_moved_share": self.chosen.plan.moved_share,
            "gain": None if gain is None else gain.mean,
            "gain_ci": None if gain is None or gain.interval is None else list(gain.interval),
            "gain_of": self.gain_of,
            "gain_windows": None if gain is None else gain.windows,
            "gain_over_random": None if steps is None else steps.gain_over_random.mean,
            "step_s": None
            if steps is None
            else {"before": steps.before_s, "after": steps.after_s, "random": steps.random_s},
            "parts_s": None if steps is None else _before_after(steps.parts_s),
            "bytes_by_tier": None if steps is None else _before_after(steps.bytes_by_tier),
            "busiest_rank_active_experts": None
            if steps is None
            else dict(zip(("before", "after", "least"), steps.busiest_active, strict=True)),
            "migration_s": None if steps is None else steps.migration_s,
            "pays_after_steps": None if steps is None else steps.pays_after_steps,
            "memory_bytes": None if steps is None else steps.memory.total_bytes,
            "fits": None if steps is None else steps.memory.fits,
            "costs": None if steps is None else steps.costs,
            "verdict": self.verdict,
            "worth_it": self.worth_it,
            "candidates": [
                {**candidate.to_json(), "chosen": candidate is self.chosen} for candidate in self.candidates
            ],
            "facts": list(self.facts),
            "notes": list(self.notes),
        }


def _before_after(pair: tuple[Any, Any]) -> dict[str, Any]:
    return {"before": pair[0], "after": pair[1]}

"""Placing: what is asked of `moeroute place`, and the answer, from loads or from a trace."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from router.balance import balancedness, rank_loads_LG
from router.placement import PLACEMENTS
from router.placement.base import Placement
from traces.errors import InputError
from tuner.placing.gain import Gain

T = TypeVar("T")

BEST = "best"
MOVES = "incremental"  # what a plan under a budget of moves is called
# vLLM rebalances every so many steps by default: what has not paid by then never does.
HORIZON_STEPS = 3000


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class PlacingRequest:
    """What to place on: `slots` expert slots (None: one an expert, rounded up) on `ranks` ranks on `nodes` nodes.

    `algorithm`: a name of `PLACEMENTS`, or the best of those that what is known can serve. `groups`, `away_share`
    (None: experts stay on the node of their group) and `seed` as in `PlacementProblem`. `current_LS`: the experts of
    the slots that run now (None: contiguous). `budget_share`: of all slots, so many may take an expert that is not on
    their rank yet (None: all). `gone`: a rank that is lost. `horizon_steps`: in so many, moving weights must pay.
    """

    ranks: int
    nodes: int = 1
    slots: int | None = None
    algorithm: str = BEST
    groups: int = 1
    away_share: float | None = None
    current_LS: NDArray[np.int64] | None = None
    budget_share: float | None = None
    gone: int | None = None
    horizon_steps: int = HORIZON_STEPS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise InputError(f"{self.ranks} ranks; use at least 1")
        if self.nodes < 1 or self.ranks % self.nodes:
            raise InputError(f"{self.ranks} ranks do not divide over {self.nodes} nodes; use a divisor of the ranks")
        if self.algorithm not in (BEST, *PLACEMENTS):
            raise InputError(
                f"unknown placement {self.algorithm!r}; known are {', '.join((BEST, *sorted(PLACEMENTS)))}"
            )
        if self.gone is not None and not 0 <= self.gone < self.ranks:
            raise InputError(f"rank {self.gone} is gone, but the ranks are 0 to {self.ranks - 1}; name one of them")
        if self.gone is not None and self.groups > 1:
            raise InputError(
                f"without rank {self.gone} nodes are uneven, and groups cannot be packed; leave out groups"
            )
        if self.budget_share is not None and not 0 < self.budget_share <= 1:
            raise InputError(f"a budget of {self.budget_share:g} of the slots; it must be above 0 and at most 1")
        if self.budget_share is not None and self.algorithm != BEST:
            raise InputError(
                f"a budget moves slots of the placement that runs now, and {self.algorithm} plans a new one; "
                "leave out one of the two"
            )
        if self.away_share is not None and self.groups == 1:
            raise InputError(
                f"an away_share of {self.away_share:g} is of slots that leave their group's node; give groups too"
            )
        if self.horizon_steps < 1:
            raise InputError(f"a horizon of {self.horizon_steps} steps; use at least 1")

    def slots_for(self, experts: int) -> int:
        """S, as asked for, or as it runs now, or the fewest that hold the experts and divide over the ranks."""
        if self.slots is not None:
            return self.slots
        if self.current_LS is not None:
            return int(self.current_LS.shape[1])
        return -(-experts // self.ranks) * self.ranks


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
    """One plan, scored on what the choice was made by: tokens, and where there is a trace, active experts and steps.

    `plan_s`: of the planning alone, when everything was compiled. `moved_share`: of its slots, from what runs now.
    """

    algorithm: str
    placement: Placement
    plan_s: float
    moved_share: float
    tokens: float
    active: float | None = None
    step_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Figures alone, SI but for `plan_ms`."""
        return {
            "algorithm": self.algorithm,
            "plan_ms": 1e3 * self.plan_s,
            "balancedness": self.tokens,
            "active_balancedness": self.active,
            "step_s": self.step_s,
            "slots_moved_share": self.moved_share,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What simulated steps of held-out windows take, before, after and with a random placement: means a step.

    `parts_s`: of the mean rank, by part of the step, before and after. `bytes_by_tier` likewise. `migration_s`: going
    from the one placement to the other. `busiest_active`: experts of the rank with most of them, before, after, and the
    fewest possible. `costs` and `facts`: what the steps were priced on.
    """

    before_s: float
    after_s: float
    random_s: float
    gain_over_random: Gain
    parts_s: tuple[dict[str, float], dict[str, float]]
    bytes_by_tier: tuple[dict[str, float], dict[str, float]]
    migration_s: float
    busiest_active: tuple[float, float, float]
    costs: str
    facts: tuple[str, ...]

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
    loads, before and after. `candidates`: all that were tried, the chosen one among them.
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
    notes: Sequence[str]

    @property
    def after(self) -> Placement:
        """The plan."""
        return self.chosen.placement

    def to_json(self) -> dict[str, Any]:
        """As the command prints it: SI units but for `plan_ms`, shares as fractions."""
        steps, gain = self.steps, self.gain
        return {
            "slot_to_expert": self.after.slot_to_expert_LS.tolist(),
            "ranks": self.after.ranks,
            "slots": self.after.slots,
            "algorithm": self.chosen.algorithm,
            "plan_ms": 1e3 * self.chosen.plan_s,
            "balancedness": _balance(self.tokens),
            "planned_balancedness": _balance(self.planned),
            "active_balancedness": None if self.active is None else _balance(self.active),
            "slots_moved_share": self.chosen.moved_share,
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
            "costs": None if steps is None else steps.costs,
            "verdict": self.verdict,
            "worth_it": self.worth_it,
            "candidates": [
                {**candidate.to_json(), "chosen": candidate is self.chosen} for candidate in self.candidates
            ],
            "notes": list(self.notes),
        }


def _balance(balance: Balance) -> dict[str, float]:
    return {
        "before": balance.before,
        "after": balance.after,
        "random": balance.random,
        "upper_bound": balance.upper_bound,
    }


def _before_after(pair: tuple[Any, Any]) -> dict[str, Any]:
    return {"before": pair[0], "after": pair[1]}

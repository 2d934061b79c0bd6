"""Rebalancing: when a placement changes while it serves, and to what. Each way sees earlier steps alone.

A `Rebalancer` is shown the loads of the latest steps and says which placement the next step is to have: the current one
itself, or another. It remembers nothing, so that equal windows have equal answers; who runs it moves the weights and
pays for them (`sim.rebalancing`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from router.moves import improve
from router.placement import plan
from router.placement.base import Placement, slots_in
from router.placement.problem import PlacementProblem
from router.placement.step_costs import predicted_s_WL
from router.rank_seconds import RankSeconds
from router.relabel import relabel
from traces.errors import InputError

StepSeconds = Callable[
    [Placement, NDArray[np.integer]], float
]  # of a placement on earlier steps [W, L, E]: seconds each
MoveSeconds = Callable[[Placement, Placement], float]  # from one placement to another
_Way = Callable[[Placement, NDArray[np.integer]], Placement]  # to another placement, by earlier steps [W, L, E]


class Rebalancer(Protocol):
    """When to rebalance, and to what."""

    @property
    def name(self) -> str:
        """For reports."""

    @property
    def window(self) -> int:
        """How many of the latest steps it looks back on."""

    def next(self, step: int, current: Placement, window_WLE: NDArray[np.integer]) -> Placement:
        """The placement that step `step` is to have, `current` itself to leave all as it is.

        `window_WLE`: rows of each expert in the steps just before, the latest last; fewer than `window` at the start.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Never:
    """The first placement for good."""

    name: str = "never"
    window: int = 0

    def next(self, step: int, current: Placement, window_WLE: NDArray[np.integer]) -> Placement:
        """`current`."""
        return current


@dataclass(frozen=True, slots=True, kw_only=True)
class Replan:
    """Every `every` steps a plan made anew by `algorithm`, as engines do with EPLB.

    `renumber`: give its ranks the numbers that move fewest slots, which engines do not. `nodes` and `groups` as in
    `PlacementProblem`.
    """

    every: int
    window: int
    algorithm: str = "eplb"
    nodes: int = 1
    groups: int = 1
    renumber: bool = False

    def __post_init__(self) -> None:
        _check(self.every, self.window)

    @property
    def name(self) -> str:
        """The algorithm and its interval."""
        return f"{self.algorithm}{' renumbered' if self.renumber else ''} every {self.every}"

    def next(self, step: int, current: Placement, window_WLE: NDArray[np.integer]) -> Placement:
        """The plan for the window's loads where one is due."""
        if not _due(step, self.every, window_WLE):
            return current
        return _planned(
            current,
            window_WLE,
            algorithm=self.algorithm,
            nodes=self.nodes,
            groups=self.groups,
            renumber=self.renumber,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Incremental:
    """Every `every` steps the moves that help most, of at most `budget_share` of all slots."""

    every: int
    window: int
    budget_share: float

    def __post_init__(self) -> None:
        _check(self.every, self.window)
        _check_share(self.budget_share)

    @property
    def name(self) -> str:
        """The budget and the interval."""
        return f"moves of {self.budget_share:.3g} every {self.every}"

    def next(self, step: int, current: Placement, window_WLE: NDArray[np.integer]) -> Placement:
        """`current` made better for the window's loads where that is due."""
        if not _due(step, self.every, window_WLE):
            return current
        return _moved(current, window_WLE, budget_share=self.budget_share)


@dataclass(frozen=True, slots=True, kw_only=True)
class WhenItPays:
    """What saves most over the coming `horizon` steps, less what moving its weights takes; nothing, if nothing does.

    Every `every` steps it tries the best moves of each of `budget_shares` of all slots, and a plan made anew by
    `algorithm`, its ranks renumbered (None: moves alone). They are made for the older half of the window and judged by
    what `step_s` predicts for the newer half, for a plan looks too good on the loads that it was made for. The way that
    saves most, less what `move_s` asks, is then gone for the loads of the whole window. `nodes` and `groups` as in
    `PlacementProblem`.

    What the next choice may undo is not saved: of horizons of one, five and twenty times `every` the shortest did best,
    or lost at most 0.4% to the best (measured: 300 drifting steps of gpt-oss-20b on 8 H100s).
    """

    every: int
    window: int
    horizon: int
    step_s: StepSeconds
    move_s: MoveSeconds
    budget_shares: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2)
    algorithm: str | None = "balanced"
    nodes: int = 1
    groups: int = 1

    def __post_init__(self) -> None:
        _check(self.every, self.window)
        if self.window < 2:
            raise InputError(f"window is {self.window}; a plan and its judgement need at least 2 steps")
        if self.horizon < 1:
            raise InputError(f"horizon is {self.horizon} steps; it must be at least 1")
        for share in self.budget_shares:
            _check_share(share)

    @property
    def name(self) -> str:
        """How often it looks, and how far ahead."""
        return f"when it pays within {self.horizon}, asked every {self.every}"

    def next(self, step: int, current: Placement, window_WLE: NDArray[np.integer]) -> Placement:
        """`current`, or what pays."""
        if not _due(step, self.every, window_WLE) or len(window_WLE) < 2:
            return current
        older_WLE, newer_WLE = np.array_split(window_WLE, 2)
        now_s = self.step_s(current, newer_WLE)
        best_s, best_way = 0.0, None
        for way in self._ways():
            tried = way(current, older_WLE)
            saved_s = (now_s - self.step_s(tried, newer_WLE)) * self.horizon - self.move_s(current, tried)
            if saved_s > best_s:
                best_s, best_way = saved_s, way
        return best_way(current, window_WLE) if best_way else current

    def _ways(self) -> list[_Way]:
        moves: list[_Way] = [partial(_moved, budget_share=share) for share in self.budget_shares]
        if self.algorithm is None:
            return moves
        anew = partial(_planned, algorithm=self.algorithm, nodes=self.nodes, groups=self.groups, renumber=True)
        return [*moves, anew]


def predicted_by(seconds: RankSeconds) -> StepSeconds:
    """Predict a step's seconds by the slowest rank of each of its layers."""

    def step_s(placement: Placement, steps_WLE: NDArray[np.integer]) -> float:
        seconds_WL = predicted_s_WL(placement.slot_to_expert_LS, steps_WLE, placement.ranks, seconds)
        return float(seconds_WL.sum(axis=1).mean())

    return step_s


def _planned(
    current: Placement,
    window_WLE: NDArray[np.integer],
    *,
    algorithm: str,
    nodes: int,
    groups: int,
    renumber: bool,
) -> Placement:
    problem = PlacementProblem(
        loads_LE=window_WLE.sum(axis=0).astype(np.float64),
        ranks=current.ranks,
        slots=current.slots,
        nodes=nodes,
        groups=groups,
        steps_WLE=window_WLE,
    )
    planned = plan(algorithm, problem)
    return relabel(current, planned, nodes=nodes) if renumber else planned


def _moved(current: Placement, window_WLE: NDArray[np.integer], *, budget_share: float) -> Placement:
    fills = slots_in(budget_share, current.slot_to_expert_LS.size)
    return improve(current, window_WLE.sum(axis=0), fills=fills)


def _due(step: int, every: int, window_WLE: NDArray[np.integer]) -> bool:
    return step > 0 and step % every == 0 and len(window_WLE) > 0


def _check(every: int, window: int) -> None:
    for name, value in (("every", every), ("window", window)):
        if value < 1:
            raise InputError(f"{name} is {value} steps; it must be at least 1")


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise InputError(f"budget_share is {share:g}; give more than 0 and at most 1 of the slots")

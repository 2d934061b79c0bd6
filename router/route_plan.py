"""Plans of a step that trade gate mass for predicted time: experts close, then ranks and links ask for what is busy."""

from dataclasses import dataclass, replace
from typing import Any, Self

import numba
import numpy as np
from numpy.typing import NDArray

from router.backends import Array, namespace
from router.openings import Openings, Served, serve_open, serve_priced, served
from router.step_load import StepLoad

_LEVEL = 0.88  # each round of closing aims at this share of the slowest rank's time
_MATTERS = 0.03  # a share of the step's time that is worth rounds
_SAMPLE = 8  # tokens an expert, by which experts close
_LEAST_SAMPLE = 256
_PATIENCE = 3  # rounds without a better plan
_IDLE = 0.1  # the least share of the busiest at which a price still falls faster
_STRIDE = 2.0  # exponent by which the busy raise their price


@dataclass(slots=True)
class _Best:
    """The best plan so far: what tokens use, what it is worth, and the experts that are open in it."""

    value: float
    used_TC: Array
    open_E: NDArray[np.bool_]
    unbeaten: int = 0

    def offer(self, value: float, used_TC: Array, open_E: NDArray[np.bool_]) -> None:
        """Take a plan that is better."""
        self.unbeaten += 1
        if value > self.value:
            self.value, self.used_TC, self.open_E, self.unbeaten = value, used_TC, open_E, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepToPlan:
    """A step of one layer: the candidates, what a selection chose, and what choices cost.

    `scores_TC` in units of `router.openings`; `source_T` the row of `load.hop_s_XG` of each token. Maximised is
    (gate mass) / (that of the selection) - `price` * (predicted time) / (that of the selection).
    """

    used_TC: Array
    scores_TC: Array
    ids_TC: Array
    source_T: Array
    load: StepLoad
    price: float
    may_skip: bool
    closing_rounds: int
    pricing_rounds: int

    def plan(self) -> Array:
        """What tokens use in the best plan found, bool [T, C]: the selection's own where none is better."""
        search = _Search.of(self)
        if not search.mass or not search.seconds:
            return self.used_TC
        opening_s = self.load.opening_s(search.own_XE)
        open_E = np.ones(self.load.experts, dtype=np.bool_)
        if self.load.copies == 1 and opening_s > _MATTERS * search.seconds:
            sample = _Search.of(self.sample())
            sample.close()
            open_E = sample.best.open_E
            search.serve_open(open_E)
        if search.seconds - opening_s > _MATTERS * search.seconds:
            search.price(open_E)
        return search.best.used_TC

    def sample(self) -> Self:
        """As many tokens as tell what experts are worth, each of which stands for some that are left out."""
        tokens = int(self.source_T.shape[0])
        stride = tokens // max(_SAMPLE * self.load.experts, _LEAST_SAMPLE)
        if stride < 2:
            return self
        # One of each `stride`, drawn alike every time: ranks may take turns, and every n-th token would be of one rank.
        blocks = tokens // stride
        drawn_N = np.arange(blocks) * stride + np.random.default_rng(0).integers(0, stride, blocks)
        rows_N = namespace(self.used_TC).asarray(drawn_N, device=self.used_TC.device)
        return replace(
            self,
            used_TC=self.used_TC[rows_N],
            scores_TC=self.scores_TC[rows_N],
            ids_TC=self.ids_TC[rows_N],
            source_T=self.source_T[rows_N],
            load=replace(self.load, row_s=self.load.row_s * stride, hop_s_XG=self.load.hop_s_XG * stride),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """The rounds of a search; `mass`, `seconds` and `own_XE` are those of the selection, the first plan."""

    step: StepToPlan
    limits_T: Array
    own_XE: NDArray[np.int64]
    mass: float
    seconds: float
    best: _Best

    @classmethod
    def of(cls, step: StepToPlan) -> Self:
        """With the selection as the best plan so far."""
        load = step.load
        own = served(
            step.used_TC, step.scores_TC, step.ids_TC, step.source_T, sources=load.sources, experts=load.experts
        )
        xp = namespace(step.used_TC)
        return cls(
            step=step,
            limits_T=xp.sum(xp.astype(step.used_TC, xp.int64), axis=1),
            own_XE=own.rows_XE,
            mass=own.mass,
            seconds=load.seconds(own.rows_XE),
            best=_Best(1 - step.price, step.used_TC, own.rows_XE.sum(axis=0) > 0),
        )

    def serve_open(self, open_E: NDArray[np.bool_]) -> tuple[Served, Openings]:
        """The plan of some open experts that ask nothing."""
        step = self.step
        plan, openings = serve_open(
            step.scores_TC, step.ids_TC, self.limits_T, step.source_T, open_E=open_E, sources=step.load.sources
        )
        self.offer(plan, open_E)
        return plan, openings

    def offer(self, plan: Served, open_E: NDArray[np.bool_]) -> float:
        """What a plan is worth; it is kept if it is the best so far."""
        value = plan.mass / self.mass - self.step.price * self.step.load.seconds(plan.rows_XE) / self.seconds
        self.best.offer(value, plan.used_TC, open_E)
        return value

    def close(self) -> None:
        """Close experts on all the slowest ranks, round by round at a lower level of their time."""
        load = self.step.load
        open_E = self.best.open_E
        for _ in range(self.step.closing_rounds):
            plan, openings = self.serve_open(open_E)
            if self.best.unbeaten >= _PATIENCE:
                return
            closed_E, opened_E = _lower(load, plan, openings, open_E)
            if not closed_E.any():
                return
            open_E = (open_E & ~closed_E) | opened_E

    def price(self, open_E: NDArray[np.bool_]) -> None:
        """Let ranks and links ask for rows what they are busy, and the busiest raise their price while that helps."""
        step, load = self.step, self.step.load
        rate = self.step.price * self.mass / self.seconds
        prices = _Prices.even(load)
        rows_XE, stride = self.own_XE, _STRIDE
        best = -np.inf
        for _ in range(step.pricing_rounds):
            tried = prices.raised(load, rows_XE, stride)
            price_XE = np.round(rate * load.row_price_s_XE(tried.busy_G, tried.out_X, tried.in_G))
            plan = serve_priced(
                step.scores_TC,
                step.ids_TC,
                self.limits_T,
                step.source_T,
                open_E=open_E,
                price_XE=price_XE,
                may_skip=step.may_skip,
            )
            value = self.offer(plan, open_E)
            if value >= best:
                best, prices, rows_XE = value, tried, plan.rows_XE
            else:
                stride /= 2


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class _Prices:
    """By how much each rank, and each link out of a source and into a rank, sets the step's time: twice one in all."""

    busy_G: NDArray[np.float64]
    out_X: NDArray[np.float64]
    in_G: NDArray[np.float64]

    @classmethod
    def even(cls, load: StepLoad) -> Self:
        return cls(
            busy_G=np.full(load.ranks, 1 / load.ranks),
            out_X=np.full(load.sources, 0.5 / load.sources),
            in_G=np.full(load.ranks, 0.5 / load.ranks),
        )

    def raised(self, load: StepLoad, rows_XE: NDArray[np.int64], stride: float) -> Self:
        """Higher where it is busier than elsewhere."""
        links_s_XG = load.links_s_XG(rows_XE)
        links_s = np.concatenate([links_s_XG.sum(axis=1), load.copies * links_s_XG.sum(axis=0)])
        links = _raised(np.concatenate([self.out_X, self.in_G]), links_s, stride)
        return type(self)(
            busy_G=_raised(self.busy_G, load.compute_s_G(rows_XE), stride),
            out_X=links[: load.sources],
            in_G=links[load.sources :],
        )


def _raised(price_G: NDArray[np.float64], busy_G: NDArray[np.float64], stride: float) -> NDArray[np.float64]:
    """Prices that sum to one, raised where it is busier than elsewhere."""
    if not busy_G.max():
        return price_G
    raised_G = np.maximum(price_G * np.maximum(busy_G / busy_G.max(), _IDLE) ** stride, 1e-6)
    return np.asarray(raised_G / raised_G.sum())


def _lower(
    load: StepLoad, plan: Served, openings: Openings, open_E: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Experts to close so that no rank takes more than a lower level, and closed ones for which there is room then.

    Those go first that lose least gate mass a second saved, and come back that bring most.
    """
    compute_s_G = load.compute_s_G(plan.rows_XE)
    over_s_G = compute_s_G - _LEVEL * compute_s_G.max()
    rows_E = plan.rows_XE.sum(axis=0)
    row_s_E = load.copies * load.row_s * load.share_EG.max(axis=1)
    saved_s_E = load.open_s_E + rows_E * row_s_E
    may_E = open_E & (rows_E > 0) & ~openings.lone_E & (saved_s_E > 0)
    loss_E = np.where(may_E, openings.regret_E / np.where(may_E, saved_s_E, 1.0), np.inf)
    order_N = np.argsort(loss_E, kind="stable")[: int(may_E.sum())]
    closed_E = _down_to_level(order_N, load.holds_EG, saved_s_E, over_s_G)
    cost_s_E = load.open_s_E + openings.want_E * row_s_E
    may_E = ~open_E & (openings.gain_E > 0)
    order_N = np.argsort(-np.where(may_E, openings.gain_E, -1.0), kind="stable")[: int(may_E.sum())]
    return closed_E, _up_to_level(order_N, load.holds_EG, cost_s_E, over_s_G)


@numba.njit(cache=True)
def _down_to_level(order_N: Any, holds_EG: Any, saved_s_E: Any, over_s_G: Any) -> Any:
    """Which experts close: each in turn that is on a rank which is still over the level by `over_s_G`, lowered here."""
    closed_E = np.zeros(saved_s_E.size, dtype=np.bool_)
    for expert in order_N:
        for rank in range(over_s_G.size):
            closed_E[expert] |= holds_EG[expert, rank] and over_s_G[rank] > 0
        if closed_E[expert]:
            for rank in range(over_s_G.size):
                over_s_G[rank] -= saved_s_E[expert] * holds_EG[expert, rank]
    return closed_E


@numba.njit(cache=True)
def _up_to_level(order_N: Any, holds_EG: Any, cost_s_E: Any, over_s_G: Any) -> Any:
    """Which experts open: each in turn that brings none of its ranks over the level."""
    opened_E = np.zeros(cost_s_E.size, dtype=np.bool_)
    for expert in order_N:
        fits = True
        for rank in range(over_s_G.size):
            fits &= not (holds_EG[expert, rank] and over_s_G[rank] + cost_s_E[expert] > 0)
        opened_E[expert] = fits
        if fits:
            for rank in range(over_s_G.size):
                over_s_G[rank] += cost_s_E[expert] * holds_EG[expert, rank]
    return opened_E

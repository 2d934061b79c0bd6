"""Physics with fitted prices: seconds as stages that follow one another, each the rounded maximum of its terms."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from cost_models.description import Description

_ROWS = 4000  # more rows do not move a dozen prices
_OVERLAP = 4.0  # start of the exponent that rounds the corner where a stage's terms meet
_REACH = 1.3  # where prices start: what kernels commonly take over the datasheet
_PULL = 0.05  # an e-fold away from its start weighs as one row that is off by so much
_ENOUGH = 1e-5  # prices to five digits
_LEAST = 1e-300

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Physics:
    """Seconds = the sum over stages of the rounded maximum of price × term, itself in seconds.

    `prices`: by stage and term, > 0, how many times its seconds each term takes. `overlap`: the exponent p of each
    stage's rounded maximum, (Σ xᵖ)^(1/p): 1 adds the terms up, a large one takes the larger.
    """

    prices: Mapping[str, Mapping[str, float]]
    overlap: Mapping[str, float]

    def seconds(self, description: Description) -> Floats:
        """Seconds of each operation."""
        total: Floats = np.zeros(())
        for stage, terms in description.stages.items():
            priced = [self.prices[stage][name] * np.asarray(term) for name, term in terms.items()]
            total = total + _rounded_max(priced, self.overlap[stage])
        return total


def _rounded_max(terms: list[Floats], exponent: float) -> Floats:
    if len(terms) == 1:
        return terms[0]
    largest = terms[0]
    for term in terms[1:]:
        largest = np.maximum(largest, term)
    scale = np.maximum(largest, _LEAST)
    ratios = sum((term / scale) ** exponent for term in terms)
    return np.asarray(largest * ratios ** (1 / exponent))


def fit_physics(description: Description, seconds_N: Floats) -> Physics:
    """Prices and overlaps that make the logarithmic errors small; large errors count less than squared.

    What the rows cannot tell keeps the price it started with, 1.3; but a term that no row has takes the price of its
    like, another of its stage by the same last word (`compute` beside `8-bit compute`, where only one was measured).
    """
    rows = len(seconds_N)
    some = np.random.default_rng(0).permutation(rows)[:_ROWS]
    stages = {
        stage: {name: np.broadcast_to(np.asarray(term, dtype=np.float64), rows)[some] for name, term in terms.items()}
        for stage, terms in description.stages.items()
    }
    law = _Law(stages)
    log_s = np.log(seconds_N[some])
    start = law.start()

    def errors(parameters_P: Floats) -> Floats:
        return np.concatenate([np.log(law.seconds(parameters_P)[0]) - log_s, _PULL * (parameters_P - start)])

    def slopes(parameters_P: Floats) -> Floats:
        total_N, slope_PN = law.seconds(parameters_P)
        return np.concatenate([(slope_PN / total_N).T, _PULL * np.eye(len(parameters_P))])

    fitted = least_squares(
        errors, start, jac=slopes, loss="soft_l1", f_scale=0.1, ftol=_ENOUGH, xtol=_ENOUGH, max_nfev=100
    )
    return _with_likes(law.physics(fitted.x), stages)


def _with_likes(physics: Physics, stages: Mapping[str, Mapping[str, Floats]]) -> Physics:
    """Terms that no row has at the price of their likes."""
    prices = {}
    for stage, terms in stages.items():
        seen = {name for name, term in terms.items() if term.any()}
        prices[stage] = dict(physics.prices[stage])
        for name in terms.keys() - seen:
            like = next((other for other in terms if other in seen and other.split()[-1] == name.split()[-1]), name)
            prices[stage][name] = physics.prices[stage][like]
    return Physics(prices=prices, overlap=physics.overlap)


class _Law:
    """Stages as a function of P parameters: the logarithm of each price, then of each overlap less one.

    Stages of one term have no overlap.
    """

    def __init__(self, stages: Mapping[str, Mapping[str, Floats]]) -> None:
        self._stages = stages
        self._prices = [(stage, term) for stage, terms in stages.items() for term in terms]
        self._rounded = [stage for stage, terms in stages.items() if len(terms) > 1]

    def start(self) -> Floats:
        """Where the search begins."""
        prices = np.full(len(self._prices), np.log(_REACH))
        return np.concatenate([prices, np.full(len(self._rounded), np.log(_OVERLAP - 1))])

    def physics(self, parameters_P: Floats) -> Physics:
        """The parameters by name."""
        prices = dict(zip(self._prices, np.exp(np.clip(parameters_P[: len(self._prices)], -60, 60)), strict=True))
        overlaps = dict(zip(self._rounded, 1 + self._growth(parameters_P), strict=True))
        return Physics(
            prices={
                stage: {term: float(prices[stage, term]) for term in terms} for stage, terms in self._stages.items()
            },
            overlap={stage: float(overlaps.get(stage, 1.0)) for stage in self._stages},
        )

    def seconds(self, parameters_P: Floats) -> tuple[Floats, Floats]:
        """Seconds of each row [N], and their derivatives [P, N]."""
        price_P = np.exp(np.clip(parameters_P[: len(self._prices)], -60, 60))
        growth = dict(zip(self._rounded, self._growth(parameters_P), strict=True))
        slopes: list[Floats] = []
        overlap_slopes: list[Floats] = []
        total_N: Floats = np.zeros(())
        for stage, terms in self._stages.items():
            priced_TN = price_P[len(slopes) : len(slopes) + len(terms), None] * np.stack(list(terms.values()))
            if stage not in growth:
                total_N = total_N + priced_TN[0]
                slopes.append(priced_TN[0])
                continue
            power = 1 + growth[stage]
            largest_N = np.maximum(priced_TN.max(axis=0), _LEAST)
            ratio_TN = np.maximum(priced_TN / largest_N, _LEAST)
            raised_TN = ratio_TN**power
            sum_N = np.maximum(raised_TN.sum(axis=0), _LEAST)  # 0 where a stage does nothing
            stage_N = largest_N * sum_N ** (1 / power)
            logs_N = (raised_TN * np.log(ratio_TN)).sum(axis=0)
            total_N = total_N + stage_N
            slopes.extend(stage_N * raised_TN / sum_N)
            overlap_slopes.append(stage_N * growth[stage] * (logs_N / (power * sum_N) - np.log(sum_N) / power**2))
        return np.maximum(total_N, _LEAST), np.stack([*slopes, *overlap_slopes])

    def _growth(self, parameters_P: Floats) -> Floats:
        return np.asarray(np.exp(np.clip(parameters_P[len(self._prices) :], -8, 3)))

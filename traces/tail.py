"""Scores of candidates that were not recorded: how a router's scores go on below those that are known.

Two cases. `softmax` scores sum to one over all experts, so the mass of the unrecorded ones is known, and only how it
is shared out is a guess. Scores of other kinds say nothing of what follows them: their decay is continued, and its
scale is an extrapolation.

Both shapes were chosen by their error on the reference model, whose experts are all recorded (measured,
`benchmarks/completion.py`): a normal law for the known mass; for the unknown, the square root of the rank. On that root
the mean log gate of gpt-oss-20b falls evenly from rank to rank (.67, .74, .74), while it bends on the rank and on its
log. It is still too steep further down: ranks 5 to 16 of three trainings of the reference model came out 5, 13
and 19% too small.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, ndtri

from traces.errors import InputError
from traces.model import ScoreKind

Scores = NDArray[np.float64]

_LEAST = float(np.finfo(np.float16).smallest_subnormal)  # what a stored score that is not quite zero is at least
_NEWTON_STEPS = 12


def fit_decay(gates_TC: NDArray[Any], kind: ScoreKind) -> tuple[float, float]:
    """How steeply the scores [T, C] of one layer fall to their last rank, told from the ranks before: (a, b).

    Steepness is the fall of log score (of the logit, for `logits`; of the log odds, for `sigmoid`) over the rise of the
    square root of the rank. The last rank's is fitted as a + b × that of the ranks before, by least squares.
    Errors: `InputError` where there is one rank, which shows no fall.
    """
    ranks = gates_TC.shape[1]
    if ranks < 2:
        raise InputError(
            f"one recorded {kind} score a token shows no decay that could go on; record at least 2, or softmax scores"
        )
    line_TC = _to_line(gates_TC, kind)
    last_T = _steepness(line_TC[:, -2:], first=ranks - 1)
    if ranks == 2:
        return float(last_T.mean()), 0.0
    before_T = _steepness(line_TC[:, :-1], first=1)
    spread = float(before_T.var())
    slope = float(np.cov(before_T, last_T, bias=True)[0, 1]) / spread if spread > 0 else 0.0
    return float(last_T.mean() - slope * before_T.mean()), slope


def continued_tail(gates_TC: NDArray[Any], decay: tuple[float, float], kind: ScoreKind, count: int) -> Scores:
    """The next `count` scores after each row of `gates_TC` [T, C], descending: [T, count]; `decay` as fitted.

    They fall with the square root of the rank, no score above the one before.
    """
    recorded = gates_TC.shape[1]
    line_TC = _to_line(gates_TC, kind)
    before_T = _steepness(line_TC, first=1) if recorded > 1 else np.zeros(len(line_TC))
    steep_T = np.maximum(decay[0] + decay[1] * before_T, 0.0)
    fall_M = np.sqrt(recorded + 1.0 + np.arange(count)) - np.sqrt(recorded)
    tail_TM = _from_line(line_TC[:, -1:] - steep_T[:, None] * fall_M, kind)
    return np.minimum(tail_TM, gates_TC[:, -1:].astype(np.float64))


def anchored_tail(gates_TC: NDArray[Any], experts: int, count: int) -> Scores:
    """The next `count` softmax scores after each row of `gates_TC` [T, C], descending: [T, count].

    All E - C unrecorded scores together have what the recorded ones leave of one. Logits are taken to lie as E
    ordered draws of a normal law do (Blom's positions, (rank - 3/8) / (E + 1/4)), as wide for each token as its
    remaining mass asks for. The total never exceeds that mass.
    """
    recorded, rest = gates_TC.shape[1], experts - gates_TC.shape[1]
    quantile_R = -ndtri((np.arange(recorded, experts + 1) - 0.375) / (experts + 0.25))
    fall_R = quantile_R[0] - quantile_R[1:]
    last_T = gates_TC[:, -1].astype(np.float64)
    mass_T = np.maximum(1.0 - gates_TC.astype(np.float64).sum(axis=1), 0.0)
    wanted_T = np.log(np.clip(mass_T / np.maximum(last_T, _LEAST), _LEAST, rest))
    steepest = -np.log(_LEAST) / fall_R[0]
    steep_T = np.zeros(len(last_T))
    for _ in range(_NEWTON_STEPS):  # the log of the total is convex in the steepness: steps from 0 never overshoot
        share_TR = np.exp(-steep_T[:, None] * fall_R)
        total_T = share_TR.sum(axis=1)
        slope_T = -(share_TR @ fall_R) / total_T
        steep_T = np.clip(steep_T + (wanted_T - np.log(total_T)) / slope_T, 0.0, steepest)
    tail_TR = last_T[:, None] * np.exp(-steep_T[:, None] * fall_R)
    total_T = np.maximum(tail_TR.sum(axis=1), _LEAST)
    return np.asarray(tail_TR[:, :count] * np.minimum(mass_T / total_T, 1.0)[:, None])


def stored(scores: Scores) -> NDArray[np.float16]:
    """The scores in float16, none rounded up, so that totals stay below what they were."""
    limit = float(np.finfo(np.float16).max)
    near = np.clip(scores, -limit, limit).astype(np.float16)
    return np.where(near > scores, np.nextafter(near, np.float16(-limit)), near)


def _steepness(line_TC: Scores, *, first: int) -> Scores:
    """The fall from the first to the last column over the rise of the square root of the rank: [T]."""
    last = first + line_TC.shape[1] - 1
    return np.asarray((line_TC[:, 0] - line_TC[:, -1]) / (np.sqrt(last) - np.sqrt(first)))


def _to_line(gates_TC: NDArray[Any], kind: ScoreKind) -> Scores:
    """Scores on a scale without bounds."""
    gates = gates_TC.astype(np.float64)
    if kind == "logits":
        return gates
    if kind == "sigmoid":
        return np.asarray(logit(np.clip(gates, _LEAST, 1 - _LEAST)))
    return np.log(np.maximum(gates, _LEAST))


def _from_line(line: Scores, kind: ScoreKind) -> Scores:
    if kind == "logits":
        return line
    return np.asarray(expit(line)) if kind == "sigmoid" else np.exp(line)

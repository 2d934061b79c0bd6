"""Routing of a known unevenness without scores, for steps too large to make a trace of: which experts tokens choose."""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from traces.errors import InputError
from traces.model import ModelSpec

_BATCH = 1024  # tokens whose noise is drawn at once


def power_law_popularity(experts: int, *, exponent: float, tokens: int, seed: int) -> NDArray[np.float64]:
    """Shares of E experts: each drawn from x^-exponent on [1, 0.8 * tokens] by inverse CDF, then scaled to sum to one.

    So NVIDIA's AIConfigurator draws the loads of its measured tables (collector/helper.py), for `tokens` of all ranks.
    It is no Zipf law: at an exponent near 1 shares are spread evenly over the orders of magnitude.
    """
    if tokens < 2:
        raise InputError(f"power-law popularity for {tokens} tokens; it needs at least 2")
    power = 1 - exponent if exponent != 1 else 1e-9
    chance_E = np.random.default_rng(seed).random(experts)
    largest = max(0.8 * tokens, 1.0)
    drawn_E = ((largest**power - 1) * chance_E + 1) ** (1 / power)
    return np.asarray(drawn_E / drawn_E.sum())


def choose_experts(
    popularity_E: NDArray[np.float64], *, tokens: int, top_k: int, seed: int, groups: int = 1, kept_groups: int = 1
) -> NDArray[np.int32]:
    """The `top_k` experts of each token, [T, K], drawn without replacement in proportion to popularity (Plackett-Luce).

    With `groups` of experts a token first keeps the `kept_groups` whose two best scores add up to the most, as
    DeepSeek-V3's router does (arXiv 2412.19437); scores are log popularity plus Gumbel noise.
    """
    experts = popularity_E.size
    if experts % groups or not 1 <= kept_groups <= groups or not 1 <= top_k <= experts * kept_groups // groups:
        raise InputError(
            f"{top_k} of {experts} experts in {kept_groups} of {groups} groups: use groups that divide the experts, "
            "and at least as many experts in the kept ones as a token takes"
        )
    if not (popularity_E > 0).all():
        raise InputError(
            f"the popularity of expert {int(np.argmin(popularity_E))} is {popularity_E.min():g}; each must be above 0"
        )
    ids_TK = np.empty((tokens, top_k), dtype=np.int32)
    if groups == 1:
        _one_by_one(np.cumsum(popularity_E) / popularity_E.sum(), seed, ids_TK)
        return ids_TK
    wait_SX = np.ascontiguousarray(1 / popularity_E.reshape(groups, -1).T)  # the mean of each arrival
    rng = np.random.default_rng(seed)
    for first in range(0, tokens, _BATCH):
        batch_TK = ids_TK[first : first + _BATCH]
        _by_group(rng.standard_exponential((len(batch_TK), *wait_SX.shape)), wait_SX, kept_groups, batch_TK)
    return ids_TK


def balanced_experts(model: ModelSpec, *, tokens: int, slots: int) -> NDArray[np.int32]:
    """The slots that each token goes to, [T, K], where all get the same rows: token t takes K that lie evenly apart.

    Neighbours start one slot further, so that K slots an even stride apart go round. Where the stride is not whole, it
    is rounded down.
    """
    if slots < model.top_k:
        raise InputError(f"{slots} slots for tokens that each take {model.top_k}; use at least as many")
    start_T = np.arange(tokens)[:, None] % slots
    return np.asarray((start_T + np.arange(model.top_k) * (slots // model.top_k)) % slots, dtype=np.int32)


@numba.njit(cache=True)
def _one_by_one(cumulative_E: Any, seed: int, ids_TK: Any) -> None:
    """Draw again what a token has already."""
    np.random.seed(seed)
    for token in range(ids_TK.shape[0]):
        found = 0
        while found < ids_TK.shape[1]:
            expert = min(np.searchsorted(cumulative_E, np.random.random(), side="right"), cumulative_E.size - 1)
            fresh = True
            for earlier in range(found):
                fresh = fresh and ids_TK[token, earlier] != expert
            if fresh:
                ids_TK[token, found] = expert
                found += 1


@numba.njit(cache=True)
def _by_group(noise_TSX: Any, wait_SX: Any, kept_groups: int, ids_TK: Any) -> None:
    """Experts S of groups X arrive at exponential times, the popular ones sooner; a token takes the first that come.

    That is Plackett-Luce: minus the log of such a time is log popularity plus Gumbel noise. Two best log scores add up
    to the most where the product of the first two times is least, so that no more logs are needed than those in the
    noise. Groups lie innermost, for all of them to be compared at once.
    """
    size, groups = wait_SX.shape
    top_k = ids_TK.shape[1]
    time_SX = np.empty((size, groups))
    first_X, second_X = np.empty(groups), np.empty(groups)
    kept_X = np.empty(groups, dtype=np.bool_)
    time_K = np.empty(top_k)
    for token in range(ids_TK.shape[0]):
        first_X[:] = np.inf
        second_X[:] = np.inf
        for place in range(size):
            for group in range(groups):
                time = noise_TSX[token, place, group] * wait_SX[place, group]
                time_SX[place, group] = time
                first = first_X[group]
                later = time if time > first else first
                first_X[group] = time if time < first else first
                second_X[group] = later if later < second_X[group] else second_X[group]
        if size > 1:
            first_X *= second_X
        kept_X[:] = True
        for _ in range(groups - kept_groups):
            worst = np.argmax(first_X)
            first_X[worst] = -1.0
            kept_X[worst] = False
        time_K[:] = np.inf
        ids_K = ids_TK[token]
        for group in range(groups):
            if not kept_X[group]:
                continue
            for place in range(size):
                time = time_SX[place, group]
                if time >= time_K[top_k - 1]:
                    continue
                column = top_k - 1
                while column > 0 and time_K[column - 1] > time:
                    time_K[column], ids_K[column] = time_K[column - 1], ids_K[column - 1]
                    column -= 1
                time_K[column], ids_K[column] = time, group * size + place

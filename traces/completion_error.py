"""How wrong a completion is: of the last recorded expert, hidden, and of those below it where they are known."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traces.completion import CompletionModel, Order, complete, log_softmax
from traces.errors import InputError
from traces.trace import RoutingTrace

_RESAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over tokens and layers, its 95% bootstrap interval over requests, and the mean of each layer.

    The interval is None where there is one request: it says nothing of others.
    """

    mean: float
    interval: tuple[float, float] | None
    by_layer: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """How well one way of guessing finds experts.

    `recall`: by number m of guesses, the share of the m experts looked for (of the one, where one is hidden) that are
    among the m likeliest. `log_loss`: of the next expert, nats.
    """

    recall: dict[int, Estimate]
    log_loss: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenError:
    """Errors of guessing the last recorded expert from what is around it, beside guessing by popularity or evenly.

    `score_error`: mean absolute error of its score, as a share of the token's recorded mass; `score_bias`: the mean of
    predicted less true. None where there are no scores, or where the scale has no mass (logits).
    """

    tokens: int
    requests: int
    rank: int
    completion: Guess
    popularity: Guess
    uniform_recall: dict[int, float]
    uniform_log_loss: float
    score_error: Estimate | None
    score_bias: Estimate | None

    def to_json(self) -> dict[str, Any]:
        """The errors as a JSON object."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TailError:
    """Errors of completed candidates where the true ones are known.

    `spearman`: rank correlation of true and completed order over the unrecorded experts of a token. `refill`: the
    share of tokens that take the same expert when they may take their best unrecorded one within a random half of all
    experts; `popularity_refill` where they take the most popular of it. `score_error`: mean absolute error of a score,
    as a share of the token's recorded mass, `mass_error` of the sum of all completed scores; `true_mass`: that sum.
    `load_distance`: total-variation distance between the loads that true and completed next experts (as many as were
    recorded) put on the experts of a layer, 0 to 1, mean over layers.
    """

    tokens: int
    requests: int
    recorded: int
    order: Order
    completion: Guess
    popularity: Guess
    uniform_recall: dict[int, float]
    uniform_log_loss: float
    spearman: Estimate
    refill: Estimate
    popularity_refill: Estimate
    score_error: Estimate | None
    score_bias: Estimate | None
    mass_error: Estimate | None
    true_mass: Estimate | None
    load_distance: float

    def to_json(self) -> dict[str, Any]:
        """The errors as a JSON object."""
        return asdict(self)


def hidden_error(trace: RoutingTrace, model: CompletionModel, *, seed: int = 0) -> HiddenError:
    """Hide the last recorded expert of each token of `trace`, which `model` was not fitted on, and guess it.

    `seed` draws the bootstrap. Errors: `InputError` where the model cannot complete the trace, or knows its requests;
    or where there is no expert left when one is hidden (top k is 1).
    """
    model.check(trace)
    rank, experts = trace.candidates - 1, trace.model.all_experts
    if rank < 1:
        raise InputError(f"trace {trace.source}: 1 recorded candidate; hiding one of them needs at least 2")
    counts = [m for m in (1, 2, 4, 8) if m < experts - rank]
    true_TLC = trace.expert_ids_TLC[:, :, rank:].astype(np.int64)
    guesses = _Guesses(counts, trace, seed)
    popular = _Guesses(counts, trace, seed)
    error_L: list[NDArray[np.float64]] = []
    for layer, chance_TE in enumerate(model.log_chances(trace, after=rank)):
        guesses.add(chance_TE, true_TLC[:, layer])
        popular.add(_popularity(model, layer, chance_TE), true_TLC[:, layer])
        if _has_mass(trace) and trace.gates_TLC is not None and (rank > 1 or model.decay_L2 is None):
            gates_TC = trace.gates_TLC[:, layer].astype(np.float64)
            tail_T = model.tail(trace.gates_TLC[:, layer, :rank], layer, 1)[:, 0]
            error_L.append((tail_T - gates_TC[:, -1]) / _mass(gates_TC))
    error_TL = np.stack(error_L, axis=1) if error_L else None
    return HiddenError(
        tokens=trace.tokens,
        requests=int(np.unique(trace.request_T).size),
        rank=rank + 1,
        completion=guesses.guess(),
        popularity=popular.guess(),
        uniform_recall={m: m / (experts - rank) for m in counts},
        uniform_log_loss=float(np.log(experts - rank)),
        score_error=None if error_TL is None else estimate(np.abs(error_TL), trace.request_T, seed),
        score_bias=None if error_TL is None else estimate(error_TL, trace.request_T, seed),
    )


def tail_error(full: RoutingTrace, model: CompletionModel, *, seed: int = 0, order: Order = "likeliest") -> TailError:
    """Complete the best candidates of `full`, as many as `model` was fitted on, and compare with the others.

    `seed` draws the bootstrap, the random halves and a sampled order. Errors: `InputError` where `full` has no more
    candidates than the model was fitted on, or the model knows its requests.
    """
    if full.candidates <= model.recorded or full.completed:
        raise InputError(
            f"trace {full.source}: {full.recorded_candidates or full.candidates} recorded candidates, "
            f"{model.recorded} of them given; the true others are needed: use a trace that recorded more"
        )
    seen = full.best(model.recorded)
    done = complete(seen, candidates=full.candidates, fitted_on=model, seed=seed, order=order)
    recorded, experts, rng = model.recorded, full.model.all_experts, np.random.default_rng(seed)
    true_TLC, guess_TLC = (t.expert_ids_TLC[:, :, recorded:].astype(np.int64) for t in (full, done))
    counts = sorted({m for m in (1, recorded, 2 * recorded) if m < experts - recorded and m <= true_TLC.shape[2]})
    guesses, popular = _Guesses(counts, full, seed), _Guesses(counts, full, seed)
    figures: dict[str, list[NDArray[np.float64]]] = {name: [] for name in ("spearman", "refill", "popularity_refill")}
    for layer, chance_TE in enumerate(model.log_chances(seen)):
        popular_TE = _popularity(model, layer, chance_TE)
        guesses.add(chance_TE, true_TLC[:, layer], guess_TLC[:, layer])
        popular.add(popular_TE, true_TLC[:, layer])
        true_TE, guess_TE = (_ranks(ids[:, layer], experts) for ids in (true_TLC, guess_TLC))
        unrecorded_TE = np.isfinite(chance_TE)
        figures["spearman"].append(_correlation(true_TE, guess_TE, unrecorded_TE))
        allowed_TE = (rng.random(true_TE.shape) < 0.5) & unrecorded_TE
        take_T, *others = (
            np.where(allowed_TE, rank_TE, experts).argmin(axis=1) for rank_TE in (true_TE, guess_TE, -popular_TE)
        )
        for name, other_T in zip(("refill", "popularity_refill"), others, strict=True):
            figures[name].append((take_T == other_T).astype(np.float64))

    def of(columns: list[NDArray[np.float64]]) -> Estimate:
        return estimate(np.stack(columns, axis=1), full.request_T, seed)

    return TailError(
        tokens=full.tokens,
        requests=int(np.unique(full.request_T).size),
        recorded=recorded,
        order=order,
        completion=guesses.guess(),
        popularity=popular.guess(),
        uniform_recall={m: m / (experts - recorded) for m in counts},
        uniform_log_loss=float(np.log(experts - recorded)),
        load_distance=_load_distance(true_TLC[:, :, :recorded], guess_TLC[:, :, :recorded], experts),
        spearman=of(figures["spearman"]),
        refill=of(figures["refill"]),
        popularity_refill=of(figures["popularity_refill"]),
        **_score_errors(full, done, recorded, seed),
    )


def estimate(values_TL: NDArray[np.float64], request_T: NDArray[Any], seed: int) -> Estimate:
    """The mean of `values_TL` [T, L], with an interval from drawing whole requests with replacement."""
    _, index_T = np.unique(request_T, return_inverse=True)
    sum_R, tokens_R = np.bincount(index_T, weights=values_TL.mean(axis=1)), np.bincount(index_T)
    interval = None
    if sum_R.size > 1:
        drawn_NR = np.random.default_rng(seed).integers(0, sum_R.size, (_RESAMPLES, sum_R.size))
        low, high = np.quantile(sum_R[drawn_NR].sum(axis=1) / tokens_R[drawn_NR].sum(axis=1), [0.025, 0.975])
        interval = (float(low), float(high))
    return Estimate(
        mean=float(values_TL.mean()), interval=interval, by_layer=tuple(float(v) for v in values_TL.mean(axis=0))
    )


class _Guesses:
    """Collects recall and log loss layer by layer."""

    def __init__(self, counts: Sequence[int], trace: RoutingTrace, seed: int) -> None:
        self._request_T, self._seed = trace.request_T, seed
        self._recall: dict[int, list[NDArray[np.float64]]] = {m: [] for m in counts}
        self._loss: list[NDArray[np.float64]] = []

    def add(
        self, chance_TE: NDArray[np.float32], true_TM: NDArray[np.int64], guess_TM: NDArray[np.int64] | None = None
    ) -> None:
        """Log chances of the next expert, the true ones in order, and the guesses in order (by chance, if None)."""
        if guess_TM is None:
            guess_TM = np.argsort(-chance_TE, axis=1, stable=True)
        for m, values in self._recall.items():
            true_TX = true_TM[:, :m]
            found_TX = (true_TX[:, :, None] == guess_TM[:, None, :m]).any(axis=2)
            values.append(found_TX.mean(axis=1))
        self._loss.append(-np.take_along_axis(chance_TE, true_TM[:, :1], axis=1)[:, 0].astype(np.float64))

    def guess(self) -> Guess:
        def of(values: list[NDArray[np.float64]]) -> Estimate:
            return estimate(np.stack(values, axis=1), self._request_T, self._seed)

        return Guess(recall={m: of(values) for m, values in self._recall.items()}, log_loss=of(self._loss))


def _popularity(model: CompletionModel, layer: int, chance_TE: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log chances [T, E] by how often each expert was the last recorded one, of those that have any chance."""
    return log_softmax(np.where(np.isfinite(chance_TE), model.last_LE[layer], -np.inf))


def _ranks(ids_TM: NDArray[np.int64], experts: int) -> NDArray[np.float64]:
    """The rank of each expert in `ids_TM`, from 0; those not in it share what lies halfway down the rest: [T, E]."""
    ranks = ids_TM.shape[1]
    rank_TE = np.full((len(ids_TM), experts), (ranks + experts - 1) / 2)
    np.put_along_axis(rank_TE, ids_TM, np.arange(ranks, dtype=np.float64)[None], axis=1)
    return rank_TE


def _correlation(a_TE: NDArray[np.float64], b_TE: NDArray[np.float64], of_TE: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Pearson's correlation of each row of two arrays of ranks, over the entries `of_TE`: [T]."""
    count_T1 = of_TE.sum(axis=1, keepdims=True)
    a_TE, b_TE = (np.where(of_TE, x - (x * of_TE).sum(axis=1, keepdims=True) / count_T1, 0) for x in (a_TE, b_TE))
    norm_T = np.sqrt((a_TE**2).sum(axis=1) * (b_TE**2).sum(axis=1))
    return np.asarray((a_TE * b_TE).sum(axis=1) / np.where(norm_T > 0, norm_T, 1))


def _has_mass(trace: RoutingTrace) -> bool:
    return trace.gates_TLC is not None and trace.score_kind != "logits"


def _mass(gates: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of a token's scores, over the last axis."""
    return np.asarray(np.maximum(gates.sum(axis=-1), np.finfo(np.float16).tiny))


def _score_errors(full: RoutingTrace, done: RoutingTrace, recorded: int, seed: int) -> dict[str, Estimate | None]:
    if not _has_mass(full) or full.gates_TLC is None or done.gates_TLC is None:
        return dict.fromkeys(("score_error", "score_bias", "mass_error", "true_mass"))
    true_TLC, done_TLC = full.gates_TLC.astype(np.float64), done.gates_TLC.astype(np.float64)
    mass_TL1 = _mass(true_TLC[:, :, :recorded])[:, :, None]
    true_TLC, done_TLC = true_TLC[:, :, recorded:] / mass_TL1, done_TLC[:, :, recorded:] / mass_TL1
    figures = {
        "score_error": np.abs(done_TLC - true_TLC).mean(axis=2),
        "score_bias": (done_TLC - true_TLC).mean(axis=2),
        "mass_error": np.abs(done_TLC.sum(axis=2) - true_TLC.sum(axis=2)),
        "true_mass": true_TLC.sum(axis=2),
    }
    return {name: estimate(values_TL, full.request_T, seed) for name, values_TL in figures.items()}


def _load_distance(true_TLM: NDArray[np.int64], guess_TLM: NDArray[np.int64], experts: int) -> float:
    def share_LE(ids_TLM: NDArray[np.int64]) -> NDArray[np.float64]:
        layers = ids_TLM.shape[1]
        keys = ids_TLM + np.arange(layers)[:, None] * experts
        count_LE = np.bincount(keys.ravel(), minlength=layers * experts).reshape(layers, experts)
        return np.asarray(count_LE / (ids_TLM.size / layers))

    return float(0.5 * np.abs(share_LE(true_TLM) - share_LE(guess_TLM)).sum(axis=1).mean())

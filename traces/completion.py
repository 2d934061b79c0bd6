"""Completion: which further experts a token would have ranked, where an engine recorded only those it chose.

Policies that reroute, or that refill from experts already active, look past the chosen k. What the router said of the
others is lost. Here it is guessed by a model fitted on *other* requests of the same routers:

1. In each layer, hide a recorded expert, and predict it from the better-ranked ones, by a multinomial logistic
   regression over the experts that are left. The last rank counts fully, each rank above it half of the one below
   (measured: all alike is 3% worse in log loss on the reference model, and 4% better on FLAME's few tokens).
2. The regression sees the better experts and their shares of the scores; the recorded experts of the layers before
   and after and of the tokens before and after in the request; and how often the rest of the request uses each expert.
   A recording is complete when it is completed, so it looks both ways; nothing here could run inside an engine.
3. A token's unrecorded experts then follow in the order of their predicted chance (or in one drawn by chance), and
   get the scores of `traces.tail`.

Null experts are guessed as others are: a router ranks both kinds alike.

The k-th expert can be hidden and its error known (`traces.completion_error`). Ranks below it were never seen: that they
follow the same law is an assumption, checked only on models whose experts were all recorded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_array

from traces.errors import InputError
from traces.model import ModelSpec, ScoreKind
from traces.surroundings import SOURCES_AROUND, Around, better_ranked
from traces.tail import anchored_tail, continued_tail, fit_decay, stored
from traces.trace import RoutingTrace

Order = Literal["likeliest", "sampled"]
Weights = NDArray[np.float32]

# Measured by the log loss of the hidden expert on other requests of gpt-oss-20b, FLAME-MoE-290M and the reference
# model: 10 is within 2% of the best of 5, 10 and 20 on all three; 1 overfits 2,000 tokens, 100 learns too little.
_RIDGE = 10.0
_ITERATIONS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionModel:
    """What the unrecorded experts of a token are told from; fitted by `fit_completion`.

    `recorded`: the ranks R that were recorded. `popularity_LE`: how often each expert is used, a share of all pairs;
    `last_LE`: log share of the last rank. Weights [L, inputs, E] of better experts (`better_LXE`, 2E inputs: chosen or
    not, and share of score) and of those around (`around_LXE`, 4E), and of the request's own use (`request_L`).
    `decay_L2`: of `traces.tail.fit_decay`; None where scores need none. `fitted_on` and `requests` name what it saw.
    """

    model: ModelSpec
    recorded: int
    score_kind: ScoreKind
    popularity_LE: Weights
    last_LE: Weights
    better_LXE: Weights
    around_LXE: Weights
    request_L: Weights
    decay_L2: tuple[tuple[float, float], ...] | None
    fitted_on: str
    requests: frozenset[int]

    def check(self, trace: RoutingTrace) -> None:
        """Refuse a trace that this model cannot complete, or that it was fitted on.

        Requests are the same where their number and the trace's source are. Errors: `InputError`.
        """
        theirs, ours = (f"{m.name}, {m.layers} layers of {m.all_experts} experts" for m in (trace.model, self.model))
        if theirs != ours:
            raise InputError(
                f"trace {trace.source}: of {theirs}; the completion was fitted on {ours}: fit it on the same model"
            )
        if trace.completed:
            raise InputError(
                f"trace {trace.source}: already completed from {trace.recorded_candidates} to {trace.candidates} "
                "candidates; complete the recorded trace"
            )
        theirs = f"{trace.candidates} candidates with scores of kind {_kind(trace)}"
        ours = f"{self.recorded} candidates with scores of kind {self.score_kind}"
        if theirs != ours:
            raise InputError(
                f"trace {trace.source}: {theirs}; the completion was fitted on {ours}: "
                "cut both to the same best candidates, or fit it on a trace recorded alike"
            )
        seen = self.requests.intersection(np.unique(trace.request_T).tolist())
        if trace.source == self.fitted_on and seen:
            raise InputError(
                f"trace {trace.source}: {len(seen)} of its requests (the first is {min(seen)}) were fitted on; "
                "complete other requests than those"
            )

    def log_chances(self, trace: RoutingTrace, after: int | None = None) -> Iterator[NDArray[np.float32]]:
        """For each layer, the log chance [T, E] of each expert to come next after the best `after`; -inf for those.

        `after` is all the trace's candidates by default; with fewer, the token's others are hidden from the model.
        """
        around, ranks = Around(trace), trace.candidates if after is None else after
        for layer in range(trace.model.layers):
            score_TE = self.last_LE[layer] + around.inputs(layer) @ self.around_LXE[layer]
            score_TE += better_ranked(trace, layer, ranks) @ self.better_LXE[layer]
            score_TE += self.request_L[layer] * around.request_use(layer, self.popularity_LE[layer])
            np.put_along_axis(score_TE, trace.expert_ids_TLC[:, layer, :ranks].astype(np.int64), -np.inf, axis=1)
            yield log_softmax(score_TE)

    def tail(self, gates_TC: NDArray[np.float16], layer: int, count: int) -> NDArray[np.float16]:
        """The scores of the `count` ranks after the given ones in one layer, descending: [T, count]."""
        if self.decay_L2 is None:
            return stored(anchored_tail(gates_TC, self.model.all_experts, count))
        return stored(continued_tail(gates_TC, self.decay_L2[layer], self.score_kind, count))


def fit_completion(trace: RoutingTrace) -> CompletionModel:
    """Fit a completion of traces that hold as many candidates as this one, on its tokens.

    Errors: `InputError` where the trace is completed itself, holds every expert, or shows no decay of scores.
    """
    if trace.completed:
        raise InputError(f"trace {trace.source}: completed; fit on what was recorded")
    if trace.candidates == trace.model.all_experts:
        raise InputError(
            f"trace {trace.source}: all {trace.candidates} experts are recorded, there is none to fit or to complete"
        )
    around, kind = Around(trace), _kind(trace)
    layers, experts = trace.model.layers, trace.model.all_experts
    popularity_LE = np.empty((layers, experts), np.float32)
    for layer in range(layers):
        popularity_LE[layer] = np.bincount(trace.expert_ids_TLC[:, layer].ravel(), minlength=experts) + 0.5
    popularity_LE /= popularity_LE.sum(axis=1, keepdims=True)
    last_LE = np.empty_like(popularity_LE)
    better_LXE = np.empty((layers, 2 * experts, experts), np.float32)
    around_LXE = np.empty((layers, SOURCES_AROUND * experts, experts), np.float32)
    request_L = np.empty(layers, np.float32)
    for layer in range(layers):
        count_E = np.bincount(trace.expert_ids_TLC[:, layer, -1], minlength=experts) + 0.5
        last_LE[layer] = np.log(count_E / count_E.sum())
        use_TE = around.request_use(layer, popularity_LE[layer])
        fitted = _fit_layer(trace, layer, around.inputs(layer), use_TE, last_LE[layer])
        better_LXE[layer], around_LXE[layer], request_L[layer] = fitted
    decay_L2 = None
    if trace.gates_TLC is not None and kind != "softmax":
        decay_L2 = tuple(fit_decay(trace.gates_TLC[:, layer], kind) for layer in range(layers))
    return CompletionModel(
        model=trace.model,
        recorded=trace.candidates,
        score_kind=kind,
        popularity_LE=popularity_LE,
        last_LE=last_LE,
        better_LXE=better_LXE,
        around_LXE=around_LXE,
        request_L=request_L,
        decay_L2=decay_L2,
        fitted_on=trace.source,
        requests=frozenset(np.unique(trace.request_T).tolist()),
    )


def complete(
    trace: RoutingTrace,
    *,
    candidates: int,
    fitted_on: RoutingTrace | CompletionModel,
    seed: int = 0,
    order: Order = "likeliest",
) -> RoutingTrace:
    """The trace with `candidates` experts a token: the recorded ones as they are, then the guessed ones.

    `order` is `likeliest` (the best guess of each token) or `sampled` (drawn without replacement by predicted chance,
    with `seed`, which nothing else uses). Sampled experts share load a little more truly (total-variation distance of
    loads .066 to .081 against .082 to .087, measured on three trainings of the reference model) and are worse token by
    token (.26 to .33 against .36 to .45 of the next experts found).

    Scores go on descending on the trace's scale; a trace without scores stays without.
    Errors: `InputError` where there is nothing to complete, or the model was fitted on another kind of trace or on
    requests of this one.
    """
    if not trace.candidates < candidates <= trace.model.all_experts:
        raise InputError(
            f"trace {trace.source}: complete {trace.candidates} candidates to {candidates}; "
            f"use {trace.candidates + 1} to {trace.model.all_experts} (experts)"
        )
    if isinstance(fitted_on, RoutingTrace):
        if fitted_on is trace:
            raise InputError(f"trace {trace.source}: cannot be completed from itself; fit on other requests")
        fitted_on = fit_completion(fitted_on)
    fitted_on.check(trace)
    shape = (trace.tokens, trace.model.layers, candidates)
    more, recorded = candidates - trace.candidates, trace.candidates
    ids_TLC = np.empty(shape, np.uint16)
    ids_TLC[:, :, :recorded] = trace.expert_ids_TLC
    gates_TLC = None if trace.gates_TLC is None else np.empty(shape, np.float16)
    rng = np.random.default_rng(seed)
    for layer, chance_TE in enumerate(fitted_on.log_chances(trace)):
        if order == "sampled":  # Gumbel noise makes sorting a draw without replacement (arXiv 1903.06059)
            chance_TE += rng.gumbel(size=chance_TE.shape).astype(np.float32)
        ids_TLC[:, layer, recorded:] = np.argsort(-chance_TE, axis=1, stable=True)[:, :more]
        if gates_TLC is not None and trace.gates_TLC is not None:
            gates_TLC[:, layer, :recorded] = trace.gates_TLC[:, layer]
            gates_TLC[:, layer, recorded:] = fitted_on.tail(trace.gates_TLC[:, layer], layer, more)
    return replace(
        trace,
        expert_ids_TLC=ids_TLC,
        gates_TLC=gates_TLC,
        source=f"{trace.source}, completed from {recorded} to {candidates} candidates",
        recorded_candidates=recorded,
    )


def complete_windows(
    plan: RoutingTrace, others: Sequence[RoutingTrace], candidates: int, seed: int = 0
) -> list[RoutingTrace]:
    """Each of `others` with `candidates` experts a token, completed by one model fitted on the requests of `plan`."""
    fitted = fit_completion(plan)
    return [complete(other, candidates=candidates, fitted_on=fitted, seed=seed) for other in others]


def _kind(trace: RoutingTrace) -> ScoreKind:
    return "none" if trace.gates_TLC is None else trace.score_kind


def _fit_layer(
    trace: RoutingTrace, layer: int, around: "csr_array[Any, Any]", use_TE: NDArray[np.float32], last_E: Weights
) -> tuple[Weights, Weights, float]:
    """The weights of better experts [2E, E], of those around [4E, E] and of the request's use, by penalised likelihood.

    L-BFGS over the log likelihood of every recorded expert but the best (of the best where there is no other), each
    among the experts that are not better, with a ridge on the first two.
    """
    ids_TC = trace.expert_ids_TLC[:, layer].astype(np.int64)
    experts, recorded, row_T = trace.model.all_experts, trace.candidates, np.arange(trace.tokens)
    ranks = [(r, better_ranked(trace, layer, r), 0.5 ** (recorded - 1 - r)) for r in range(1, recorded)]
    ranks = ranks or [(0, csr_array((trace.tokens, 2 * experts), dtype=np.float32), 1.0)]
    back = around.T.tocsr()
    backs = [better.T.tocsr() for _, better, _ in ranks]
    split = 2 * experts * experts

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights = flat[:-1].astype(np.float32)
        better_XE, around_XE = weights[:split].reshape(-1, experts), weights[split:].reshape(-1, experts)
        context_TE = last_E + around @ around_XE + np.float32(flat[-1]) * use_TE
        lost, slope_TE = 0.5 * _RIDGE * float(flat[:-1] @ flat[:-1]), np.zeros_like(context_TE)
        better_slope_XE = _RIDGE * better_XE
        for (rank, better, weight), better_back in zip(ranks, backs, strict=True):
            score_TE = context_TE + better @ better_XE
            np.put_along_axis(score_TE, ids_TC[:, :rank], -np.inf, axis=1)
            log_chance_TE = log_softmax(score_TE)
            lost -= weight * float(log_chance_TE[row_T, ids_TC[:, rank]].sum(dtype=np.float64))
            error_TE = np.exp(log_chance_TE)
            error_TE[row_T, ids_TC[:, rank]] -= 1
            error_TE *= np.float32(weight)
            slope_TE += error_TE
            better_slope_XE += better_back @ error_TE
        around_slope_XE = back @ slope_TE + _RIDGE * around_XE
        request_slope = np.vdot(slope_TE, use_TE)
        slope = np.concatenate([better_slope_XE.ravel(), around_slope_XE.ravel(), [request_slope]])
        return lost, slope.astype(np.float64)

    start = np.zeros((2 + SOURCES_AROUND) * experts * experts + 1)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": _ITERATIONS}).x
    weights = found[:-1].astype(np.float32)
    return weights[:split].reshape(-1, experts), weights[split:].reshape(-1, experts), float(found[-1])


def log_softmax(score_TE: NDArray[np.float32]) -> NDArray[np.float32]:
    """The log of each row's softmax: [T, E]."""
    shifted_TE = score_TE - score_TE.max(axis=1, keepdims=True)
    return np.asarray(shifted_TE - np.log(np.exp(shifted_TE).sum(axis=1, keepdims=True)), dtype=np.float32)

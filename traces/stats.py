"""What a trace says about its routers: how uneven experts' loads are and how much tokens reuse experts."""

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from traces.errors import InputError
from traces.model import ModelSpec
from traces.trace import RoutingTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """How uneven the loads of the experts of one layer are; averages of both, where it stands for several layers.

    `max_over_mean` is 1 and `gini` 0 where all experts get the same.
    """

    max_over_mean: float
    gini: float

    @classmethod
    def of(cls, loads_LE: NDArray[np.int64]) -> Self:
        """Averages over the layers of token counts [L, E]."""
        return cls(max_over_mean=float(max_over_mean(loads_LE).mean()), gini=float(gini(loads_LE).mean()))


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStats:
    """The statistics of a trace whose tokens use their `top_k` best candidates.

    `max_over_mean_L` and `gini_L`: the unevenness of expert loads in each layer. `reuse_L`: the share of a
    token's experts that the token before it in the same request also used, None where no two tokens follow one
    another; `uniform_reuse` is what random experts would give, K / E, null experts counted in E. Elsewhere null experts
    are left out: what goes to them is no load and no reuse. `by_domain`: `Balance` of each domain's own
    tokens, averaged over layers. `uniform`: the same for random experts and as many tokens, which is the unevenness
    that chance alone gives.
    """

    tokens: int
    requests: int
    top_k: int
    max_over_mean_L: tuple[float, ...]
    gini_L: tuple[float, ...]
    reuse_L: tuple[float, ...] | None
    uniform_reuse: float
    uniform: Balance
    by_domain: dict[str, Balance]

    def to_json(self) -> dict[str, Any]:
        """The statistics as a JSON object."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Floating-point operations and weights of a token in the MoE layers, shared experts included.

    `sparse_flops`: with the experts that a token uses; `dense_flops`: with all of them, as without a router.
    `active_experts`: K / E. Null experts that are among the K cost nothing: with them all of it is a bound.
    `active_parameters`: the share of the layers' parameters that a token uses.
    """

    sparse_flops: float
    dense_flops: float
    active_experts: float
    active_parameters: float

    @classmethod
    def of(cls, model: ModelSpec, top_k: int | None = None) -> Self:
        """With `top_k` experts a token, the model's own by default.

        >>> model = ModelSpec(name="m", layers=1, experts=8, top_k=2, hidden=4, expert_hidden=4)
        >>> Compute.of(model).sparse_flops / Compute.of(model).dense_flops
        0.25
        """
        k = model.top_k if top_k is None else top_k
        used = min(k, model.experts)
        sparse, dense = model.flops_per_token(used), model.flops_per_token(model.experts)
        return cls(
            sparse_flops=sparse,
            dense_flops=dense,
            active_experts=used / model.experts,
            active_parameters=sparse / dense,
        )

    def to_json(self) -> dict[str, Any]:
        """The figures as a JSON object."""
        return asdict(self)


def trace_stats(trace: RoutingTrace, top_k: int | None = None, *, seed: int = 0) -> TraceStats:
    """The statistics of `trace`; `top_k` is the model's own by default, `seed` draws the uniform routing.

    Errors: `InputError` where the trace has fewer than `top_k` candidates.
    """
    k = trace.model.top_k if top_k is None else top_k
    if not 1 <= k <= trace.candidates:
        raise InputError(
            f"trace {trace.source}: top_k {k}, but it recorded {trace.candidates} candidates a token; "
            f"use top_k 1 to {trace.candidates}"
        )
    loads_LE = trace.loads_LE(k)
    return TraceStats(
        tokens=trace.tokens,
        requests=int(np.unique(trace.request_T).size),
        top_k=k,
        max_over_mean_L=tuple(max_over_mean(loads_LE).tolist()),
        gini_L=tuple(gini(loads_LE).tolist()),
        reuse_L=_reuse(trace, k),
        uniform_reuse=k / trace.model.all_experts,
        uniform=Balance.of(_uniform_loads(trace, k, np.random.default_rng(seed))),
        by_domain=_by_domain(trace, k),
    )


def max_over_mean(loads_LE: NDArray[np.int64]) -> NDArray[np.float64]:
    """The largest load of each layer over its mean load: [L], 0 where there is none.

    >>> max_over_mean(np.array([[1, 1, 1, 5]])).tolist()
    [2.5]
    """
    return np.asarray(loads_LE.max(axis=1) * loads_LE.shape[1] / np.maximum(loads_LE.sum(axis=1), 1), dtype=np.float64)


def gini(loads_LE: NDArray[np.int64]) -> NDArray[np.float64]:
    """The Gini coefficient of the loads of each layer: [L], 0 if all are equal, (E - 1) / E if one has all.

    >>> gini(np.array([[0, 0, 0, 8], [2, 2, 2, 2]])).tolist()
    [0.75, 0.0]
    """
    experts = loads_LE.shape[1]
    weight_E = 2 * np.arange(1, experts + 1) - experts - 1
    return np.asarray(
        (np.sort(loads_LE, axis=1) @ weight_E) / (experts * np.maximum(loads_LE.sum(axis=1), 1)), dtype=np.float64
    )


def _by_domain(trace: RoutingTrace, k: int) -> dict[str, Balance]:
    if trace.domain_T is None:
        return {}
    return {
        trace.domains[domain]: Balance.of(trace.take(trace.domain_T == domain).loads_LE(k))
        for domain in np.unique(trace.domain_T)
    }


def _reuse(trace: RoutingTrace, k: int) -> tuple[float, ...] | None:
    order_T = np.lexsort((trace.position_T, trace.request_T))
    follows_T = (np.diff(trace.request_T[order_T]) == 0) & (np.diff(trace.position_T[order_T]) == 1)
    if not follows_T.any():
        return None
    before_P, after_P = order_T[:-1][follows_T], order_T[1:][follows_T]
    reuse = []
    for layer in range(trace.model.layers):  # one at a time: pairs of candidates take K times the trace's memory
        ids_TK = trace.expert_ids_TLC[:, layer, :k]
        work_PK = ids_TK[after_P] < trace.model.experts
        again_PK = (ids_TK[after_P][:, :, None] == ids_TK[before_P][:, None, :]).any(axis=2)
        reuse.append(float((again_PK & work_PK).sum() / max(int(work_PK.sum()), 1)))
    return tuple(reuse)


def _uniform_loads(trace: RoutingTrace, k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Token counts [L, E] when each token of each layer uses `k` distinct random experts, null ones among them.

    Floyd's sampling (CACM 30(9), 1987): the i-th draw is from one expert more than the draw before, and takes
    that last expert if the drawn one is in use.
    """
    layers, experts, every = trace.model.layers, trace.model.experts, trace.model.all_experts
    loads_LE = np.empty((layers, experts), dtype=np.int64)
    for layer in range(layers):
        ids_TK = np.empty((trace.tokens, k), dtype=np.int64)
        for i, last in enumerate(range(every - k, every)):
            drawn_T = rng.integers(0, last + 1, trace.tokens)
            in_use_T = (ids_TK[:, :i] == drawn_T[:, None]).any(axis=1)
            ids_TK[:, i] = np.where(in_use_T, last, drawn_T)
        loads_LE[layer] = np.bincount(ids_TK.ravel(), minlength=every)[:experts]
    return loads_LE

"""What is recorded around an expert that was not: the inputs from which `traces.completion` tells it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from traces.trace import RoutingTrace

SOURCES_AROUND = 4  # layer before and after, token before and after
_PRIOR_TOKENS = 20  # how many tokens of average use a request's own use is mixed with


class Around:
    """What is recorded around each token: in the layers and tokens beside it, and in the rest of its request."""

    def __init__(self, trace: RoutingTrace) -> None:
        self._ids_TLC = trace.expert_ids_TLC.astype(np.int64)
        self._layers, self._experts = trace.model.layers, trace.model.all_experts
        order_T = np.lexsort((trace.position_T, trace.request_T))
        next_T = (np.diff(trace.request_T[order_T]) == 0) & (np.diff(trace.position_T[order_T]) == 1)
        self._before_T, self._after_T = np.full((2, trace.tokens), -1)
        self._before_T[order_T[1:][next_T]] = order_T[:-1][next_T]
        self._after_T[order_T[:-1][next_T]] = order_T[1:][next_T]
        _, self._request_T = np.unique(trace.request_T, return_inverse=True)

    def inputs(self, layer: int) -> "csr_array[Any, Any]":
        """Which experts are used in the layer before and after and by the token before and after: [T, 4E]."""
        tokens = len(self._ids_TLC)
        none_T, all_T = np.full(tokens, -1), np.arange(tokens)
        sources = (
            (layer - 1, all_T if layer else none_T),
            (layer + 1, all_T if layer + 1 < self._layers else none_T),
            (layer, self._before_T),
            (layer, self._after_T),
        )
        columns_TX = np.concatenate(
            [self._ids_TLC[token_T, at % self._layers] + i * self._experts for i, (at, token_T) in enumerate(sources)],
            axis=1,
        )
        known_TX = np.repeat(np.stack([token_T >= 0 for _, token_T in sources], axis=1), self._ids_TLC.shape[2], axis=1)
        return _rows(columns_TX, known_TX.astype(np.float32), SOURCES_AROUND * self._experts)

    def request_use(self, layer: int, popularity_E: NDArray[np.float32]) -> NDArray[np.float32]:
        """Log of how much more the rest of a token's request uses each expert than all requests do: [T, E]."""
        ids_TC = self._ids_TLC[:, layer]
        requests, count = int(self._request_T.max()) + 1, ids_TC.shape[1]
        keys_TC = self._request_T[:, None] * self._experts + ids_TC
        use_RE = np.bincount(keys_TC.ravel(), minlength=requests * self._experts).reshape(requests, self._experts)
        use_TE = use_RE[self._request_T].astype(np.float32)
        np.put_along_axis(use_TE, ids_TC, np.take_along_axis(use_TE, ids_TC, axis=1) - 1, axis=1)
        others_T1 = np.bincount(self._request_T)[self._request_T][:, None] - 1
        usual_E = popularity_E * count
        use_TE = (use_TE + _PRIOR_TOKENS * usual_E) / ((others_T1 + _PRIOR_TOKENS) * usual_E)
        return np.asarray(np.log(use_TE), dtype=np.float32)


def better_ranked(trace: RoutingTrace, layer: int, ranks: int) -> "csr_array[Any, Any]":
    """The best `ranks` experts of each token, as a mark and as a share of their scores: [T, 2E]."""
    ids_TC = trace.expert_ids_TLC[:, layer, :ranks].astype(np.int64)
    share_TC = np.full(ids_TC.shape, 1 / ranks, np.float32)
    if trace.gates_TLC is not None:
        share_TC = trace.gates_TLC[:, layer, :ranks].astype(np.float32)
        if trace.score_kind == "logits":
            share_TC = np.exp(share_TC - share_TC.max(axis=1, keepdims=True))
        share_TC = share_TC / np.maximum(share_TC.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    values_TX = np.concatenate([np.ones_like(share_TC), share_TC], axis=1)
    return _rows(
        np.concatenate([ids_TC, ids_TC + trace.model.all_experts], axis=1), values_TX, 2 * trace.model.all_experts
    )


def _rows(columns_TX: NDArray[np.int64], values_TX: NDArray[np.float32], width: int) -> "csr_array[Any, Any]":
    """A sparse matrix [T, width] of as many entries in each row."""
    starts = np.arange(len(columns_TX) + 1) * columns_TX.shape[1]
    return csr_array((values_TX.ravel(), columns_TX.ravel(), starts), shape=(len(columns_TX), width))

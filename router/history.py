"""What earlier traffic says of a model's routing: what policies are set by, as placements are by earlier loads."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from traces.errors import InputError
from traces.trace import RoutingTrace

_QUANTILES = np.linspace(0, 1, 101)


def read_output_errors(path: Path) -> NDArray[np.float64]:
    """The errors [L, K] in a file of `moeroute model errors`; `InputError` if it is none."""
    try:
        return np.array(json.loads(path.read_bytes())["output_error_LK"], dtype=np.float64)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; measure errors with moeroute model errors -o {path.parent}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a file of moeroute model errors; measure them again") from error


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class RoutingHistory:
    """Statistics of each of L layers over earlier tokens.

    `together_LEE` int64: tokens that use both experts among their top k, the diagonal counts an expert's own; E counts
    a model's null experts too. `ratio_LQ`: the 101 percentiles of the second-best score over the best one of a token.
    `output_error_LK`: how far a layer's output lies off when tokens use only their 1, 2, …, top-k best experts, as a
    share of the output's own size; 0 in the last column. `measured`: it was measured on the model itself; else it is
    the share of the top-k gate mass that the left-out experts had, which is what a trace can tell.
    """

    together_LEE: NDArray[np.int64]
    ratio_LQ: NDArray[np.float64]
    output_error_LK: NDArray[np.float64]
    measured: bool = False

    @classmethod
    def of(cls, trace: RoutingTrace) -> Self:
        """Of all tokens of `trace`. Errors: `InputError` where it has no gates, or logits in their place."""
        if trace.gates_TLC is None:
            raise InputError(f"trace {trace.source} has no gates; earlier traffic needs the scores of the candidates")
        if trace.score_kind == "logits":
            raise InputError(f"trace {trace.source} holds logits; record or import it with softmax scores")
        model, k = trace.model, trace.model.top_k
        layers, experts = model.layers, model.all_experts
        together_LEE = np.zeros((layers, experts, experts), dtype=np.int64)
        ratio_LQ = np.zeros((layers, _QUANTILES.size))
        lost_LK = np.zeros((layers, k))
        for layer in range(layers):
            ids_TK = trace.expert_ids_TLC[:, layer, :k].astype(np.int64)
            pairs = (ids_TK[:, :, None] * experts + ids_TK[:, None, :]).ravel()
            together_LEE[layer] = np.bincount(pairs, minlength=experts**2).reshape(experts, experts)
            gates_TC = trace.gates_TLC[:, layer].astype(np.float64)
            if trace.candidates > 1:
                best_T = np.where(gates_TC[:, 0] > 0, gates_TC[:, 0], 1.0)
                ratio_LQ[layer] = np.quantile(gates_TC[:, 1] / best_T, _QUANTILES)
            kept_TK = np.cumsum(gates_TC[:, :k], axis=1)
            total_T1 = np.where(kept_TK[:, -1:] > 0, kept_TK[:, -1:], 1.0)
            lost_LK[layer] = np.maximum(1 - kept_TK / total_T1, 0).mean(axis=0)
        lost_LK[:, -1] = 0.0
        return cls(together_LEE=together_LEE, ratio_LQ=ratio_LQ, output_error_LK=lost_LK)

    @property
    def layers(self) -> int:
        """L."""
        return int(self.output_error_LK.shape[0])

    @property
    def experts(self) -> int:
        """E, with null experts."""
        return int(self.together_LEE.shape[1])

    def with_output_error(self, error_LK: NDArray[np.float64]) -> Self:
        """The same traffic, with errors that were measured on the model (`router.nn.output_error`).

        Errors: `InputError` unless they are those of its layers and k: numbers of at least 0.
        """
        if error_LK.shape != self.output_error_LK.shape:
            raise InputError(
                f"output errors of shape {error_LK.shape}; the history's layers and k are "
                f"{self.output_error_LK.shape}: measure them on the model that gave it"
            )
        if not (np.isfinite(error_LK).all() and (error_LK >= 0).all()):
            layer, column = np.argwhere(~(np.isfinite(error_LK) & (error_LK >= 0)))[0]
            raise InputError(
                f"the output error of layer {layer} at k = {column + 1} is {error_LK[layer, column]}; it must be a "
                "number of at least 0"
            )
        return replace(self, output_error_LK=error_LK.astype(np.float64), measured=True)

    def best_ratio(self, layer: int, quantile: float) -> float:
        """The `quantile` (0 to 1) of the second-best score over the best one in `layer`, between percentiles linear."""
        self.check_layer(layer)
        return float(np.interp(quantile, _QUANTILES, self.ratio_LQ[layer]))

    def check_layer(self, layer: int, experts: int | None = None) -> None:
        """Raise `InputError` unless it has that layer, of `experts` experts (any number if None)."""
        if layer >= self.layers:
            raise InputError(
                f"earlier traffic has {self.layers} layers, but layer {layer} is asked for; give that of this model"
            )
        if experts is not None and experts != self.experts:
            raise InputError(
                f"earlier traffic is of {self.experts} experts, the candidates are of {experts}; "
                "give that of this model"
            )

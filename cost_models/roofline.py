"""Roofline: what a datasheet allows. The larger of FLOPs at peak and bytes at full memory bandwidth.

No launch, no latency and no loss of efficiency: a lower bound, named so wherever its figures appear.
Weights of every *active* expert are read once; rows are read and written once.
"""

import numpy as np
from numpy.typing import NDArray

from cost_models.cluster import Cluster
from cost_models.kernels import kernel_of
from cost_models.kernels.token_traffic import bytes_between_ranks
from cost_models.ops import (
    AllToAll,
    Attention,
    Collective,
    Combine,
    DenseMlp,
    Experts,
    Gate,
    Gemm,
    HostToDevice,
    Launch,
    MemoryCopy,
    Mla,
    MlaProjection,
    Operation,
    Permute,
    Prediction,
    Regroup,
    Route,
    TokenExchange,
)
from traces.errors import InputError

_SCORE_BYTES = 4  # routers score in float32


class Roofline:
    """Prices operations on the datasheet of a cluster's device and links."""

    def __init__(self, cluster: Cluster) -> None:
        if cluster.device is None:
            raise InputError(f"{cluster.name} has no datasheet; calibrate it and name the profile")
        self._cluster = cluster
        self._device = cluster.device

    @property
    def name(self) -> str:
        """For reports."""
        return f"datasheet bound of {self._device.name}"

    @property
    def included(self) -> frozenset[type]:
        """A datasheet knows no kernels that do several things."""
        return frozenset()

    def predict(self, operation: Operation) -> Prediction:
        """Seconds for each operation; nothing was measured, so there are no intervals and nothing is extrapolated."""
        return Prediction.unmeasured(self.seconds(operation))

    def seconds(self, operation: Operation) -> NDArray[np.float64]:
        """Seconds for each operation: shape X."""
        match operation:
            case AllToAll() | TokenExchange():
                bytes_XGG = np.asarray(bytes_between_ranks(operation), dtype=np.float64)
                flat = bytes_XGG.reshape(-1, *bytes_XGG.shape[-2:])
                return np.array([self._cluster.all_to_all_s(b_GG) for b_GG in flat]).reshape(bytes_XGG.shape[:-2])
            case HostToDevice(bytes_X=bytes_X):
                return np.asarray(bytes_X / self._device.host_bandwidth, dtype=np.float64)
            case Launch(kernels_X=kernels_X):
                return np.zeros(np.shape(kernels_X))
            case Gemm() | Attention() | Mla() | MlaProjection() | Collective():
                return np.asarray(kernel_of(operation).describe(operation, self._device).bound_s, dtype=np.float64)
        flops, moved_bytes, weight_bytes = _flops_and_bytes(operation)
        compute_s = flops / self._device.peak(weight_bytes)
        return np.maximum(compute_s, moved_bytes / self._device.memory_bandwidth)


def _flops_and_bytes(operation: Operation) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """FLOPs and bytes of each operation, shape X, and the bytes an element of what is multiplied."""
    zero = np.float64(0)
    match operation:
        case Gate(tokens_X=tokens_X, hidden=hidden, experts=experts):
            flops = 2.0 * tokens_X * hidden * experts
            return flops, 2.0 * tokens_X * (hidden + experts) + 2.0 * hidden * experts, 2
        case Route(tokens_X=tokens_X, width=width, passes=passes):
            return zero * tokens_X, 2.0 * tokens_X * width * _SCORE_BYTES * passes, 2
        case Permute(rows_X=rows_X, row_bytes=row_bytes) | Regroup(rows_X=rows_X, row_bytes=row_bytes):
            return zero * rows_X, 2.0 * rows_X * row_bytes, 2
        case Combine(rows_X=rows_X, tokens_X=tokens_X, row_bytes=row_bytes):
            return zero * rows_X, 1.0 * (rows_X + tokens_X) * row_bytes, 2
        case MemoryCopy(bytes_X=bytes_X):
            return zero * bytes_X, 2.0 * bytes_X, 2
        case Experts():
            parameters_S = operation.matrices * operation.hidden * np.asarray(operation.expert_hidden)
            rows_X = operation.rows_XS.sum(axis=-1)
            active_parameters_X = ((operation.rows_XS > 0) * parameters_S).sum(axis=-1)
            moved = active_parameters_X * operation.weight_bytes + 2.0 * rows_X * operation.row_bytes
            return 2.0 * (operation.rows_XS * parameters_S).sum(axis=-1), moved, operation.weight_bytes
        case DenseMlp(rows_X=rows_X):
            parameters = operation.matrices * operation.hidden * operation.mlp_hidden
            moved = parameters * operation.weight_bytes * (rows_X > 0) + 2.0 * rows_X * operation.row_bytes
            return 2.0 * rows_X * parameters, moved, operation.weight_bytes
        case _:
            raise AssertionError(f"{type(operation).__name__} is priced above")

"""Dense matrix products: [m, k] × [k, n], X any leading shape."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models.boosting import Boosting
from cost_models.description import Description
from cost_models.devices import Device, dtype_bytes
from cost_models.kernels.base import LAUNCH_S, Columns, TableKind, Timing, hashed_folds
from cost_models.ops import Gemm, Operation
from cost_models.units import MS

# Output tiles that libraries choose among (rows, columns) and the share of the peak that each can feed: a small tile
# reads more operands for every product. Shapes are those of CUTLASS's documentation; shares are rough, prices are
# fitted on top.
_TILES = (
    (64, 64, 0.5),
    (64, 128, 0.65),
    (128, 64, 0.65),
    (128, 128, 0.85),
    (64, 256, 0.8),
    (128, 256, 1.0),
    (256, 128, 1.0),
)
_SPLITS = (1, 2, 4, 8)  # parts of the inner dimension that different multiprocessors sum
_CHAIN_S = 1e-9  # seconds a tile takes for each inner element, roughly; the price is fitted
_OUTPUT_BYTES = 2.0  # bfloat16
_PARTIAL_BYTES = 8  # a float32 partial sum is written and read back


def tiled_compute_s(
    m_X: NDArray[np.float64], n_X: NDArray[np.float64], k_X: NDArray[np.float64], peak_flops: float, device: Device
) -> NDArray[np.float64]:
    """Seconds of arithmetic in whole waves of whole tiles, by the best tile and split of the inner dimension.

    Multiprocessors work on one tile each, and the last wave takes as long as a full one.
    """
    best_X: NDArray[np.float64] = np.full(np.broadcast_shapes(m_X.shape, n_X.shape, k_X.shape), np.inf)
    for rows, columns, share in _TILES:
        tiles_X = np.ceil(m_X / rows) * np.ceil(n_X / columns)
        tile_s_X = 2 * rows * columns * k_X * device.sms / (peak_flops * share)
        for split in _SPLITS:
            waves_X = np.ceil(tiles_X * split / device.sms)
            partial_s_X = (split > 1) * _PARTIAL_BYTES * split * m_X * n_X / device.memory_bandwidth
            best_X = np.minimum(best_X, waves_X * tile_s_X / split + partial_s_X)
    return best_X


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """Dense products one after another: seconds of tiled arithmetic, of memory, and of one tile's inner dimension."""

    ideal_s: NDArray[np.float64]
    compute_s: NDArray[np.float64]
    memory_s: NDArray[np.float64]
    slowest_s: NDArray[np.float64]
    chain_s: NDArray[np.float64]


def products_of(
    shapes: Sequence[tuple[Any, Any, Any, Any]], weight_bytes: float, device: Device, shape_X: tuple[int, ...]
) -> Products:
    """Sums over products of (count, rows, columns, inner); a count of heads multiplies small ones side by side."""
    peak = device.peak(weight_bytes)
    ideal_s, compute_s, memory_s, slowest_s, chain_s = np.zeros((5, *shape_X))
    for sizes in shapes:
        count, m, n, k = (np.broadcast_to(np.asarray(size, dtype=np.float64), shape_X) for size in sizes)
        # Side by side, products fill the waves of multiprocessors together: as one with the columns of all.
        tiled_s = tiled_compute_s(m, n * count, k, peak, device)
        through_s = (
            count * (n * k * weight_bytes + m * k * weight_bytes + _OUTPUT_BYTES * m * n) / device.memory_bandwidth
        )
        ideal_s += count * 2 * m * n * k / peak
        compute_s += tiled_s
        memory_s += through_s
        slowest_s += np.maximum(tiled_s, through_s)
        chain_s += k * _CHAIN_S
    return Products(ideal_s=ideal_s, compute_s=compute_s, memory_s=memory_s, slowest_s=slowest_s, chain_s=chain_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmKernel:
    """Launch, inputs brought to the weights' dtype, then products while operands pass through memory."""

    boosting: Boosting = field(default_factory=lambda: Boosting(trees=250, depth=4, learning_rate=0.15))

    def describe_table(self, columns: Columns, *, op: str, dtype: str, device: Device) -> Description:
        """The rows of a GEMM table."""
        return self.describe(
            Gemm(rows_X=columns["m"], columns_X=columns["n"], inner_X=columns["k"], dtype=dtype), device
        )

    def serves(self, operation: Operation, *, op: str) -> bool:
        """Any dense product."""
        return isinstance(operation, Gemm)

    def describe(self, operation: Gemm, device: Device) -> Description:
        """What physics and the learner see.

        `quantise`: float inputs are read and written in the weights' dtype. `product`: whichever is slowest of
        arithmetic, memory, and the chain of steps along k that one tile takes, split over idle multiprocessors
        (`chain`) or not (`unsplit chain`).
        """
        m, n, k = (np.asarray(x, dtype=np.float64) for x in (operation.rows_X, operation.columns_X, operation.inner_X))
        m, n, k = np.broadcast_arrays(np.maximum(m, 1), n, k)  # no row costs what one does: the launch
        weight_bytes = dtype_bytes(operation.dtype)
        peak = device.peak(weight_bytes)
        memory_s = (n * k * weight_bytes + m * k * weight_bytes + _OUTPUT_BYTES * m * n) / device.memory_bandwidth
        ideal_s = 2 * m * n * k / peak
        compute_s = tiled_compute_s(m, n, k, peak, device)
        tiles = np.ceil(m / 128) * np.ceil(n / 128)
        waves = tiles / device.sms
        stages: dict[str, dict[str, NDArray[Any]]] = {
            "launch": {"call": np.full_like(m, LAUNCH_S)},
            "product": {
                "compute": compute_s,
                "memory": memory_s,
                "chain": k * _CHAIN_S / np.clip(np.floor(device.sms / tiles), 1, max(_SPLITS)),
                "unsplit chain": k * _CHAIN_S * np.ceil(waves),
            },
        }
        if weight_bytes < 2:
            stages["quantise"] = {"memory": m * k * (2 + weight_bytes) / device.memory_bandwidth}
        return Description(
            bound_s=np.maximum(ideal_s, memory_s),
            stages=stages,
            features={
                "log m": np.log2(m),
                "log n": np.log2(n),
                "log k": np.log2(k),
                "log inputs": np.log2(m * k),
                "log weights": np.log2(n * k),
                "log outputs": np.log2(m * n),
                "log intensity": np.log2(ideal_s / memory_s),
                "log tile loss": np.log2(compute_s / ideal_s),
                "log waves": np.log2(waves),
                "wave loss": np.where(waves > 1, np.ceil(waves) / waves, 0),
            },
            increasing=frozenset({"log m"}),
        )

    def holdouts(self, columns: Columns, *, op: str) -> Mapping[str, NDArray[np.int64]]:
        """Whole weight shapes."""
        return {"shape": hashed_folds(columns, ["n", "k"])}

    def suspects(self, columns: Columns, seconds_N: NDArray[np.float64], *, op: str) -> NDArray[np.bool_]:
        """None known."""
        return np.zeros(len(seconds_N), dtype=bool)

    def tokens(self, columns: Columns) -> NDArray[np.int64] | None:
        """Rows of the left matrix."""
        return columns["m"]


TABLES = (
    TableKind(
        name="gemm_trtllm",
        framework="trtllm",
        kernel=GemmKernel(),
        keys=("kernel_source", "gemm_dtype", "m", "n", "k"),
        timings={"gemm": Timing(column="latency", unit_s=MS)},
        dtype_column="gemm_dtype",
        package_file="gemm_perf.parquet",
        size="m",
    ),
)

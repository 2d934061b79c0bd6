"""The absorbed products of multi-head latent attention at decode, of DeepSeek-V3's widths; X any leading shape."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models.boosting import Boosting
from cost_models.description import Description
from cost_models.devices import Device, dtype_bytes
from cost_models.kernels.base import LAUNCH_S, Columns, hashed_folds
from cost_models.kernels.gemm import products_of
from cost_models.ops import MlaProjection, Operation

# Widths a head (DeepSeek-V3, arXiv:2412.19437, section 4.2).
LATENT = 512
NOPE = 128
VALUE = 128

_TILE = 128  # rows and columns of a thread block
_FLOAT_BYTES = 2.0  # inputs and results are bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaProjectionKernel:
    """A small product for each head, all side by side."""

    boosting: Boosting = field(default_factory=lambda: Boosting(trees=150, depth=4, learning_rate=0.15))

    def describe_table(self, columns: Columns, *, op: str, dtype: str, device: Device) -> Description:
        """The rows of a table."""
        return self._describe(
            columns["num_tokens"],
            columns["num_heads"],
            columns["op_name"] == "mla_gen_post",
            dtype=dtype,
            device=device,
        )

    def serves(self, operation: Operation, *, op: str) -> bool:
        """Absorbed products."""
        return isinstance(operation, MlaProjection)

    def describe(self, operation: MlaProjection, device: Device) -> Description:
        """What physics and the learner see."""
        return self._describe(
            operation.rows_X, operation.heads_X, operation.step == "post", dtype=operation.dtype, device=device
        )

    def _describe(self, *sizes: Any, dtype: str, device: Device) -> Description:
        rows, heads, post = np.broadcast_arrays(*(np.asarray(size, dtype=np.float64) for size in sizes))
        rows = np.maximum(rows, 1)  # no row costs what one does: the launch
        columns, inner = np.where(post, VALUE, LATENT), np.where(post, LATENT, NOPE)
        products = products_of([(heads, rows, columns, inner)], dtype_bytes(dtype), device, rows.shape)
        blocks = heads * np.ceil(rows / _TILE) * columns / _TILE
        waves = blocks / device.sms
        return Description(
            bound_s=np.maximum(products.ideal_s, products.memory_s),
            stages={
                "launch": {"call": np.full_like(rows, LAUNCH_S)},
                "products": {
                    "compute": products.compute_s,
                    "memory": products.memory_s,
                    "chain": products.chain_s * np.maximum(waves, 1),
                },
                "inputs": {"memory": rows * heads * inner * 2 * _FLOAT_BYTES / device.memory_bandwidth},
            },
            features={
                "log rows": np.log2(rows),
                "log heads": np.log2(heads),
                "log both": np.log2(rows * heads),
                "log waves": np.log2(waves),
                "wave loss": np.where(waves > 1, np.ceil(waves) / waves, 0),
                "log intensity": np.log2(products.compute_s / products.memory_s),
                "log products": np.log2(products.memory_s),
                "post": post,
            },
        )

    def holdouts(self, columns: Columns, *, op: str) -> Mapping[str, NDArray[np.int64]]:
        """Whole pairs of tokens and heads."""
        return {"tokens_heads": hashed_folds(columns, ["num_tokens", "num_heads"])}

    def suspects(self, columns: Columns, seconds_N: NDArray[np.float64], *, op: str) -> NDArray[np.bool_]:
        """None known."""
        return np.zeros(len(seconds_N), dtype=bool)

    def tokens(self, columns: Columns) -> NDArray[np.int64] | None:
        """Tokens of the step."""
        return columns["num_tokens"]

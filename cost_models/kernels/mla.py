"""Multi-head latent attention of DeepSeek-V3's widths: the kernel, the block around it, its absorbed products.

Prefill brings the latent cache up to keys and values of every head; decode absorbs those products into the queries
and results, so that all heads read one latent key (DeepSeek-V2, arXiv:2405.04434). X any leading shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cost_models.boosting import Boosting
from cost_models.description import Description
from cost_models.devices import Device, dtype_bytes
from cost_models.kernels.attention import (
    Phase,
    at_least_one_token,
    causal_pairs,
    dtype_bytes_of,
    key_splits,
    new_tokens,
    requests_of,
)
from cost_models.kernels.base import LAUNCH_S, Columns, TableKind, Timing, hashed_folds, outlasts_larger
from cost_models.kernels.gemm import products_of
from cost_models.kernels.mla_projections import LATENT, NOPE, VALUE, MlaProjectionKernel
from cost_models.ops import Mla, Operation
from cost_models.units import MS

# Widths of DeepSeek-V3 (arXiv:2412.19437, section 4.2).
HIDDEN = 7168
QUERY_LATENT = 1536
ROPE = 64
DOWN = QUERY_LATENT + LATENT + ROPE  # columns of the product that gives both latents and the rotated key

_TILE = 128  # queries of a thread block at prefill and keys that it takes at once, as in attention.py
_DECODE_HEADS = 64  # heads of a thread block at decode: FlashMLA's tile
_CHAIN_S = 1e-9  # seconds that a thread block takes for each key, or inner element, roughly; prices are fitted
_BLOCK_S = 1e-6  # seconds in which a thread block starts and ends, roughly; the price is fitted
_BF16 = 2.0


class _Work(NamedTuple):
    """Latent attention as arrays of one shape; fields as in `Mla`, `kv_bytes` an element of the cache."""

    batch: NDArray[np.float64]
    new: NDArray[np.float64]
    cached: NDArray[np.float64]
    heads: NDArray[np.float64]
    kv_bytes: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaKernel:
    """The attention alone, or with its projections: queries down and up, latent down and up, results out.

    `without_down`: the rows time a block that is given the projections down to the latents of queries and cache.
    `cache`: the cache's real dtype, where the column that tells it is wrong.
    """

    phase: Phase
    part: Literal["kernel", "block"]
    without_down: bool = False
    cache: str = ""
    boosting: Boosting = field(default_factory=lambda: Boosting(trees=180, depth=4, learning_rate=0.2))

    def describe_table(self, columns: Columns, *, op: str, dtype: str, device: Device) -> Description:
        """The rows of a table; at generation, `isl + step` tokens are cached."""
        return self._describe(
            *requests_of(columns, self.phase),
            columns["num_heads"],
            dtype_bytes(self.cache) if self.cache else dtype_bytes_of(columns["kv_cache_dtype"]),
            gemm_dtype=dtype,
            source=columns["kernel_source"],
            device=device,
        )

    def serves(self, operation: Operation, *, op: str) -> bool:
        """Latent attention in this phase, alone or as a block."""
        return isinstance(operation, Mla) and operation.phase == self.phase and operation.part == self.part

    def describe(self, operation: Mla, device: Device) -> Description:
        """What physics and the learner see."""
        return self._describe(
            operation.batch_X,
            operation.new_tokens_X,
            operation.cached_tokens_X,
            operation.heads_X,
            dtype_bytes(operation.kv_dtype),
            gemm_dtype=operation.gemm_dtype,
            source="",
            device=device,
        )

    def _describe(self, *sizes: Any, gemm_dtype: str, source: NDArray[np.str_] | str, device: Device) -> Description:
        work = _Work(*at_least_one_token(*sizes))
        kernel = _prefill(work, device) if self.phase == "prefill" else _decode(work, device)
        if self.part == "block":
            kernel = _around(work, kernel, self.phase, gemm_dtype, device, without_down=self.without_down)
        return Description(
            bound_s=kernel.bound_s,
            stages={"launch": {"call": np.full(work.batch.shape, LAUNCH_S)}, **kernel.stages},
            features=kernel.features,
            source=source,
        )

    def holdouts(self, columns: Columns, *, op: str) -> Mapping[str, NDArray[np.int64]]:
        """Whole pairs of batch and length: with every head count, dtype and kernel."""
        length = columns["isl"] + columns["step"]
        return {"batch_length": hashed_folds({"batch": columns["batch_size"], "length": length}, ["batch", "length"])}

    def suspects(self, columns: Columns, seconds_N: NDArray[np.float64], *, op: str) -> NDArray[np.bool_]:
        """Rows that took over twice what the same with more heads took: compared inside a held-out pair only."""
        same = [name for name in _KEYS if name not in ("num_heads", "tp_size") and name in columns]
        return outlasts_larger(columns["num_heads"], seconds_N, [columns[name] for name in same])

    def tokens(self, columns: Columns) -> NDArray[np.int64] | None:
        """New tokens of the step."""
        return new_tokens(columns, self.phase)


def _compute(seconds: NDArray[np.float64], work: _Work) -> dict[str, NDArray[np.float64]]:
    """Arithmetic: kernels for an 8-bit cache may multiply in 8 bits, so that their price is their own."""
    return {"compute": seconds * (work.kv_bytes >= _BF16), "8-bit compute": seconds * (work.kv_bytes < _BF16)}


def _prefill(work: _Work, device: Device) -> Description:
    """Keys and values of every head, as after the up-projection."""
    keys = work.new + work.cached
    rows = work.batch * work.heads
    peak = device.peak(_BF16)
    query_bytes = rows * work.new * (NOPE + ROPE + VALUE) * _BF16
    cache_bytes = rows * keys * (NOPE + ROPE + VALUE) * _BF16
    memory_s = (query_bytes + cache_bytes) / device.memory_bandwidth
    pair_s = 2 * (NOPE + ROPE + VALUE) * rows / peak
    ideal_s = pair_s * causal_pairs(work.new, work.cached)
    tiles = np.ceil(work.new / _TILE)
    tiled_s = pair_s * _TILE**2 * causal_pairs(tiles, np.ceil(work.cached / _TILE))
    waves = rows * tiles / device.sms
    eight_bit = work.kv_bytes < _BF16
    return Description(
        bound_s=np.maximum(ideal_s, memory_s),
        stages={
            "prepare": {"memory": memory_s},  # rotate, append to the cache, bring into place
            "convert": {"call": np.where(eight_bit, _BLOCK_S, 0.0), "memory": eight_bit * memory_s},
            "attention": {
                **_compute(tiled_s, work),
                "chain": keys * _CHAIN_S * np.maximum(waves, 1),
            },
        },
        features={
            "log new": np.log2(work.new),
            "log keys": np.log2(keys),
            "log context": np.log2(keys / work.new),  # tables cache nothing: what does lies beyond them
            "log rows": np.log2(rows),
            "log requests": np.log2(work.batch),
            "log heads": np.log2(work.heads),
            "log tokens": np.log2(work.batch * work.new),
            "log compute": np.log2(tiled_s),
            "log intensity": np.log2(ideal_s / memory_s),
            "log waves": np.log2(waves),
            "wave loss": np.where(waves > 1, np.ceil(waves) / waves, 0),
            "log tile loss": np.log2(tiled_s / ideal_s),
            "log queries": np.log2(query_bytes / device.l2_bytes),
            "log element": np.log2(work.kv_bytes),
        },
    )


def _decode(work: _Work, device: Device) -> Description:
    """All heads share one latent key, whose first part is the value."""
    keys = work.new + work.cached
    rows = work.batch * work.new * work.heads
    peak = device.peak(_BF16)
    cache_bytes = work.batch * keys * (LATENT + ROPE) * work.kv_bytes
    query_bytes = rows * (2 * LATENT + ROPE) * _BF16
    memory_s = (cache_bytes + query_bytes) / device.memory_bandwidth
    row_s = 2 * (2 * LATENT + ROPE) * work.batch * keys / peak
    ideal_s = row_s * work.heads * work.new
    groups = np.ceil(work.heads * work.new / _DECODE_HEADS)
    blocks = work.batch * groups
    splits = key_splits(blocks, keys, device)
    waves = blocks / device.sms
    return Description(
        bound_s=np.maximum(ideal_s, memory_s),
        stages={
            "attention": {
                **_compute(row_s * groups * _DECODE_HEADS, work),
                "memory": memory_s,
                "chain": keys / splits * _CHAIN_S * np.maximum(waves, 1),
                "unsplit chain": keys * _CHAIN_S * np.maximum(waves, 1),  # kernels for A100 leave multiprocessors idle
                "blocks": waves * _BLOCK_S,
            },
            "sum": {
                "call": np.where(splits > 1, _BLOCK_S, 0.0),
                "parts": (splits > 1) * query_bytes * splits / device.memory_bandwidth,
            },
        },
        features={
            "log keys": np.log2(keys),
            "log requests": np.log2(work.batch),
            "log heads": np.log2(work.heads),
            "log rows": np.log2(rows),
            "log blocks": np.log2(blocks),
            "log intensity": np.log2(ideal_s / memory_s),
            "log waves": np.log2(waves),
            "wave loss": np.where(waves > 1, np.ceil(waves) / waves, 0),
            "log splits": np.log2(splits),
            "log block keys": np.log2(keys / splits),
            "log cache": np.log2(cache_bytes / device.l2_bytes),
            "log element": np.log2(work.kv_bytes),
        },
    )


def _around(
    work: _Work, kernel: Description, phase: Phase, gemm_dtype: str, device: Device, *, without_down: bool
) -> Description:
    """The block: projections before and after the kernel. The up-projection of keys covers what is cached, too."""
    tokens = work.batch * work.new
    weight_bytes = dtype_bytes(gemm_dtype)
    shape_X = work.batch.shape
    dense: list[tuple[Any, ...]] = [] if without_down else [(1, tokens, DOWN, HIDDEN)]
    dense += [
        (1, tokens, work.heads * (NOPE + ROPE), QUERY_LATENT),
        (1, tokens, HIDDEN, work.heads * VALUE),
    ]
    if phase == "prefill":
        dense.append((1, work.batch * (work.new + work.cached), work.heads * (NOPE + VALUE), LATENT))
        absorbed = None
    else:
        absorbed = products_of(
            [(work.heads, tokens, LATENT, NOPE), (work.heads, tokens, VALUE, LATENT)], _BF16, device, shape_X
        )
    products = products_of(dense, weight_bytes, device, shape_X)
    # Norms and rotation read and write their inputs, as does what brings the inputs of products to a smaller dtype.
    passes_s = tokens * (HIDDEN + 2 * QUERY_LATENT + 2 * LATENT) * _BF16 / device.memory_bandwidth
    stages: dict[str, Mapping[str, NDArray[np.float64]]] = {
        **kernel.stages,
        "products": {"slowest": products.slowest_s, "chain": products.chain_s},
        "passes": {"memory": passes_s},
    }
    bound_s = kernel.bound_s + np.maximum(products.ideal_s, products.memory_s)
    features = {
        **kernel.features,
        "log tokens": np.log2(tokens),
        "log products": np.log2(products.slowest_s),
        "log product intensity": np.log2(products.compute_s / products.memory_s),
        "log share": np.log2(kernel.bound_s / products.slowest_s),
    }
    if absorbed is not None:
        stages["absorbed"] = {"slowest": absorbed.slowest_s, "chain": absorbed.chain_s}
        bound_s = bound_s + np.maximum(absorbed.ideal_s, absorbed.memory_s)
    return Description(bound_s=bound_s, stages=stages, features=features)


_KEYS = (
    "kernel_source",
    "mla_dtype",
    "gemm_type",
    "kv_cache_dtype",
    "num_heads",
    "tp_size",
    "batch_size",
    "isl",
    "step",
)


def _wide_ep(name: str, phase: Phase, package_file: str, *, size: str = "isl") -> TableKind:
    """SGLang's attention module in wide-EP deployments.

    The collector hands it random latents in place of the product that makes them (NVIDIA AIConfigurator,
    collector/sglang/collect_mla_module.py; pull request 476 adds it as a product of its own). It writes `fp8` as the
    cache's dtype without having set one, so that SGLang caches bfloat16: with 8 heads the H100's rows grow by 3.0 to
    3.2 TB/s of such a cache, as TensorRT-LLM's with one do (3.2), where an 8-bit one would be read at half the speed.
    """
    kernel = MlaKernel(phase=phase, part="block", without_down=True, cache="bfloat16")
    return replace(_table(name, phase, "block", package_file, framework="sglang", size=size), kernel=kernel)


def _table(
    name: str,
    phase: Phase,
    part: Literal["kernel", "block"],
    package_file: str,
    *,
    framework: str = "trtllm",
    size: str = "isl",
) -> TableKind:
    return TableKind(
        name=name,
        framework=framework,
        kernel=MlaKernel(phase=phase, part=part),
        keys=tuple(key for key in _KEYS if key != "gemm_type" or part == "block"),
        timings={"mla": Timing(column="latency", unit_s=MS)},
        dtype_column="gemm_type" if part == "block" else "mla_dtype",
        package_file=package_file,
        size=size,
    )


TABLES = (
    _table("mla_context_trtllm", "prefill", "kernel", "context_mla_perf.parquet"),
    _table("mla_generation_trtllm", "decode", "kernel", "generation_mla_perf.parquet", size="step"),
    _table("mla_context_module_trtllm", "prefill", "block", "mla_context_module_perf.parquet"),
    _table("mla_generation_module_trtllm", "decode", "block", "mla_generation_module_perf.parquet", size="step"),
    _wide_ep("mla_wideep_context_sglang", "prefill", "wideep_context_mla_perf.parquet"),
    _wide_ep("mla_wideep_generation_sglang", "decode", "wideep_generation_mla_perf.parquet"),
    TableKind(
        name="mla_bmm_trtllm",
        framework="trtllm",
        kernel=MlaProjectionKernel(),
        keys=("kernel_source", "bmm_dtype", "op_name", "num_tokens", "num_heads"),
        timings={"mla": Timing(column="latency", unit_s=MS)},
        dtype_column="bmm_dtype",
        package_file="mla_bmm_perf.parquet",
        size="num_tokens",
    ),
)

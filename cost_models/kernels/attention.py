"""Softmax attention with many or grouped key-value heads: the kernel alone, X any leading shape."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cost_models.boosting import Boosting
from cost_models.description import Description
from cost_models.devices import Device, dtype_bytes
from cost_models.kernels.base import LAUNCH_S, Columns, TableKind, Timing, hashed_folds
from cost_models.ops import Attention, Operation
from cost_models.units import MS

Phase = Literal["prefill", "decode"]

_TILE = 128  # queries of a thread block at prefill, and keys that it takes at once: FlashAttention-2, arXiv:2307.08691
_DECODE_ROWS = 16  # the fewest query rows that a matrix instruction takes: decode pads its group of heads to it
_LARGEST_GROUP = 32  # query heads that TensorRT-LLM's grouped kernel takes for a key; more go one by one (measured)
_SPLIT_KEYS = 256  # decode gives an idle multiprocessor no fewer keys of a request than this
_CACHE_SPEED = 2  # of the second-level cache, as a multiple of the memory's, roughly; the price is fitted
_CHAIN_S = 1e-9  # seconds that one thread block takes for each key, roughly; the price is fitted
_BLOCK_S = 1e-6  # seconds in which a thread block starts and ends, roughly; the price is fitted


def causal_pairs(
    new_X: NDArray[np.float64], cached_X: NDArray[np.float64], window_X: NDArray[np.float64] | float = np.inf
) -> NDArray[np.float64]:
    """(query, key) pairs of one request and head: each new token sees itself and what is before, up to `window_X`.

    Counted in tiles of both instead of tokens, the same sum is what a kernel computes.

    >>> causal_pairs(np.array([3.0]), np.array([10.0])).tolist()  # 11 + 12 + 13
    [36.0]
    >>> causal_pairs(np.array([3.0]), np.array([10.0]), 12.0).tolist()  # 11 + 12 + 12
    [35.0]
    """
    short_X = np.clip(window_X - cached_X, 0, new_X)  # the first new tokens, which see all that is before
    rest_X = new_X - short_X
    return np.asarray(
        short_X * (cached_X + (short_X + 1) / 2) + np.where(rest_X > 0, rest_X * np.minimum(window_X, 1e18), 0)
    )


def key_splits(blocks_X: NDArray[np.float64], keys_X: NDArray[np.float64], device: Device) -> NDArray[np.float64]:
    """Parts of a request's keys that different multiprocessors take at decode: Flash-Decoding, where some are idle."""
    return np.clip(np.floor(device.sms / blocks_X), 1, np.maximum(np.floor(keys_X / _SPLIT_KEYS), 1))


def requests_of(columns: Columns, phase: Phase) -> tuple[Any, Any, Any]:
    """Requests, new tokens and cached tokens of each row of a table; at generation, `isl + step` are cached."""
    if phase == "prefill":
        return columns["batch_size"], columns["isl"], columns["step"]
    return columns["batch_size"], 1, columns["isl"] + columns["step"]


def new_tokens(columns: Columns, phase: Phase) -> NDArray[np.int64]:
    """New tokens of the step that each row of a table is of."""
    requests, new, _ = requests_of(columns, phase)
    return np.asarray(requests * new, dtype=np.int64)


def at_least_one_token(requests: Any, new_tokens: Any, *others: Any) -> list[NDArray[np.float64]]:
    """All as arrays of one shape; no token costs what one does, the launches."""
    requests, new, *rest = np.broadcast_arrays(
        *(np.asarray(x, dtype=np.float64) for x in (requests, new_tokens, *others))
    )
    return [np.maximum(requests, 1), np.maximum(new, 1), *rest]


def dtype_bytes_of(dtypes_N: NDArray[Any]) -> NDArray[np.float64]:
    """Bytes an element for an array of dtypes' names."""
    names, index_N = np.unique(dtypes_N.astype(str), return_inverse=True)
    return np.array([dtype_bytes(str(name)) for name in names])[index_N]


class _Work(NamedTuple):
    """Attention as arrays of one shape; fields as in `Attention`. `window`: the keys that a query sees at most."""

    batch: NDArray[np.float64]
    new: NDArray[np.float64]
    cached: NDArray[np.float64]
    heads: NDArray[np.float64]
    kv_heads: NDArray[np.float64]
    width: NDArray[np.float64]
    kv_bytes: NDArray[np.float64]
    window: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKernel:
    """Prefill: tiles of queries over all keys before them. Decode: one query, keys split over multiprocessors."""

    phase: Phase
    boosting: Boosting = field(default_factory=lambda: Boosting(trees=180, depth=4, learning_rate=0.2))

    def describe_table(self, columns: Columns, *, op: str, dtype: str, device: Device) -> Description:
        """The rows of an attention table; at generation, `isl + step` tokens are cached."""
        return self._describe(
            *requests_of(columns, self.phase),
            columns["num_heads"],
            columns["num_key_value_heads"],
            columns["head_dim"],
            dtype_bytes_of(columns["kv_cache_dtype"]),
            np.where(columns["window_size"] > 0, columns["window_size"], np.inf),
            dtype=dtype,
            device=device,
        )

    def serves(self, operation: Operation, *, op: str) -> bool:
        """Attention in this phase."""
        return isinstance(operation, Attention) and operation.phase == self.phase

    def describe(self, operation: Attention, device: Device) -> Description:
        """What physics and the learner see."""
        return self._describe(
            operation.batch_X,
            operation.new_tokens_X,
            operation.cached_tokens_X,
            operation.heads_X,
            operation.kv_heads_X,
            operation.head_dim,
            dtype_bytes(operation.kv_dtype),
            np.inf,
            dtype=operation.dtype,
            device=device,
        )

    def _describe(self, *sizes: Any, dtype: str, device: Device) -> Description:
        work, peak_flops = _Work(*at_least_one_token(*sizes)), device.peak(dtype_bytes(dtype))
        return (_prefill if self.phase == "prefill" else _decode)(work, peak_flops, device)

    def holdouts(self, columns: Columns, *, op: str) -> Mapping[str, NDArray[np.int64]]:
        """Whole head counts with their dtypes."""
        return {"heads": hashed_folds(columns, ["num_heads", "num_key_value_heads", "attn_dtype", "kv_cache_dtype"])}

    def suspects(self, columns: Columns, seconds_N: NDArray[np.float64], *, op: str) -> NDArray[np.bool_]:
        """None known."""
        return np.zeros(len(seconds_N), dtype=bool)

    def tokens(self, columns: Columns) -> NDArray[np.int64] | None:
        """New tokens of the step."""
        return new_tokens(columns, self.phase)


def _prefill(work: _Work, peak_flops: float, device: Device) -> Description:
    keys = work.new + work.cached
    rows = work.batch * work.heads
    cache_bytes = 2 * work.batch * keys * work.kv_heads * work.width * work.kv_bytes
    query_bytes = 2 * rows * work.new * work.width * dtype_bytes("bfloat16")  # queries read, results written
    memory_s = (cache_bytes + query_bytes) / device.memory_bandwidth
    pair_s = 4 * work.width * rows / peak_flops
    ideal_s = pair_s * causal_pairs(work.new, work.cached, work.window)
    tiles = np.ceil(work.new / _TILE)
    tiled_s = pair_s * _TILE**2 * causal_pairs(tiles, np.ceil(work.cached / _TILE), np.ceil(work.window / _TILE) + 1)
    waves = rows * tiles / device.sms
    return Description(
        bound_s=np.maximum(ideal_s, memory_s),
        stages={
            "launch": {"call": np.full(keys.shape, LAUNCH_S)},
            "prepare": {"memory": memory_s},  # rotate queries and keys, append to the cache
            "attention": {
                "compute": tiled_s,
                "memory": memory_s,
                "chain": np.minimum(keys, work.window) * _CHAIN_S * np.maximum(waves, 1),
            },
        },
        features={
            "log new": np.log2(work.new),
            "log keys": np.log2(keys),
            "log context": np.log2(keys / work.new),  # tables cache nothing: what does lies beyond them
            "log rows": np.log2(rows),
            "log requests": np.log2(work.batch),
            "log group": np.log2(work.heads / work.kv_heads),
            "log compute": np.log2(tiled_s),
            "log intensity": np.log2(ideal_s / memory_s),
            "log waves": np.log2(waves),
            "wave loss": np.where(waves > 1, np.ceil(waves) / waves, 0),
            "log tile loss": np.log2(tiled_s / ideal_s),
            "log cache": np.log2(cache_bytes / device.l2_bytes),
            "log queries": np.log2(query_bytes / device.l2_bytes),
            "log width": np.log2(work.width),
            "log element": np.log2(work.kv_bytes),
        },
    )


def _by_kernel(name: str, seconds: NDArray[np.float64], group: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """A term for each of two kernels, 0 where the other runs: heads with keys of their own have another than groups."""
    return {f"grouped {name}": np.where(group > 1, seconds, 0.0), f"single {name}": np.where(group > 1, 0.0, seconds)}


def _decode(work: _Work, peak_flops: float, device: Device) -> Description:
    keys = np.minimum(work.new + work.cached, work.window)
    grouped = work.heads <= _LARGEST_GROUP * work.kv_heads
    readers = np.where(grouped, work.kv_heads, work.heads)  # heads that read keys on their own
    group = work.heads * work.new / readers
    cache_bytes = 2 * work.batch * keys * work.kv_heads * work.width * work.kv_bytes
    query_bytes = 2 * work.batch * work.new * work.heads * work.width * dtype_bytes("bfloat16")
    memory_s = (cache_bytes + query_bytes) / device.memory_bandwidth
    row_s = 4 * work.width * work.batch * readers * keys / peak_flops
    blocks = work.batch * readers
    splits = key_splits(blocks, keys, device)
    waves = blocks / device.sms
    return Description(
        bound_s=np.maximum(row_s * group, memory_s),
        stages={
            "launch": {"call": np.full(keys.shape, LAUNCH_S)},
            "attention": {
                "memory": memory_s,
                "reads": cache_bytes * (readers / work.kv_heads) / (_CACHE_SPEED * device.memory_bandwidth),
                **_by_kernel("compute", row_s * np.ceil(group / _DECODE_ROWS) * _DECODE_ROWS, group),
                **_by_kernel("chain", keys / splits * _CHAIN_S * np.maximum(waves, 1), group),
                **_by_kernel("blocks", waves * _BLOCK_S, group),
            },
            "sum": {
                "call": np.where(splits > 1, _BLOCK_S, 0.0),
                "parts": (splits > 1) * query_bytes * splits / device.memory_bandwidth,
            },
        },
        features={
            "log keys": np.log2(keys),
            "log blocks": np.log2(blocks),
            "log requests": np.log2(work.batch),
            "log group": np.log2(group),
            "log queries": np.log2(work.batch * work.heads * work.new),
            "log splits": np.log2(splits),
            "log waves": np.log2(waves),
            "wave loss": np.where(waves > 1, np.ceil(waves) / waves, 0),
            "log cache": np.log2(cache_bytes / device.l2_bytes),
            "log block keys": np.log2(keys / splits),
            "log width": np.log2(work.width),
            "log element": np.log2(work.kv_bytes),
        },
    )


def _table(name: str, phase: Phase, package_file: str, size: str) -> TableKind:
    return TableKind(
        name=name,
        framework="trtllm",
        kernel=AttentionKernel(phase=phase),
        keys=(
            "kernel_source",
            "attn_dtype",
            "kv_cache_dtype",
            "num_heads",
            "num_key_value_heads",
            "head_dim",
            "window_size",
            "batch_size",
            "isl",
            "step",
        ),
        timings={"attention": Timing(column="latency", unit_s=MS)},
        dtype_column="attn_dtype",
        package_file=package_file,
        size=size,
        added={"window_size": 0},
    )


TABLES = (
    _table("attention_context", "prefill", "context_attention_perf.parquet", "isl"),
    _table("attention_generation", "decode", "generation_attention_perf.parquet", "step"),
)

"""Made-up measured tables that follow a known law, for tests of what reads and fits them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SIZES = [512, 1024, 2048, 4096, 8192]
ROWS = [2**power for power in range(14)]
TFLOPS, BYTES_S, LAUNCH_MS = 600e12, 2.5e12, 0.004


def gemm_columns(dtypes: tuple[str, ...] = ("bfloat16",), **changes: Any) -> dict[str, Any]:
    """A GEMM table of a GPU that computes at 600 TFLOP/s and reads at 2.5 TB/s, in milliseconds."""
    m, n, k = (side.ravel() for side in np.meshgrid(ROWS, SIZES, SIZES, indexing="ij"))
    seconds = np.maximum(2.0 * m * n * k / TFLOPS, 2.0 * (m * k + n * k + m * n) / BYTES_S)
    noise = np.exp(np.random.default_rng(0).normal(0, 0.02, len(m)))
    columns = {
        "framework": ["TRTLLM"] * len(m),
        "version": ["1.0"] * len(m),
        "kernel_source": ["torch_flow"] * len(m),
        "m": m,
        "n": n,
        "k": k,
        "latency": (seconds * 1e3 + LAUNCH_MS) * noise,
    }
    whole = {name: np.tile(values, len(dtypes)) for name, values in columns.items()}
    whole["gemm_dtype"] = np.repeat(list(dtypes), len(m))
    return whole | changes


def write_table(path: Path, columns: dict[str, Any]) -> Path:
    """Write a table as Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)
    return path

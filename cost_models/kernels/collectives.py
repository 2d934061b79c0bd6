"""Collectives of the ranks of one node: NCCL's, and the all-reduce in one kernel that serving engines bring.

Bytes are counted as nccl-tests count them (see `ops.Collective`); X is any shape of operations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cost_models.boosting import Boosting
from cost_models.description import Description
from cost_models.devices import Device
from cost_models.kernels.base import Columns, TableKind, Timing, leave_one_out, outlasts_larger
from cost_models.ops import Collective, Operation
from cost_models.units import MS, US

Floats = NDArray[np.float64]
_KINDS: tuple[Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"], ...] = (
    "all_gather",
    "all_reduce",
    "all_to_all",
    "reduce_scatter",
)
_ELEMENT_BYTES = {"half": 2, "bfloat16": 2, "int8": 1}
_CURVES = Boosting(trees=180, depth=4, learning_rate=0.2, leaf_regularisation=0.3)

# What a call and a step between two ranks cost before they are fitted: measured on A100 (9.0, 10.8 and 15.0 us for an
# all-gather of 512 bytes by 2, 4 and 8 ranks, that is 1, 3 and 7 steps). A call is some 6 steps on H100, 8 on GB200.
_CALL_S = 8 * US
_STEP_S = 1 * US

# Small messages carry flags among the data (NCCL's LL and LL128 protocols): less bandwidth for less latency. How much
# of a message still passes at that price is not documented; steps of four times each cover what was measured.
_SMALL_BYTES = {"256 KiB": 2.0**18, "1 MiB": 2.0**20, "4 MiB": 2.0**22, "16 MiB": 2.0**24}

# An all-reduce in one kernel: each rank reads all others' buffers (one shot), but from so many bytes on reads one part
# of each and shares the sum (two shots); what does not fit its buffers is left to NCCL. vLLM's custom_all_reduce.cuh.
_ONE_SHOT_BYTES = {4: 2.0**19, 8: 2.0**18}
_BUFFER_BYTES = {"a100_sxm": 2.0**23}  # measured: times jump to NCCL's at the next size
_OTHER_BUFFER_BYTES = 2.0**24  # measured on Hopper and Blackwell


def wire_bytes(operation: Collective) -> Floats:
    """Bytes that each rank must send, shape X: all but its own part of the buffer, twice to reduce and spread it.

    >>> wire_bytes(Collective(kind="all_reduce", bytes_X=np.array(1000.0), ranks_X=np.array(4))).item()
    1500.0
    """
    bytes_X, ranks_X = (np.asarray(x, dtype=np.float64) for x in (operation.bytes_X, operation.ranks_X))
    return np.asarray(_passes(operation) * bytes_X * (ranks_X - 1) / ranks_X)


def _passes(operation: Collective) -> int:
    return 2 if operation.kind == "all_reduce" else 1


def ring_stages(operation: Collective, device: Device) -> dict[str, dict[str, Floats]]:
    """Stages of a ring: its steps, then data through the links, the first of it at the price of small messages.

    Ranks of an all-to-all send to all others at once, so that its steps do not add up.
    """
    wire_X = wire_bytes(operation)
    ranks_X = np.asarray(operation.ranks_X, dtype=np.float64) * np.ones_like(wire_X)
    steps_X = np.log2(ranks_X) if operation.kind == "all_to_all" else _passes(operation) * (ranks_X - 1)
    small = {f"first {name}": np.minimum(wire_X, size) / device.scale_up for name, size in _SMALL_BYTES.items()}
    return {
        "call": {"launch": np.full_like(wire_X, _CALL_S)},
        "steps": {"steps": steps_X * _STEP_S},
        **{name: {"wire": term} for name, term in small.items()},
        "move": {"wire": wire_X / device.scale_up},
    }


def alternate_sizes(sizes_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Fold 0 for every other of the sizes in order, -1 for the rest, the smallest and the largest among them.

    >>> alternate_sizes(np.array([1, 2, 4, 8, 8])).tolist()
    [-1, 0, -1, -1, -1]
    """
    sizes, place_N = np.unique(sizes_N, return_inverse=True)
    held_N = (place_N % 2 == 1) & (place_N < len(sizes) - 1)
    return np.where(held_N, 0, -1).astype(np.int64)


def _features(operation: Collective) -> dict[str, Floats]:
    bytes_X, ranks_X = np.broadcast_arrays(operation.bytes_X, operation.ranks_X)
    return {"log bytes": np.log2(np.maximum(bytes_X, 1)), "log ranks": np.log2(ranks_X)}


@dataclass(frozen=True, slots=True, kw_only=True)
class NcclKernel:
    """Rings of NCCL."""

    boosting: Boosting = _CURVES

    def describe_table(self, columns: Columns, *, op: str, dtype: str, device: Device) -> Description:
        """The rows of an NCCL table."""
        return self.describe(_table_rows(columns, op, dtype), device)

    def serves(self, operation: Operation, *, op: str) -> bool:
        """A collective of the kind that was timed."""
        return isinstance(operation, Collective) and operation.kind == op

    def describe(self, operation: Collective, device: Device) -> Description:
        """What physics and the learner see."""
        return Description(
            bound_s=wire_bytes(operation) / device.scale_up,
            stages=ring_stages(operation, device),
            features=_features(operation),
            curve="log bytes",
        )

    def holdouts(self, columns: Columns, *, op: str) -> Mapping[str, NDArray[np.int64]]:
        """Alternate sizes; numbers of GPUs."""
        return _holdouts(columns)

    def suspects(self, columns: Columns, seconds_N: NDArray[np.float64], *, op: str) -> NDArray[np.bool_]:
        """Rows that took over twice as long as a larger buffer of as many GPUs."""
        return outlasts_larger(columns["message_size"], seconds_N, [columns["num_gpus"]])

    def tokens(self, columns: Columns) -> NDArray[np.int64] | None:
        """Buffers are not tokens."""
        return None


def _table_rows(columns: Columns, op: str, dtype: str) -> Collective:
    return Collective(
        kind=next(kind for kind in _KINDS if kind == op),
        bytes_X=columns["message_size"].astype(np.float64) * _ELEMENT_BYTES[dtype],
        ranks_X=columns["num_gpus"],
        dtype=dtype,
    )


def _holdouts(columns: Columns) -> Mapping[str, NDArray[np.int64]]:
    return {"sizes": alternate_sizes(columns["message_size"]), "gpus": leave_one_out(columns["num_gpus"])}


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomAllReduceKernel:
    """All-reduce in one kernel, launched alone (`eager`) or in a graph; large buffers go to NCCL.

    `sources`: the two, by the names that tables give them; the first where an operation names none.
    """

    sources: tuple[str, ...] = ("SGLang_CustomAllReduce_graph", "SGLang_CustomAllReduce_eager")
    boosting: Boosting = _CURVES

    def describe_table(self, columns: Columns, *, op: str, dtype: str, device: Device) -> Description:
        """The rows of an all-reduce table."""
        return self._describe(_table_rows(columns, op, dtype), device, columns["kernel_source"].astype(str))

    def serves(self, operation: Operation, *, op: str) -> bool:
        """An all-reduce."""
        return isinstance(operation, Collective) and operation.kind == op

    def describe(self, operation: Collective, device: Device) -> Description:
        """What physics and the learner see."""
        source = operation.kernel if operation.kernel in self.sources else self.sources[0]
        return self._describe(operation, device, np.array(source))

    def _describe(self, operation: Collective, device: Device, source_X: NDArray[np.str_]) -> Description:
        bytes_X, ranks_X = (np.asarray(x, dtype=np.float64) for x in (operation.bytes_X, operation.ranks_X))
        wire_X = wire_bytes(operation)
        ours_X = bytes_X <= _BUFFER_BYTES.get(device.name, _OTHER_BUFFER_BYTES)
        one_shot_bytes_X = np.select([ranks_X == r for r in _ONE_SHOT_BYTES], list(_ONE_SHOT_BYTES.values()), np.inf)
        one_shot_X = ours_X & (bytes_X < one_shot_bytes_X)
        two_shot_X = ours_X & ~one_shot_X
        moved_X = np.where(one_shot_X, bytes_X * (ranks_X - 1), np.where(two_shot_X, wire_X, 0.0))
        ones = np.ones(np.broadcast_shapes(wire_X.shape, source_X.shape))
        eager_X = source_X == self.sources[1]
        stages = {
            "barriers": {"ranks": np.where(ours_X, ranks_X - 1, 0.0) * 0.1 * _STEP_S * ones},
            "second barrier": {"two shots": np.where(two_shot_X, 0.5 * _STEP_S, 0.0) * ones},
            "move": {
                "graph": np.where(eager_X, 0.0, 0.5 * _CALL_S) * ones,
                "eager": np.where(eager_X, 4 * _CALL_S, 0.0) * ones,
                "wire": moved_X / device.scale_up * ones,
                "wire of NCCL": np.where(ours_X, 0.0, wire_X / device.scale_up) * ones,
            },
            "copy in": {"eager": np.where(eager_X, 2 * bytes_X / device.memory_bandwidth, 0.0) * ones},
            "NCCL": {"first bytes": np.where(ours_X, 0.0, _SMALL_BYTES["4 MiB"] / device.scale_up) * ones},
        }
        return Description(
            bound_s=wire_X / device.scale_up * ones,
            stages=stages,
            features={name: values * ones for name, values in _features(operation).items()},
            curve="log bytes",
            source=source_X,
        )

    def holdouts(self, columns: Columns, *, op: str) -> Mapping[str, NDArray[np.int64]]:
        """Alternate sizes; numbers of GPUs."""
        return _holdouts(columns)

    def suspects(self, columns: Columns, seconds_N: NDArray[np.float64], *, op: str) -> NDArray[np.bool_]:
        """Rows that took over twice as long as a larger buffer of as many GPUs by the same kernel."""
        return outlasts_larger(columns["message_size"], seconds_N, [columns["num_gpus"], columns["kernel_source"]])

    def tokens(self, columns: Columns) -> NDArray[np.int64] | None:
        """Buffers are not tokens."""
        return None


TABLES = (
    TableKind(
        name="nccl",
        framework="nccl",
        kernel=NcclKernel(),
        keys=("op_name", "nccl_dtype", "num_gpus", "message_size"),
        timings={
            op: Timing(column="latency", unit_s=MS, where={"op_name": (op.replace("all_to_all", "alltoall"),)})
            for op in _KINDS
        },
        dtype_column="nccl_dtype",
        package_file="nccl_perf.parquet",
        size="message_size",
    ),
    TableKind(
        name="custom_allreduce",
        framework="sglang",
        kernel=CustomAllReduceKernel(),
        keys=("kernel_source", "num_gpus", "message_size"),
        timings={"all_reduce": Timing(column="latency", unit_s=MS)},
        package_file="custom_allreduce_perf.parquet",
        size="message_size",
    ),
)

"""Measured tables: Parquet files of kernel timings, checked when they are read.

A table is a file `<gpu>_<kind>.parquet`; the kinds are those of `cost_models.kernels`. A row is one timing. What is
wrong with a table is an `InputError` that names the file, the row (from 0) and the column.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cost_models.description import Description
from cost_models.devices import DEVICES, Device, known_dtype
from cost_models.kernels import kind_named
from cost_models.kernels.base import Columns, TableKind
from traces.errors import InputError

# No kernel is launched in less, and a time so many times over the datasheet's bound is in another unit.
_SHORTEST_S = 5e-7
_FLOOR_S = 2e-5
_SLOWEST = 200.0
_REPEAT_SPREAD = 2.0  # times of one key that differ by more are not one measurement repeated


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The N rows of a table that share one fit: one operation in one dtype.

    `row_N`: where each stands in the file.
    """

    table: str
    path: str
    kind: TableKind
    framework: str
    version: str
    device: Device
    op: str
    dtype: str
    columns: Columns
    seconds_N: NDArray[np.float64]
    row_N: NDArray[np.int64]

    def describe(self) -> Description:
        """What physics and the learner see of the rows."""
        return self.kind.kernel.describe_table(self.columns, op=self.op, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFile:
    """A table's file: what it is called, which kind it is, of which GPU and framework."""

    name: str
    path: Path
    kind: TableKind
    device: Device
    framework: str


def find_tables(folder: Path) -> list[TableFile]:
    """The tables of a folder in order of GPU and kind; `InputError` if it has none or a file has an unknown name."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of measured tables")
    files = []
    for path in sorted(folder.glob("*.parquet")):
        gpu = next((name for name in DEVICES if path.stem.startswith(f"{name}_")), None)
        if gpu is None:
            raise InputError(
                f"{path}: a table's name starts with its gpu, one of {', '.join(DEVICES)}; rename it or take it out"
            )
        name = path.stem.removeprefix(f"{gpu}_")
        try:
            kind = kind_named(name)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        files.append(TableFile(name=path.stem, path=path, kind=kind, device=DEVICES[gpu], framework=kind.framework))
    if not files:
        raise InputError(f"{folder}: no measured tables (<gpu>_<kind>.parquet) in it")
    return files


def choose_tables(
    files: Sequence[TableFile], *, gpu: str | None = None, framework: str | None = None
) -> list[TableFile]:
    """The tables of one GPU, one framework or both; `InputError` names those that there are."""
    _require_one_of(gpu, [file.device.name for file in files], "gpu")
    of_gpu = [file for file in files if gpu in (None, file.device.name)]
    _require_one_of(framework, [file.framework for file in of_gpu], "framework")
    return [file for file in of_gpu if framework in (None, file.framework)]


def _require_one_of(wanted: str | None, known: Sequence[str], what: str) -> None:
    if wanted is not None and wanted not in known:
        raise InputError(f"no tables of {what} {wanted!r}; known are {', '.join(dict.fromkeys(known))}")


def source_of(file: TableFile) -> str:
    """Where a table's measurements are from: as its file says, else the folder it lies in."""
    said = (pq.read_schema(file.path).metadata or {}).get(b"source")
    return said.decode() if said else file.path.parent.name


def read_parts(file: TableFile) -> list[Part]:
    """Read a table and check it; a part for each operation and known dtype that it holds."""
    columns = _read(file.path)
    rows = len(next(iter(columns.values()), ()))
    columns = {name: np.full(rows, value) for name, value in file.kind.added.items()} | columns
    _require_columns(file, columns)
    parts = []
    for op, timing in file.kind.timings.items():
        chosen = np.ones(len(columns[timing.column]), dtype=bool)
        for column, values in timing.where.items():
            chosen &= np.isin(columns[column], list(values))
        dtype_N = columns[file.kind.dtype_column] if file.kind.dtype_column else np.full(len(chosen), file.kind.dtype)
        for dtype in sorted(set(dtype_N[chosen].tolist())):
            if not known_dtype(dtype):
                continue
            row_N = np.flatnonzero(chosen & (dtype_N == dtype))
            of_part = {name: values[row_N] for name, values in columns.items()}
            taken_N = of_part[timing.column].astype(np.float64)
            if timing.after is not None:
                taken_N += of_part[timing.after]
            part = Part(
                table=file.name,
                path=str(file.path),
                kind=file.kind,
                framework=file.framework,
                version=str(of_part["version"][0]),
                device=file.device,
                op=op,
                dtype=str(dtype),
                columns=of_part,
                seconds_N=taken_N * timing.unit_s,
                row_N=row_N,
            )
            _check_times(part, timing.column, timing.unit_s)
            _check_keys(part)
            parts.append(part)
    if not parts:
        raise InputError(
            f"{file.path}: no rows of a known operation and dtype; known are {', '.join(file.kind.timings)}"
        )
    return parts


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such table") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a Parquet file ({error}); copy it again") from error
    return {name: column.to_numpy() for name, column in zip(table.column_names, table.columns, strict=True)}


def _require_columns(file: TableFile, columns: Mapping[str, NDArray[Any]]) -> None:
    wanted = {"version", *file.kind.keys, *(timing.column for timing in file.kind.timings.values())}
    for timing in file.kind.timings.values():
        wanted.update(timing.where)
        wanted.update([timing.after] if timing.after is not None else [])
    missing = sorted(wanted - columns.keys())
    if missing:
        raise InputError(
            f"{file.path}: no column {missing[0]!r}; a {file.kind.name} table needs {', '.join(sorted(wanted))}"
        )
    for name in file.kind.keys:
        values = columns[name]
        bad = np.flatnonzero(values == None) if values.dtype == object else np.flatnonzero(values != values)  # noqa: E711
        if bad.size:
            raise InputError(f"{file.path}: row {bad[0]}, column {name!r}: no value; fill it in or take the row out")


def _check_times(part: Part, column: str, unit_s: float) -> None:
    bad = np.flatnonzero(~(np.isfinite(part.seconds_N) & (part.seconds_N > 0)))
    if bad.size:
        value = part.columns[column][bad[0]]
        raise InputError(
            f"{part.path}: row {part.row_N[bad[0]]}, column {column!r}: {value} is not a time; "
            "measure it again or take the row out"
        )
    bound_N = np.maximum(np.broadcast_to(part.describe().bound_s, part.seconds_N.shape), _FLOOR_S)
    ratio = float(np.median(part.seconds_N / bound_N))
    shortest = int(part.seconds_N.argmin())
    if part.seconds_N[shortest] < _SHORTEST_S or ratio > _SLOWEST:
        row = shortest if part.seconds_N[shortest] < _SHORTEST_S else int((part.seconds_N / bound_N).argmax())
        raise InputError(
            f"{part.path}: row {part.row_N[row]}, column {column!r}: {part.columns[column][row]:g} in units of "
            f"{unit_s:g} s is {part.seconds_N[row]:.2g} s, where the datasheet of {part.device.name} allows "
            f"{bound_N[row]:.2g} s; is the column in another unit?"
        )


def _check_keys(part: Part) -> None:
    """Repeated measurements of one key may stand; two different times for one key may not."""
    keys = [np.unique(part.columns[name], return_inverse=True)[1] for name in part.kind.keys]
    order = np.lexsort(keys)
    same = np.ones(len(order) - 1, dtype=bool)
    for key in keys:
        same &= key[order[1:]] == key[order[:-1]]
    ratio = part.seconds_N[order[1:]] / part.seconds_N[order[:-1]]
    bad = np.flatnonzero(same & (np.maximum(ratio, 1 / ratio) > _REPEAT_SPREAD))
    if bad.size:
        first, second = sorted((int(part.row_N[order[bad[0]]]), int(part.row_N[order[bad[0] + 1]])))
        raise InputError(
            f"{part.path}: rows {first} and {second}, columns {', '.join(part.kind.keys)}: the same key with times "
            f"{max(ratio[bad[0]], 1 / ratio[bad[0]]):.1f} times apart; keep one of them"
        )

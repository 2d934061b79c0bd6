"""Routing traces in Parquet: one row a token, the rest of the trace as JSON in the schema's metadata."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from traces.errors import InputError
from traces.files import replacing
from traces.formats.base import check_values
from traces.model import ModelSpec, ScoreKind
from traces.trace import RoutingTrace

FORMAT_VERSION = 1
_KIND = "routing-trace"
_METADATA_KEY = b"moeroute"
_METADATA_TYPES = {"model": dict, "candidates": int, "score_kind": str, "domains": list, "source": str, "text": dict}
_RECORDED = "recorded_candidates"
_AGAIN = "record or import the trace again"


def write_trace(path: Path, trace: RoutingTrace) -> None:
    """Write `trace` to `path`, whole or not at all.

    A file without `recorded_candidates` in its metadata, older ones too, was recorded whole.
    Columns: request int32, position int32, phase uint8, domain uint8 (if the trace has domains), expert_ids
    fixed_size_list<uint16>[L * C], gates fixed_size_list<float16>[L * C] (if it has gates), layer by layer.
    Errors: `OSError` as the system gives it.
    """
    columns = {
        name: _list_column(values) if values.ndim == 3 else pa.array(values) for name, values in _arrays(trace).items()
    }
    metadata = {
        "format_version": FORMAT_VERSION,
        "kind": _KIND,
        "source": trace.source,
        **_description(trace),
    }
    table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(metadata).encode()})
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_trace(path: Path) -> RoutingTrace:
    """Read the trace that `write_trace` wrote to `path`; its arrays are read-only.

    Errors: `InputError` where the file is missing, damaged, of another kind or version, or holds values that
    no router gives.
    """
    try:
        table = _table(path)
        return _trace(table, _metadata(table))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error.__cause__


def trace_digest(trace: RoutingTrace) -> str:
    """SHA-256 of what the trace says, in hex: equal for equal content, wherever it came from (`source`)."""
    digest = hashlib.sha256(json.dumps(_description(trace), sort_keys=True).encode())
    for name, values in _arrays(trace).items():
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(values.data)
    return digest.hexdigest()


def _description(trace: RoutingTrace) -> dict[str, Any]:
    description = {
        "model": trace.model.to_json(),
        "candidates": trace.candidates,
        "score_kind": trace.score_kind,
        "domains": list(trace.domains),
        "text": dict(trace.text),
    }
    if trace.completed:  # said only where it is so: traces that were recorded whole keep their digests
        description[_RECORDED] = trace.recorded_candidates
    return description


def _arrays(trace: RoutingTrace) -> dict[str, NDArray[Any]]:
    """The trace's arrays by column name, contiguous and in the types of the file."""
    arrays = {
        "request": (trace.request_T, np.int32),
        "position": (trace.position_T, np.int32),
        "phase": (trace.phase_T, np.uint8),
        "domain": (trace.domain_T, np.uint8),
        "expert_ids": (trace.expert_ids_TLC, np.uint16),
        "gates": (trace.gates_TLC, np.float16),
    }
    return {
        name: np.ascontiguousarray(values, dtype=dtype)
        for name, (values, dtype) in arrays.items()
        if values is not None
    }


def _list_column(values_TLC: NDArray[Any]) -> "pa.FixedSizeListArray[Any]":
    _, layers, candidates = values_TLC.shape
    return pa.FixedSizeListArray.from_arrays(pa.array(values_TLC.reshape(-1)), layers * candidates)


def _table(path: Path) -> pa.Table:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read()
    except FileNotFoundError:
        raise InputError("no such file; give the path of a recorded trace") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"not a readable Parquet file ({reason}); {_AGAIN}") from error


def _metadata(table: pa.Table) -> dict[str, Any]:
    raw = (table.schema.metadata or {}).get(_METADATA_KEY)
    if raw is None:
        raise InputError("Parquet, but not a moeroute trace; import it with `moeroute trace import`")
    try:
        metadata = json.loads(raw)
    except ValueError as error:
        raise InputError(f"unreadable trace metadata ({error}); {_AGAIN}") from error
    if not isinstance(metadata, dict) or metadata.get("kind") != _KIND:
        raise InputError("a moeroute file, but not a routing trace; give the path of a trace")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"trace format_version {metadata.get('format_version')}; this moeroute reads {FORMAT_VERSION}: "
            f"{_AGAIN}, or install the moeroute that wrote it"
        )
    for name, kind in _METADATA_TYPES.items():
        if type(metadata.get(name)) is not kind:
            raise InputError(
                f"unreadable trace metadata ({name} is {metadata.get(name)!r}, expected {kind.__name__}); {_AGAIN}"
            )
    if metadata["score_kind"] not in get_args(ScoreKind):
        raise InputError(
            f"unreadable trace metadata (score_kind is {metadata['score_kind']!r}, "
            f"expected one of {', '.join(get_args(ScoreKind))}); {_AGAIN}"
        )
    if type(metadata.get(_RECORDED)) not in (int, type(None)):
        raise InputError(
            f"unreadable trace metadata ({_RECORDED} is {metadata[_RECORDED]!r}, expected int or none); {_AGAIN}"
        )
    return metadata


def _trace(table: pa.Table, metadata: dict[str, Any]) -> RoutingTrace:
    model = _model(metadata["model"])
    shape = (table.num_rows, model.layers, metadata["candidates"])
    list_size = model.layers * metadata["candidates"]
    has = set(table.column_names)
    trace = RoutingTrace(
        model=model,
        expert_ids_TLC=_column(table, "expert_ids", pa.list_(pa.uint16(), list_size)).reshape(shape),
        gates_TLC=_column(table, "gates", pa.list_(pa.float16(), list_size)).reshape(shape) if "gates" in has else None,
        request_T=_column(table, "request", pa.int32()),
        position_T=_column(table, "position", pa.int32()),
        phase_T=_column(table, "phase", pa.uint8()),
        domain_T=_column(table, "domain", pa.uint8()) if "domain" in has else None,
        domains=tuple(metadata["domains"]),
        score_kind=metadata["score_kind"],
        source=metadata["source"],
        text=metadata["text"],
        recorded_candidates=metadata.get(_RECORDED),
    )
    if trace.domain_T is not None and trace.domain_T.max() >= len(trace.domains):
        raise InputError(f"domain {trace.domain_T.max()} of {len(trace.domains)} domains; {_AGAIN}")
    check_values(trace)
    return trace


def _model(document: dict[str, Any]) -> ModelSpec:
    for field in fields(ModelSpec):
        value = document.get(field.name, field.default)
        if not _is_of(value, field.type):
            raise InputError(f"unreadable trace metadata (model.{field.name} is {value!r}); {_AGAIN}")
    try:
        return ModelSpec(**document)
    except TypeError as error:
        raise InputError(f"unreadable trace metadata ({error}); {_AGAIN}") from error


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value read from JSON is of a field's type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return isinstance(value, (int, float) if kind is float else kind)


def _column(table: pa.Table, name: str, expected: pa.DataType) -> NDArray[Any]:
    """The values of one column, flat."""
    if name not in table.column_names:
        raise InputError(f"no column {name}; {_AGAIN}")
    column = table.column(name).combine_chunks()
    if column.type != expected:
        raise InputError(f"column {name} is {column.type}, expected {expected}; {_AGAIN}")
    flat = column.flatten() if isinstance(column, pa.FixedSizeListArray) else column
    if column.null_count or flat.null_count:
        raise InputError(f"column {name} has empty values; {_AGAIN}")
    return flat.to_numpy(zero_copy_only=True)

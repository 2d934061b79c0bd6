import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from trace_strategies import tiny_model, trace_of, traces

from traces.errors import InputError
from traces.store import read_trace, trace_digest, write_trace

_TRACE = trace_of(
    [[[0, 1], [2, 3]], [[3, 0], [1, 2]]],
    [[[0.5, 0.25], [0.5, 0.5]], [[0.75, 0.25], [1, 0]]],
    model=tiny_model(),
    domains=("prose",),
    domain_T=np.zeros(2, dtype=np.uint8),
)
_COLUMNS = ("expert_ids_TLC", "gates_TLC", "request_T", "position_T", "phase_T", "domain_T")


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "a.parquet"
    write_trace(path, _TRACE)
    return path


def _change(path, *, columns=None, metadata=None, drop=()):
    """Rewrite the file at `path` with other columns or metadata."""
    table = pq.read_table(path)
    document = json.loads(table.schema.metadata[b"moeroute"])
    for name, values in (columns or {}).items():
        table = table.set_column(table.column_names.index(name), name, values)
    table = table.drop_columns(list(drop))
    document.update(metadata or {})
    pq.write_table(table.replace_schema_metadata({b"moeroute": json.dumps(document).encode()}), path)


def _ids(values, width=4):
    return pa.FixedSizeListArray.from_arrays(pa.array(values, pa.uint16()), width)


def _gates(values):
    return pa.FixedSizeListArray.from_arrays(pa.array(np.array(values, np.float16)), 4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(trace=traces())
def test_any_trace_comes_back_as_it_was_written(tmp_path, trace):
    path = tmp_path / "trace.parquet"
    write_trace(path, trace)
    back = read_trace(path)
    for name in _COLUMNS:
        before, after = getattr(trace, name), getattr(back, name)
        assert (before is None) == (after is None)
        if before is not None:
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after)
    for name in ("model", "score_kind", "domains", "source", "text", "completed"):
        assert getattr(back, name) == getattr(trace, name)
    assert trace_digest(back) == trace_digest(trace)


def test_digest_is_of_the_content_not_of_where_it_came_from():
    assert trace_digest(replace(_TRACE, source="elsewhere")) == trace_digest(_TRACE)
    ids_TLC = _TRACE.expert_ids_TLC.copy()
    ids_TLC[0, 0] = [1, 0]
    changed = [
        replace(_TRACE, expert_ids_TLC=ids_TLC),
        replace(_TRACE, gates_TLC=None),
        replace(_TRACE, score_kind="logits"),
        replace(_TRACE, text={"files": ["b.txt"]}),
        replace(_TRACE, model=tiny_model(hidden=16)),
        replace(_TRACE, phase_T=1 - _TRACE.phase_T),
    ]
    assert len({trace_digest(trace) for trace in [_TRACE, *changed]}) == 7


def test_a_completed_trace_says_so_and_keeps_saying_it(tmp_path):
    completed = replace(_TRACE, model=tiny_model(top_k=1), recorded_candidates=1)
    write_trace(tmp_path / "a.parquet", completed)
    back = read_trace(tmp_path / "a.parquet")
    assert (back.candidates, back.recorded_candidates, back.completed) == (2, 1, True)
    assert trace_digest(back) == trace_digest(completed)
    assert trace_digest(back) != trace_digest(replace(completed, recorded_candidates=None))
    for part in (back.take(np.array([1])), replace(back, source="elsewhere"), back.best(2)):
        assert (part.recorded_candidates, part.completed) == (1, True)
    recorded = back.best(1)
    assert (recorded.candidates, recorded.recorded_candidates, recorded.completed) == (1, None, False)
    np.testing.assert_array_equal(recorded.gates_TLC, completed.gates_TLC[:, :, :1])


def test_a_trace_recorded_whole_says_nothing_of_completion(written):
    assert "recorded_candidates" not in json.loads(pq.read_table(written).schema.metadata[b"moeroute"])
    assert read_trace(written).recorded_candidates is None
    whole = replace(_TRACE, recorded_candidates=2)
    assert not whole.completed
    assert trace_digest(whole) == trace_digest(_TRACE)


@pytest.mark.parametrize("recorded", [1, 3])
def test_recorded_candidates_lie_between_top_k_and_all(recorded):
    with pytest.raises(InputError, match=rf"recorded_candidates is {recorded}; expected 2 \(top_k\) to 2 \(cand"):
        replace(_TRACE, recorded_candidates=recorded)


@pytest.mark.parametrize("count", [1, 3])
def test_the_best_candidates_lie_between_top_k_and_all(count):
    with pytest.raises(InputError, match=rf"the best {count} candidates a token; use 2 \(top_k\) to 2 \(cand"):
        _TRACE.best(count)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.parquet: no such file"):
        read_trace(tmp_path / "none.parquet")


def test_a_folder_is_no_trace(tmp_path):
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_trace(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(written, share):
    whole = written.read_bytes()
    written.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match="not a readable Parquet file") as caught:
        read_trace(written)
    assert "\n" not in str(caught.value)


def test_flipped_bits_never_pass_as_data(written):
    whole = written.read_bytes()
    digest = trace_digest(_TRACE)
    for offset in range(4, len(whole) - 8, 7):
        damaged = bytearray(whole)
        damaged[offset] ^= 0xFF
        written.write_bytes(damaged)
        try:
            same = trace_digest(read_trace(written)) == digest
        except InputError:
            continue
        assert same  # a byte that holds no data


def test_other_parquet_files_are_refused(tmp_path):
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(InputError, match="Parquet, but not a moeroute trace"):
        read_trace(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format_version": 2}, r"format_version 2; this moeroute reads 1"),
        ({"kind": "study"}, r"not a routing trace"),
        ({"candidates": "2"}, r"candidates is '2', expected int"),
        ({"score_kind": "softest"}, r"score_kind is 'softest'"),
        ({"model": {"name": "tiny"}}, r"unreadable trace metadata"),
        ({"model": {**tiny_model().to_json(), "layers": "2"}}, r"model.layers is '2'"),
        ({"model": {**tiny_model().to_json(), "attention": "linear"}}, r"model.attention is 'linear'"),
        ({"model": {**tiny_model().to_json(), "attention": []}}, r"model.attention is \[\]"),
        ({"model": {**tiny_model().to_json(), "colour": "red"}}, r"unreadable trace metadata .*colour"),
        ({"model": None}, r"unreadable trace metadata"),
        ({"model": {**tiny_model().to_json(), "experts": 3}}, r"expert id 3 in a model of 3 experts"),
        ({"model": {**tiny_model().to_json(), "top_k": 5}}, r"top_k 5 is more than its 4 experts"),
        ({"candidates": 1}, r"expert_ids is .*, expected .*\[2\]"),
        ({"domains": []}, r"domain 0 of 0 domains"),
        ({"recorded_candidates": "1"}, r"recorded_candidates is '1', expected int or none"),
        ({"recorded_candidates": True}, r"recorded_candidates is True, expected int or none"),
        ({"recorded_candidates": 1}, r"recorded_candidates is 1; expected 2 \(top_k\) to 2 \(candidates\)"),
    ],
)
def test_bad_metadata_is_named(written, metadata, message):
    _change(written, metadata=metadata)
    with pytest.raises(InputError, match=message) as caught:
        read_trace(written)
    assert str(written) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_trace_from_before_attention_was_described_still_reads(written):
    document = tiny_model().to_json()
    for field in ("attention", "heads", "kv_heads", "head_dim", "attention_parameters", "vocab", "dense_layers"):
        del document[field]
    _change(written, metadata={"model": document})
    assert read_trace(written).model == tiny_model()


def test_metadata_that_is_no_json_is_refused(written):
    pq.write_table(pq.read_table(written).replace_schema_metadata({b"moeroute": b"{"}), written)
    with pytest.raises(InputError, match="unreadable trace metadata"):
        read_trace(written)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"phase": pa.array([0, 0], pa.int64())}, r"column phase is int64, expected uint8"),
        ({"position": pa.array([0, None], pa.int32())}, r"column position has empty values"),
        ({"expert_ids": _ids([0, 1, 2, 3, 3, 0, 1, None])}, r"column expert_ids has empty values"),
        ({"expert_ids": _ids([0, 1, 2, 3, 3, 0], width=3)}, r"expert_ids is .*\[3\].*, expected .*\[4\]"),
        ({"expert_ids": _ids([0, 1, 2, 3, 3, 3, 1, 2])}, r"token 1, layer 0 names one expert twice: \[3, 3\]"),
        ({"expert_ids": _ids([0, 1, 2, 3, 9, 0, 1, 2])}, r"expert id 9 in a model of 4 experts"),
        ({"gates": _gates([0.5, 0.25, 0.5, np.nan, 1, 0, 1, 0])}, r"token 0, layer 1 has gate nan"),
        ({"gates": _gates([0.5, 0.25, 0.5, 0.5, 1, -0.5, 1, 0])}, r"token 1, layer 0 has gate -0.5; .*logits\?"),
    ],
)
def test_bad_columns_are_named(written, columns, message):
    _change(written, columns=columns)
    with pytest.raises(InputError, match=message) as caught:
        read_trace(written)
    assert str(written) in str(caught.value)


def test_a_missing_column_is_named(written):
    _change(written, drop=["request"])
    with pytest.raises(InputError, match="no column request"):
        read_trace(written)


def test_a_trace_without_tokens_is_refused(written):
    pq.write_table(pq.read_table(written).slice(0, 0), written)
    with pytest.raises(InputError, match="tokens > 0"):
        read_trace(written)


def test_negative_logits_are_fine(tmp_path):
    trace = trace_of([[[0, 1]]], [[[-1, -2]]], model=tiny_model(layers=1), score_kind="logits")
    write_trace(tmp_path / "a.parquet", trace)
    np.testing.assert_array_equal(read_trace(tmp_path / "a.parquet").gates_TLC, [[[-1, -2]]])


def test_an_interrupt_leaves_the_old_file(written, monkeypatch):
    before = written.read_bytes()

    def interrupted(_table, where, **_options):
        where.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_trace(written, replace(_TRACE, source="newer"))
    assert written.read_bytes() == before
    assert [file.name for file in written.parent.iterdir()] == ["a.parquet"]


_FULL_DISK = """
import resource, sys
from pathlib import Path
from traces.store import write_trace
from traces.synthetic import synthetic_trace
from traces.model import ModelSpec

model = ModelSpec(name="tiny", layers=4, experts=16, top_k=4, hidden=8, expert_hidden=8)
trace = synthetic_trace(model, tokens=2000, zipf=0, seed=0)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_trace(Path(sys.argv[1]), trace)
except OSError as error:
    print("OSError", error.errno)
"""


def test_a_full_disk_leaves_nothing(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(tmp_path / "out" / "a.parquet")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("OSError")
    assert list((tmp_path / "out").iterdir()) == []


def test_candidates_that_are_not_best_first_are_refused(tmp_path):
    trace = trace_of([[[0, 1]]], [[[0.2, 0.7]]], model=tiny_model(layers=1))
    write_trace(tmp_path / "trace.parquet", trace)
    with pytest.raises(InputError, match="candidates must be best first"):
        read_trace(tmp_path / "trace.parquet")

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from trace_strategies import tiny_model, traces

from traces.errors import InputError
from traces.formats.npz import import_npz
from traces.presets import PRESETS
from traces.trace import DECODE, PREFILL


def _arrays(**changes):
    """Three tokens in two requests, 2 layers, 4 experts, 2 a token; `None` leaves a key out."""
    arrays = {
        "expert_ids": np.array([[[0, 1], [2, 3]], [[3, 0], [1, 2]], [[1, 0], [3, 2]]], np.uint8),
        "gate_weights": np.array([[[0.5, 0.25]] * 2, [[0.75, 0.25]] * 2, [[0.25, 0.25]] * 2], np.float16),
        "request_offsets": np.array([0, 2, 3]),
        "layer_ids": np.array([2, 3]),
        "num_experts": np.int64(4),
        "top_k": np.int64(2),
        **changes,
    }
    return {key: value for key, value in arrays.items() if value is not None}


def _import(tmp_path, *, options=None, **changes):
    np.savez(tmp_path / "a.npz", **_arrays(**changes))
    return import_npz(tmp_path / "a.npz", model=tiny_model(), **(options or {}))


def test_reads_the_arrays_as_they_are(tmp_path):
    imported = _import(tmp_path)
    trace = imported.trace
    assert imported.skipped_tokens == 0
    np.testing.assert_array_equal(trace.expert_ids_TLC, _arrays()["expert_ids"])
    np.testing.assert_array_equal(trace.gates_TLC, _arrays()["gate_weights"])
    assert trace.request_T.tolist() == [0, 0, 1]
    assert trace.position_T.tolist() == [0, 1, 0]
    assert trace.phase_T.tolist() == [PREFILL] * 3
    assert trace.score_kind == "softmax"
    assert trace.source == "npz a.npz"
    assert trace.domain_T is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(trace=traces().filter(lambda trace: trace.gates_TLC is not None))
def test_any_npz_gives_what_was_recorded(tmp_path, trace):
    k = trace.model.top_k
    arrays = {
        "expert_ids": trace.expert_ids_TLC[:, :, :k],
        "gate_weights": trace.gates_TLC[:, :, :k],
        "request_offsets": np.array([0, trace.tokens]),
        "layer_ids": np.arange(trace.model.layers),
        "num_experts": trace.model.experts,
        "top_k": k,
    }
    np.savez(tmp_path / "any.npz", **arrays)
    back = import_npz(tmp_path / "any.npz", model=trace.model, score_kind="sigmoid").trace
    np.testing.assert_array_equal(back.expert_ids_TLC, arrays["expert_ids"])
    np.testing.assert_array_equal(back.gates_TLC, arrays["gate_weights"])


def test_unsorted_candidates_are_sorted_and_ties_stay(tmp_path):
    gates = np.array([[[0.25, 0.5]] * 2, [[0.25, 0.25]] * 2, [[0.5, 0.25]] * 2], np.float16)
    trace = _import(tmp_path, gate_weights=gates).trace
    assert trace.expert_ids_TLC.tolist() == [[[1, 0], [3, 2]], [[3, 0], [1, 2]], [[1, 0], [3, 2]]]
    assert trace.gates_TLC[:, 0].tolist() == [[0.5, 0.25], [0.25, 0.25], [0.5, 0.25]]


def test_gates_that_sum_to_one_in_every_row_are_over_the_chosen(tmp_path):
    gates = np.full((3, 2, 2), 0.5, np.float16)
    assert _import(tmp_path, gate_weights=gates).trace.score_kind == "softmax_over_topk"
    gates[2, 1] = [0.5, 0.25]
    assert _import(tmp_path, gate_weights=gates).trace.score_kind == "softmax"


def test_a_request_that_starts_after_its_prompt_is_decode(tmp_path):
    positions = np.array([7, 8, 0], np.int32)
    trace = _import(tmp_path, token_position=positions).trace
    assert trace.position_T.tolist() == [7, 8, 0]
    assert trace.phase_T.tolist() == [DECODE, DECODE, PREFILL]
    trace = _import(tmp_path, token_position=positions, options={"phase": "prefill"}).trace
    assert trace.phase_T.tolist() == [PREFILL] * 3


def test_padded_tokens_are_skipped_counted_and_reported(tmp_path):
    ids = _arrays()["expert_ids"].astype(np.int16)
    ids[1, 0, 1] = -1
    imported = _import(tmp_path, expert_ids=ids)
    assert imported.skipped_tokens == 1
    assert imported.trace.tokens == 2
    assert imported.trace.position_T.tolist() == [0, 0]
    assert imported.trace.request_T.tolist() == [0, 1]
    assert imported.trace.source == "npz a.npz, 1 of 3 tokens skipped for padding"


def test_requests_that_name_a_dataset_give_domains(tmp_path):
    meta = [{"dataset": "b"}, {"dataset": "a"}]
    trace = _import(tmp_path, request_meta=np.frombuffer(json.dumps(meta).encode(), np.uint8)).trace
    assert trace.domains == ("b", "a")
    assert trace.domain_T.tolist() == [0, 0, 1]
    assert trace.text == {"requests": meta}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_ids": None}, r"no expert_ids in the npz \(it has gate_weights,"),
        ({"top_k": None, "num_experts": None}, r"no num_experts, top_k in the npz"),
        ({"num_experts": 8}, r"8 num_experts, but tiny has 4"),
        ({"top_k": 1}, r"1 top_k, but tiny has 2"),
        ({"layer_ids": np.arange(3)}, r"3 layers, but tiny has 2"),
        ({"expert_ids": np.zeros((3, 4), np.uint8)}, r"expert_ids is uint8 with 2 dimensions; expected integer with 3"),
        ({"expert_ids": np.zeros((3, 2, 2))}, r"expert_ids is float64 with 3 dimensions; expected integer"),
        ({"gate_weights": np.zeros((3, 2, 2), int)}, r"gate_weights is int64 .*expected floating"),
        ({"gate_weights": np.zeros((3, 2, 1))}, r"gate_weights has shape \(3, 2, 1\), expert_ids \(3, 2, 2\)"),
        ({"top_k": np.array([2])}, r"top_k is int64 with 1 dimensions"),
        ({"expert_ids": np.full((3, 2, 2), 4)}, r"expert_ids holds 4 in a model of 4 experts"),
        ({"expert_ids": np.full((3, 2, 2), -2)}, r"expert_ids holds -2"),
        ({"expert_ids": np.full((3, 2, 2), -1)}, r"no token without padding"),
        ({"expert_ids": np.full((3, 2, 2), 1)}, r"names one expert twice: \[1, 1\]"),
        ({"gate_weights": np.full((3, 2, 2), np.nan)}, r"has gate nan"),
        ({"gate_weights": np.full((3, 2, 2), -0.5)}, r"has gate -0.5"),
        ({"gate_weights": np.full((3, 2, 2), 0.75)}, r"sum to 1.5, more than a softmax can"),
        ({"request_offsets": np.array([0, 2, 1, 3])}, r"request_offsets must rise from 0 to the 3 tokens"),
        ({"request_offsets": np.array([0, 2])}, r"from \[0\] to \[2\]"),
        ({"request_offsets": np.array([0.0, 3.0])}, r"request_offsets is float64"),
        ({"request_offsets": np.array([], int)}, r"it has 0 entries"),
        ({"token_position": np.array([0, 1])}, r"token_position has 2 entries for 3 tokens"),
        ({"token_position": np.array([0, 1, -1])}, r"the least -1"),
        ({"request_meta": np.frombuffer(b"[{", np.uint8)}, r"request_meta is not UTF-8 JSON"),
        ({"request_meta": np.frombuffer(b"[{}]", np.uint8)}, r"request_meta must list 2 objects"),
        ({"expert_ids": np.array([{}])}, r"not a readable npz file \(Object arrays"),
    ],
)
def test_bad_input_is_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        _import(tmp_path, **changes)
    assert "a.npz: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_logits_beyond_float16_are_refused(tmp_path):
    with pytest.raises(InputError, match="has gate inf; gates of kind logits must be finite"):
        _import(tmp_path, gate_weights=np.full((3, 2, 2), 1e6), options={"score_kind": "logits"})


def test_a_trace_without_tokens_is_refused(tmp_path):
    empty = {"expert_ids": np.zeros((0, 2, 2), np.uint8), "gate_weights": np.zeros((0, 2, 2), np.float16)}
    with pytest.raises(InputError, match="no token without padding"):
        _import(tmp_path, **empty, request_offsets=np.array([0, 0]))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **_arrays())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match="not a readable npz file"):
        import_npz(path, model=tiny_model())


def test_what_is_no_npz_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        import_npz(tmp_path / "none.npz", model=tiny_model())
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(InputError, match="a single array"):
        import_npz(tmp_path / "one.npy", model=tiny_model())
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match="not a readable npz file"):
        import_npz(tmp_path / "text.npz", model=tiny_model())


def test_recorded_gpt_oss(shared_data):
    imported = import_npz(shared_data / "traces/gptoss20b/gptoss20b_ship.npz", model=PRESETS["gpt-oss-20b"])
    trace = imported.trace
    assert (trace.tokens, trace.candidates, imported.skipped_tokens) == (5200, 4, 0)
    assert trace.score_kind == "softmax_over_topk"
    assert (trace.phase_T == DECODE).all()
    assert trace.position_T[0] == 217
    assert trace.domains == ("gpqa_diamond", "mmlu_pro_validation", "mmlu_dev", "tulu3_persona_if")


def test_recorded_flame_moe(shared_data):
    path = shared_data / "traces/flame_moe_290m/flame_moe_290m_prefill2048.npz"
    trace = import_npz(path, model=PRESETS["flame-moe-290m"]).trace
    assert (trace.tokens, trace.candidates) == (2048, 6)
    assert trace.score_kind == "softmax"
    assert (trace.phase_T == PREFILL).all()


def test_ids_of_null_experts_are_read(tmp_path):
    ids = np.array([[[0, 4], [2, 3]], [[5, 0], [1, 2]], [[1, 0], [5, 4]]], np.uint8)
    np.savez(tmp_path / "a.npz", **_arrays(expert_ids=ids))
    trace = import_npz(tmp_path / "a.npz", model=tiny_model(null_experts=2)).trace
    assert sorted(trace.expert_ids_TLC[2, 1].tolist()) == [4, 5]
    with pytest.raises(InputError, match=r"holds 5 in a model of 5 experts"):
        import_npz(tmp_path / "a.npz", model=tiny_model(null_experts=1))

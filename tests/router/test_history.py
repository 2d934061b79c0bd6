from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from router.history import RoutingHistory
from traces.errors import InputError
from traces.formats.npz import import_npz
from traces.model import ModelSpec
from traces.presets import PRESETS
from traces.synthetic import synthetic_trace
from traces.trace import RoutingTrace

MODEL = ModelSpec(name="small", layers=1, experts=4, top_k=2, hidden=8, expert_hidden=8)


def trace_of(ids_TC: list[list[int]], gates_TC: list[list[float]], model: ModelSpec = MODEL) -> RoutingTrace:
    tokens = len(ids_TC)
    return RoutingTrace(
        model=model,
        expert_ids_TLC=np.array(ids_TC, dtype=np.uint16)[:, None],
        gates_TLC=np.array(gates_TC, dtype=np.float16)[:, None],
        request_T=np.zeros(tokens, dtype=np.int32),
        position_T=np.arange(tokens, dtype=np.int32),
        phase_T=np.zeros(tokens, dtype=np.uint8),
        score_kind="softmax",
        source="by hand",
    )


def test_a_history_counts_what_was_used_together() -> None:
    # Three tokens of three candidates, of which two are used: {0, 1} twice, {2, 0} once.
    history = RoutingHistory.of(
        trace_of([[0, 1, 2], [1, 0, 3], [2, 0, 1]], [[0.5, 0.25, 0.25], [0.5, 0.5, 0.0], [0.75, 0.25, 0.0]])
    )
    assert history.together_LEE.tolist() == [[[3, 2, 1, 0], [2, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]]
    # Second over best: 1/2, 1, 1/3; half of the tokens are under 1/2, a quarter under (1/3 + 1/2) / 2.
    assert [history.best_ratio(0, quantile) for quantile in (0.0, 0.5, 1.0)] == pytest.approx([1 / 3, 0.5, 1.0])
    assert history.best_ratio(0, 0.25) == pytest.approx((1 / 3 + 0.5) / 2)
    # With one expert a token loses 1/3, 1/2, 1/4 of its mass: 13/36 on average.
    assert history.output_error_LK.tolist() == [[pytest.approx(13 / 36), 0.0]]
    assert (history.layers, history.experts, history.measured) == (1, 4, False)


def test_null_experts_are_counted_as_experts() -> None:
    model = replace(MODEL, null_experts=2)
    history = RoutingHistory.of(trace_of([[0, 5]], [[0.5, 0.25]], model))
    assert history.experts == 6
    assert history.together_LEE[0, 0].tolist() == [1, 0, 0, 0, 0, 1]


def test_a_best_ratio_of_a_half_percentile_lies_between_its_neighbours() -> None:
    history = RoutingHistory.of(synthetic_trace(MODEL, tokens=500, zipf=0.5, seed=1))
    low, between, high = (history.best_ratio(0, quantile) for quantile in (0.31, 0.315, 0.32))
    assert between == pytest.approx((low + high) / 2)


def test_traces_that_tell_nothing_are_refused() -> None:
    trace = trace_of([[0, 1]], [[0.5, 0.25]])
    with pytest.raises(InputError, match=r"has no gates; earlier traffic needs the scores of the candidates$"):
        RoutingHistory.of(replace(trace, gates_TLC=None))
    with pytest.raises(InputError, match=r"holds logits; record or import it with softmax scores$"):
        RoutingHistory.of(replace(trace, score_kind="logits"))


def test_measured_errors_take_the_place_of_lost_mass() -> None:
    history = RoutingHistory.of(trace_of([[0, 1]], [[0.5, 0.25]]))
    measured = history.with_output_error(np.array([[0.125, 0.0]]))
    assert (measured.measured, measured.output_error_LK.tolist()) == (True, [[0.125, 0.0]])
    assert measured.together_LEE is history.together_LEE
    assert (history.measured, history.output_error_LK.tolist()) == (False, [[pytest.approx(1 / 3), 0.0]])


@pytest.mark.parametrize(
    ("error_LK", "told"),
    [
        (np.zeros((1, 3)), r"of shape \(1, 3\); the history's layers and k are \(1, 2\): measure them on the model"),
        (np.array([[np.nan, 0.0]]), r"of layer 0 at k = 1 is nan; it must be a number of at least 0"),
        (np.array([[0.5, -0.25]]), r"of layer 0 at k = 2 is -0.25; it must be"),
    ],
)
def test_errors_of_another_model_are_refused(error_LK: np.ndarray, told: str) -> None:
    with pytest.raises(InputError, match=told):
        RoutingHistory.of(trace_of([[0, 1]], [[0.5, 0.25]])).with_output_error(error_LK)


def test_a_layer_that_it_has_not_is_refused() -> None:
    history = RoutingHistory.of(trace_of([[0, 1]], [[0.5, 0.25]]))
    with pytest.raises(InputError, match=r"earlier traffic has 1 layers, but layer 1 is asked for"):
        history.best_ratio(1, 0.5)


def test_recorded_gpt_oss_has_a_history(shared_data: Path) -> None:
    path = shared_data / "traces/gptoss20b/gptoss20b_ship.npz"
    if not path.is_file():
        pytest.skip(f"no recorded trace at {path.name}")
    trace = import_npz(path, model=PRESETS["gpt-oss-20b"]).trace
    history = RoutingHistory.of(trace)
    own_LE = np.diagonal(history.together_LEE, axis1=1, axis2=2)
    np.testing.assert_array_equal(own_LE, trace.loads_LE())
    np.testing.assert_array_equal(history.together_LEE, history.together_LEE.transpose(0, 2, 1))
    assert (np.diff(history.output_error_LK, axis=1) < 0).all()
    assert (np.diff(history.ratio_LQ, axis=1) >= 0).all()

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_strategies import tiny_model

from traces.errors import InputError
from traces.formats.base import check_values
from traces.stats import trace_stats
from traces.store import trace_digest
from traces.synthetic import synthetic_trace
from traces.trace import DECODE


@given(zipf=st.floats(0, 5), seed=st.integers(0, 99), candidates=st.integers(2, 4))
def test_laws(zipf, seed, candidates):
    trace = synthetic_trace(tiny_model(), tokens=9, zipf=zipf, seed=seed, candidates=candidates)
    check_values(trace)
    assert trace.expert_ids_TLC.shape == (9, 2, candidates)
    assert (np.diff(trace.gates_TLC.astype(float), axis=2) <= 0).all()
    assert (trace.gates_TLC.astype(float).sum(axis=2) <= 1.001).all()
    assert trace_digest(trace) == trace_digest(
        synthetic_trace(tiny_model(), tokens=9, zipf=zipf, seed=seed, candidates=candidates)
    )


def test_one_expert_a_token_is_popular_by_zipf():
    # 8 experts, zipf 1: the first gets 1 / H(8) = 1 / 2.718 = .368 of the tokens, the r-th a r-th of that.
    model = tiny_model(layers=3, experts=8, top_k=1)
    shares_LE = synthetic_trace(model, tokens=20_000, zipf=1, seed=1).loads_LE() / 20_000
    expected = 0.36793 / np.arange(1, 9)
    assert -np.sort(-shares_LE, axis=1) == pytest.approx(np.tile(expected, (3, 1)), abs=0.012)
    assert len({tuple(layer) for layer in np.argsort(-shares_LE, axis=1).tolist()}) == 3


def test_zero_is_uniform():
    model = tiny_model(layers=4, experts=16, top_k=4)
    stats = trace_stats(synthetic_trace(model, tokens=4000, zipf=0, seed=2))
    assert np.mean(stats.max_over_mean_L) == pytest.approx(stats.uniform.max_over_mean, abs=0.03)
    assert np.mean(stats.reuse_L) == pytest.approx(stats.uniform_reuse, abs=0.01)


def test_requests_positions_phase_and_label():
    trace = synthetic_trace(tiny_model(), tokens=5, zipf=0.8, seed=3, tokens_per_request=2, phase="decode")
    assert trace.request_T.tolist() == [0, 0, 1, 1, 2]
    assert trace.position_T.tolist() == [0, 1, 0, 1, 0]
    assert (trace.phase_T == DECODE).all()
    assert trace.source == "synthetic zipf=0.8 seed=3"
    assert trace.score_kind == "softmax"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "0 tokens"),
        ({"tokens_per_request": 0}, "0 a request"),
        ({"zipf": -1}, "zipf is -1"),
        ({"zipf": float("nan")}, "zipf is nan"),
        ({"candidates": 1}, r"1 candidates a token; use 2 \(top_k\) to 4"),
        ({"candidates": 5}, "5 candidates"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        synthetic_trace(tiny_model(), **{"tokens": 4, "zipf": 1, "seed": 0, **options})


def test_null_experts_are_drawn_as_others_are():
    model = tiny_model(layers=3, experts=4, top_k=6, null_experts=4)
    trace = synthetic_trace(model, tokens=4000, zipf=0, seed=0)
    check_values(trace)
    shares = np.bincount(trace.expert_ids_TLC.ravel(), minlength=8) / (4000 * 3)
    assert shares == pytest.approx(np.full(8, 6 / 8), abs=0.02)

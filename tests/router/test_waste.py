import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.waste import CLAIM, capacity_waste
from traces.errors import InputError
from traces.model import ModelSpec
from traces.presets import preset
from traces.synthetic import synthetic_trace
from traces.trace import RoutingTrace


def trace_of(ids_TK, gates_TK=None, *, experts=4, score_kind="softmax"):
    ids_TLC = np.asarray(ids_TK, np.uint16)[:, None]
    tokens, _, k = ids_TLC.shape
    return RoutingTrace(
        model=ModelSpec(name="tiny", layers=1, experts=experts, top_k=k, hidden=8, expert_hidden=16),
        expert_ids_TLC=ids_TLC,
        gates_TLC=None if gates_TK is None else np.asarray(gates_TK, np.float16)[:, None],
        request_T=np.zeros(tokens, np.int32),
        position_T=np.arange(tokens, dtype=np.int32),
        phase_T=np.zeros(tokens, np.uint8),
        score_kind="none" if gates_TK is None else score_kind,
        source="by hand",
    )


def waste(trace, factor=1.0, threshold=0.1, **options):
    return capacity_waste(trace, capacity_factors=[factor], gate_threshold=threshold, **options)[0]


def test_numbers_a_person_can_check():
    # 4 tokens of 2 pairs, 4 experts: loads 4, 3, 1, 0, places 4 * 2 / 4 = 2.
    gates_TK = [[0.9, 0.05], [0.5, 0.5], [0.5, 0.5], [0.92, 0.06]]
    found = waste(trace_of([[0, 1], [0, 1], [0, 1], [0, 2]], gates_TK))
    assert (found.steps, found.tokens_per_step, found.places) == (1, 4, 2)
    # Kept 2 + 2 + 1 = 5 of 8 pairs, in 8 places of all experts or 6 of the three active ones.
    assert found.dropped == 3 / 8
    assert found.padding == 3 / 8
    assert found.active_padding == pytest.approx(1 / 6)
    assert found.idle_L == (0.25,)
    # Gates of .05 of .95 (expert 1) and .06 of .98 (expert 2) are below a tenth. Expert 1 drops its one, 2 keeps it.
    assert found.below == 2 / 8
    assert found.wasted == pytest.approx((1 + 1) / 6)


def test_steps_have_a_capacity_each():
    # In two steps of two tokens experts 0 and 1, then 2 and 3 get two pairs each; together all would have one's mean.
    trace = trace_of([[0, 1], [0, 1], [2, 3], [2, 3]])
    assert waste(trace).dropped == 0
    found = waste(trace, tokens_per_step=2)
    assert (found.steps, found.places) == (2, 1)
    assert found.dropped == 0.5
    assert found.padding == 0.5
    assert found.active_padding == 0


def test_without_gates_low_ones_are_left_out():
    found = waste(trace_of([[0, 1]]))
    assert found.below is None
    assert found.wasted is None
    assert found.below_L is None
    assert found.wasted_L is None


def test_logits_are_compared_as_shares():
    # Logits 2 and -2 are shares .982 and .018 of the pair; the sum of the logits would be 0.
    trace = trace_of([[0, 1]], [[2.0, -2.0]], score_kind="logits")
    assert waste(trace, threshold=0.02).below == 0.5
    assert waste(trace, threshold=0.01).below == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"factor": 0.0}, r"capacity factor 0; use a finite one above 0"),
        ({"factor": float("nan")}, r"capacity factor nan"),
        ({"threshold": 1.5}, r"gate threshold 1\.5; .* use 0 to 1"),
        ({"tokens_per_step": 2}, r"prefill steps of 2 tokens"),
    ],
)
def test_bad_input_is_refused(options, match):
    with pytest.raises(InputError, match=match):
        waste(trace_of([[0, 1]]), **options)


@given(
    seed=st.integers(0, 2**16),
    factors=st.lists(st.floats(0.25, 6), min_size=2, max_size=4),
    threshold=st.floats(0, 1),
    size=st.integers(1, 64),
)
def test_laws(seed, factors, threshold, size):
    model = ModelSpec(name="tiny", layers=2, experts=8, top_k=2, hidden=8, expert_hidden=16)
    trace = synthetic_trace(model, tokens=64, zipf=1.0, seed=seed)
    found = capacity_waste(trace, capacity_factors=sorted(factors), gate_threshold=threshold, tokens_per_step=size)
    pairs = 64 // size * size * 2
    for waste in found:
        places = waste.steps * 8 * waste.places
        for padding, dropped in zip(waste.padding_L, waste.dropped_L, strict=True):
            # Every place is empty or has a pair, every pair is dropped or has a place.
            assert (1 - padding) * places == pytest.approx((1 - dropped) * pairs)
        assert 0 <= waste.active_padding <= waste.padding + 1e-12
        assert waste.active_padding <= waste.wasted + 1e-12 <= 1 + 1e-9
        assert waste.below == found[0].below
        json.dumps(waste.to_json(), allow_nan=False)
    for tight, wide in pairwise(found):
        assert wide.dropped <= tight.dropped
        assert wide.padding >= tight.padding - 1e-12


@given(seed=st.integers(0, 2**16))
def test_a_threshold_of_one_wastes_all(seed):
    trace = synthetic_trace(preset("mixtral-8x7b"), tokens=32, zipf=0.5, seed=seed)
    found = waste(replace(trace, gates_TLC=trace.gates_TLC * np.float16(0.5)), threshold=1.0)
    assert found.below == 1
    # Dropped pairs hold no place; all others are below the threshold.
    assert found.wasted == pytest.approx(1)
    assert found.to_json()["claimed_up_to"] == CLAIM


def test_what_null_experts_get_takes_no_place():
    # 4 tokens of 2 pairs, 2 experts and 1 null one (2): loads 3 and 2, places 4 * 2 / 2 = 4; nothing can be dropped.
    trace = trace_of([[0, 2], [0, 1], [2, 0], [1, 2]], [[0.9, 0.05], [0.5, 0.5], [0.92, 0.06], [0.6, 0.4]], experts=3)
    trace = replace(trace, model=replace(trace.model, experts=2, null_experts=1))
    found = waste(trace)
    assert (found.places, found.dropped) == (4, 0)
    assert found.padding == 3 / 8
    # Of the five pairs one, expert 0's in token 2, has .06 of .98; the null expert's .05 is no pair.
    assert found.below == 1 / 5
    assert found.wasted == pytest.approx((3 + 1) / 8)
    # Half of it: 2 places, and expert 0 drops one.
    assert waste(trace, factor=0.5).dropped == 1 / 5


def test_a_step_of_null_experts_alone_wastes_all_places():
    trace = trace_of([[2], [2]], [[0.5], [0.5]], experts=3)
    found = waste(replace(trace, model=replace(trace.model, experts=2, null_experts=1)))
    assert (found.padding, found.active_padding, found.dropped, found.below, found.wasted) == (1, 0, 0, 0, 0)

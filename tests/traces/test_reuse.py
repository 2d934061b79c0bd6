import json
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from trace_strategies import tiny_model, trace_of, traces

from traces.errors import InputError
from traces.presets import PRESETS
from traces.reuse import active_set, expert_cache
from traces.synthetic import synthetic_trace
from traces.trace import DECODE, PREFILL


def two_streams():
    """Two requests of three tokens, top 1 of 4 experts: 0 0 1 and 0 2 1."""
    return trace_of(
        np.array([0, 0, 1, 0, 2, 1]).reshape(6, 1, 1),
        model=tiny_model(layers=1, top_k=1),
        request_T=np.array([0, 0, 0, 1, 1, 1], np.int32),
        position_T=np.array([0, 1, 2, 0, 1, 2], np.int32),
    )


def test_active_sets_a_person_can_check():
    found = active_set(two_streams())
    assert found.batch_B == (1, 2, 4)
    # Two tokens a step: {0}, {0, 2}, {1}: 4/3 experts; of {0, 2} half was active before, of {1} nothing.
    assert found.active_BL[1] == pytest.approx((4 / 3,))
    assert found.reuse_BL[1] == pytest.approx((1 / 4,))
    # Any other step: {0} is in 1 of 2; of {0, 2} one expert in 1 of 2, the other in none; {1} in none.
    assert found.reuse_any_BL[1] == pytest.approx(((1 / 2 + 1 / 4 + 0) / 3,))
    # One token a step: 0 0 1 and 0 2 1: of four followers one repeats.
    assert found.reuse_BL[0] == pytest.approx((1 / 4,))
    assert found.steps_B == (6, 3, 1)
    # E (1 - (1 - 1/4)^2) = 4 * 7/16
    assert found.uniform_B[1] == pytest.approx(1.75)
    # Four streams take a token each, so that there is one step and nothing before it.
    assert found.reuse_BL[2] is None
    assert found.reuse_any_BL[2] is None


def test_uniform_routing_is_what_the_formula_says():
    trace = synthetic_trace(PRESETS["mixtral-8x7b"], tokens=4096, zipf=0, seed=3, tokens_per_request=64)
    found = active_set(trace)
    for row in range(len(found.batch_B)):
        assert np.mean(found.active_BL[row]) == pytest.approx(found.uniform_B[row], rel=0.02)
        assert np.mean(found.reuse_BL[row]) == pytest.approx(found.uniform_reuse_B[row], abs=0.02)
        assert np.mean(found.reuse_any_BL[row]) == pytest.approx(found.uniform_reuse_B[row], abs=0.02)
    cache = expert_cache(trace)
    for slots in (2, 4, 6):
        assert cache.hit(slots) == pytest.approx(slots / 8, abs=0.01)


def test_a_cache_a_person_can_check():
    # 0 0 1 | 0 2 1: hits at depth 0 (the second 0), 1 (the third 0) and 2 (the second 1), of six pairs.
    cache = expert_cache(two_streams())
    assert cache.hit_LM[0].tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6, 3 / 6])
    assert cache.slots(0.25) == 1
    assert cache.slots(0.6) == 3
    # An expert has 3 * 8 * 16 parameters of two bytes; a token needs one.
    assert cache.uncached_bytes == 768
    assert cache.loaded_bytes(2) == pytest.approx(768 * 4 / 6)
    assert cache.resident_bytes(2) == 2 * 768


def test_experts_of_one_token_come_at_once():
    # The token's own first expert does not push out its second: both were resident before it.
    cache = expert_cache(trace_of([[[0, 1]], [[2, 3]], [[0, 1]], [[1, 0]]], model=tiny_model(layers=1)))
    # The third token finds 0 and 1 below 2 and 3, the fourth finds them on top: 0 at depth 0, 1 at depth 1.
    assert cache.hit_LM[0].tolist() == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8])


def lru_by_hand(trace, slots):
    """Hits with a dictionary for each layer, which keeps `slots` experts after each token."""
    hits = 0
    caches = [OrderedDict() for _ in range(trace.model.layers)]
    requests = list(dict.fromkeys(trace.request_T.tolist()))
    order = sorted(range(trace.tokens), key=lambda t: (requests.index(trace.request_T[t]), trace.position_T[t]))
    for token in order:
        for layer, cache in enumerate(caches):
            experts = trace.expert_ids_TLC[token, layer, : trace.model.top_k].tolist()
            hits += sum(expert in cache for expert in experts)
            for expert in reversed(experts):
                cache[expert] = True
                cache.move_to_end(expert)
            while len(cache) > slots:
                cache.popitem(last=False)
    return hits / (trace.tokens * trace.model.layers * trace.model.top_k)


@given(trace=traces())
def test_the_stack_distances_are_those_of_a_cache(trace):
    decode_T = trace.phase_T == DECODE
    cache = expert_cache(trace)
    decoded = trace.take(decode_T) if decode_T.any() else trace
    for slots in range(1, trace.model.experts + 1):
        assert cache.hit(slots) == pytest.approx(lru_by_hand(decoded, slots))


@given(trace=traces())
def test_laws(trace):
    cache, active = expert_cache(trace), active_set(trace)
    assert (np.diff(cache.hit_LM, axis=1) >= 0).all()
    assert (cache.hit_LM <= 1).all()
    assert cache.loaded_bytes(trace.model.experts) <= cache.loaded_bytes(1) <= cache.uncached_bytes
    for batch, active_L in zip(active.batch_B, active.active_BL, strict=True):
        most = min(trace.model.experts, batch * trace.model.top_k)
        assert all(trace.model.top_k <= value <= most + 1e-9 for value in active_L)
    for reuse_L in (*active.reuse_BL, *active.reuse_any_BL):
        assert reuse_L is None or all(0 <= value <= 1 + 1e-9 for value in reuse_L)
    json.dumps([cache.to_json(), active.to_json()], allow_nan=False)


def test_tokens_that_were_decoded_count_where_there_are_some():
    phase_T = np.array([PREFILL, PREFILL, DECODE, DECODE], np.uint8)
    trace = trace_of([[[0]], [[1]], [[2]], [[2]]], model=tiny_model(layers=1, top_k=1), phase_T=phase_T)
    assert expert_cache(trace).hit(1) == 0.5
    assert active_set(trace).reuse_BL[0] == (1.0,)


def test_more_experts_than_recorded_are_refused():
    trace = trace_of([[[0, 1]]], model=tiny_model(layers=1))
    for analyse in (active_set, expert_cache):
        with pytest.raises(InputError, match=r"top_k 3, but it recorded 2 candidates a token; use top_k 1 to 2"):
            analyse(trace, top_k=3)


def with_nulls():
    """Top 2 of 2 experts and 2 null ones (2, 3): tokens 0 2 | 1 0 | 3 2 | 0 3 of one request."""
    ids = np.array([[0, 2], [1, 0], [3, 2], [0, 3]])[:, None]
    return trace_of(ids, model=tiny_model(layers=1, experts=2, null_experts=2))


def test_null_experts_are_never_active():
    found = active_set(with_nulls())
    # 1, 2, 0 and 1 experts; a token uses each of the four by half.
    assert found.active_BL[0] == pytest.approx((1,))
    assert found.uniform_B[0] == pytest.approx(1)
    # After {0} come {0, 1} (a half was active before), none (counts as 0) and {0} (not active before).
    assert found.reuse_BL[0] == pytest.approx((1 / 6,))


def test_null_experts_take_no_place_of_a_cache():
    cache = expert_cache(with_nulls())
    # Pairs 0 | 1 0 | 0: the second 0 is hit at depth 0, the third at depth 1, as the best of a token goes last: 1 0.
    assert cache.hit_LM.tolist() == [[1 / 4, 2 / 4]]
    assert cache.pairs_per_token == 1
    assert cache.hit(2) == 0.5


def test_a_cache_of_null_experts_alone_is_refused():
    trace = trace_of(np.full((3, 1, 1), 2), model=tiny_model(layers=1, experts=2, top_k=1, null_experts=1))
    with pytest.raises(InputError, match=r"every pair is a null expert's"):
        expert_cache(trace)
    assert active_set(trace).active_BL[0] == (0,)


def test_null_experts_change_nothing_for_the_others():
    trace = synthetic_trace(tiny_model(experts=8), tokens=96, zipf=0.5, seed=0, tokens_per_request=32)
    ids_TLC = np.insert(trace.expert_ids_TLC, 1, 8, axis=2)
    nulls = trace_of(
        ids_TLC,
        model=tiny_model(experts=8, top_k=3, null_experts=1),
        request_T=trace.request_T,
        position_T=trace.position_T,
    )
    np.testing.assert_allclose(expert_cache(nulls).hit_LM, expert_cache(trace).hit_LM)
    assert active_set(nulls).active_BL == active_set(trace).active_BL
    assert active_set(nulls).reuse_any_BL == active_set(trace).reuse_any_BL

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_strategies import tiny_model, trace_of, traces

from traces.errors import InputError
from traces.formats.npz import import_npz
from traces.presets import PRESETS
from traces.specialisation import SPECIALIST_LIFT, mutual_information_bits, specialisation, total_variation


def domain_trace(ids_TK, domain_T, *, request_T=None, experts=4, **columns):
    """One layer; each token is a request of its own unless said."""
    ids_TK = np.asarray(ids_TK)
    tokens = len(ids_TK)
    return trace_of(
        ids_TK[:, None, :],
        model=tiny_model(layers=1, experts=experts, top_k=ids_TK.shape[1]),
        request_T=np.arange(tokens, dtype=np.int32) if request_T is None else np.asarray(request_T, np.int32),
        domains=("prose", "code", "maths"),
        domain_T=np.asarray(domain_T, np.uint8),
        **columns,
    )


def random_trace(*, requests, tokens_each, seed, own_experts):
    """Requests in two domains; each uses two favourite experts, its own or those of its domain."""
    rng = np.random.default_rng(seed)
    domain_R = np.arange(requests) % 2
    favourite_R = rng.integers(0, 8, requests) if own_experts else 4 * domain_R + rng.integers(0, 4, requests)
    request_T = np.repeat(np.arange(requests), tokens_each)
    ids_T1 = np.where(rng.random(request_T.size) < 0.7, favourite_R[request_T], rng.integers(0, 8, request_T.size))
    return domain_trace(ids_T1[:, None], domain_R[request_T], request_T=request_T, experts=8)


def test_numbers_a_person_can_check():
    # prose: experts 0, 0, 0, 1; code: 2, 2, 2, 1. Loads 3, 2, 3, 0 of 8.
    found = specialisation(domain_trace([[0], [0], [0], [1], [2], [2], [2], [1]], [0, 0, 0, 0, 1, 1, 1, 1]))
    assert found.domains == ("prose", "code")
    assert found.load_DLE.tolist() == [[[3, 1, 0, 0]], [[0, 1, 3, 0]]]
    # prose to all: (|3/4 - 3/8| + 0 + |0 - 3/8|) / 2; between the two: (3/4 + 3/4) / 2
    assert found.tv_DL.tolist() == [[0.375], [0.375]]
    assert found.tv_pair_mean_L.tolist() == found.tv_pair_max_L.tolist() == [0.75]
    # 1 bit of the 6 pairs whose expert tells the domain, none of the other 2
    assert found.entropy_bits == 1
    assert found.information_L.tolist() == pytest.approx([0.75])
    # All of expert 0 is prose, half of the tokens: lift 2; expert 1 serves both alike.
    assert [(s.expert, s.domain, s.share, s.lift) for s in found.specialists] == [(0, "prose", 1, 2), (2, "code", 1, 2)]


def test_a_request_that_is_alike_inside_is_one_observation():
    # 40 requests of 50 tokens with favourite experts of their own: domains say nothing, however many tokens there are.
    trace = random_trace(requests=40, tokens_each=50, seed=1, own_experts=True)
    whole = specialisation(trace)
    assert whole.p_L[0] > 0.05
    assert abs(whole.information_above_chance_L[0]) < whole.information_chance_L[0]
    # As if each token were a request, the same trace would seem to specialise: the permutation must be of requests.
    apart = specialisation(replace(trace, request_T=np.arange(trace.tokens, dtype=np.int32)))
    assert apart.p_L[0] < 0.01
    assert apart.information_L[0] == whole.information_L[0]


def test_domains_with_experts_of_their_own_are_found():
    found = specialisation(random_trace(requests=200, tokens_each=20, seed=1, own_experts=False))
    assert found.p_L[0] == 1 / 200
    assert found.information_above_chance_L[0] > 3 * found.information_chance_L[0]
    assert (found.tv_DL > 2 * found.tv_chance_DL).all()
    assert {s.expert for s in found.specialists} == set(range(8))
    assert {s.domain for s in found.specialists if s.expert < 4} == {"prose"}


def test_chance_is_unbiased():
    """Over many traces without specialisation, what is above chance averages to 0 and p is even."""
    found = [
        specialisation(random_trace(requests=20, tokens_each=5, seed=seed, own_experts=True), permutations=49)
        for seed in range(60)
    ]
    above = np.array([f.information_above_chance_L[0] for f in found])
    assert abs(above.mean()) < 3 * above.std() / np.sqrt(above.size)
    assert np.mean([f.information_L[0] for f in found]) > 10 * abs(above.mean())
    assert 0.35 < np.mean([f.p_L[0] for f in found]) < 0.65


@pytest.mark.parametrize(
    ("domain_T", "request_T", "match"),
    [
        ([0, 0, 0], [0, 1, 2], r"3 requests of 1 domains .*record at least 2 domains"),
        ([0, 0, 1], [0, 0, 1], r"2 requests of 2 domains .*more requests than domains"),
    ],
)
def test_what_cannot_be_told_from_chance_is_refused(domain_T, request_T, match):
    with pytest.raises(InputError, match=match):
        specialisation(domain_trace([[0], [1], [2]], domain_T, request_T=request_T))


def test_a_trace_without_domains_is_refused():
    with pytest.raises(InputError, match=r"by hand has no domains; record text of several kinds"):
        specialisation(trace_of([[[0, 1]]], model=tiny_model(layers=1)))


@given(trace=traces())
def test_laws(trace):
    try:
        found = specialisation(trace, permutations=9)
    except InputError:
        requests = len({(r, d) for r, d in zip(trace.request_T, trace.domain_T, strict=True)}) if trace.domains else 0
        domains = 0 if trace.domain_T is None else np.unique(trace.domain_T).size
        assert domains < 2 or requests <= domains
        return
    assert (found.load_DLE.sum(axis=0) == trace.loads_LE()).all()
    for distances in (found.tv_DL, found.tv_chance_DL, found.tv_pair_mean_L, found.tv_pair_max_L):
        assert (distances >= 0).all()
        assert (distances <= 1 + 1e-9).all()
    assert (found.tv_pair_mean_L <= found.tv_pair_max_L + 1e-12).all()
    assert (found.information_L >= -1e-9).all()
    assert (found.information_L <= found.entropy_bits + 1e-9).all()
    assert ((found.p_L >= 1 / 10) & (found.p_L <= 1)).all()
    assert all(s.lift >= SPECIALIST_LIFT and s.share <= 1 for s in found.specialists)
    assert found.to_json() == specialisation(trace, permutations=9).to_json()
    json.dumps(found.to_json(), allow_nan=False)


@given(seed=st.integers(0, 2**32), domains=st.integers(1, 4), experts=st.integers(1, 6))
def test_information_is_of_both_sides_and_of_no_scale(seed, domains, experts):
    joint_DE = np.random.default_rng(seed).integers(0, 5, (domains, experts)) + np.eye(domains, experts)
    bits = mutual_information_bits(joint_DE)
    assert mutual_information_bits(joint_DE.T) == pytest.approx(bits, abs=1e-12)
    assert mutual_information_bits(7 * joint_DE) == pytest.approx(bits, abs=1e-12)
    assert -1e-12 <= bits <= np.log2(min(domains, experts)) + 1e-9
    assert mutual_information_bits(np.outer(joint_DE.sum(axis=1), joint_DE.sum(axis=0))) == pytest.approx(0, abs=1e-12)


def test_distance_is_one_where_nothing_is_shared():
    assert total_variation(np.array([1.0, 0, 0]), np.array([0, 0.5, 0.5])) == 1


def test_many_small_requests_are_permuted_less_often(monkeypatch):
    monkeypatch.setattr("traces.specialisation._PERMUTED_CELLS", 2 * 8 * 5)
    found = specialisation(domain_trace([[0]] * 8, [0, 1] * 4))
    assert found.permutations == 5


def test_recorded_domains(shared_data):
    trace = import_npz(shared_data / "traces/gptoss20b/gptoss20b_ship.npz", model=PRESETS["gpt-oss-20b"]).trace
    found = specialisation(trace)
    # Domains lie apart, but with 13 requests most of the distance is the requests' own.
    assert (found.tv_pair_mean_chance_L > 0.5 * found.tv_pair_mean_L).all()
    assert found.requests == 13


def test_null_experts_are_counted_as_experts():
    # 3 is the null expert behind three others: all of code goes there.
    trace = trace_of(
        np.array([0, 0, 1, 3, 3, 3])[:, None, None],
        model=tiny_model(layers=1, experts=3, top_k=1, null_experts=1),
        request_T=np.arange(6, dtype=np.int32),
        domains=("prose", "code"),
        domain_T=np.array([0, 0, 0, 1, 1, 1], np.uint8),
    )
    found = specialisation(trace)
    assert found.load_DLE.tolist() == [[[2, 1, 0, 0]], [[0, 0, 0, 3]]]
    assert found.information_L.tolist() == pytest.approx([1])
    assert (3, "code") in [(specialist.expert, specialist.domain) for specialist in found.specialists]

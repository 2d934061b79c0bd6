import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from trace_strategies import trace_of_requests, traces

from traces.batching import make_steps, split_requests
from traces.errors import InputError


def _tokens(steps):
    return [step.tokens_T.tolist() for step in steps]


def test_prefill_deals_requests_to_ranks_in_turn():
    # Requests 0-2, 3-4, 5-9: rank 0 holds 0 1 2 5 6 7 8 9, rank 1 holds 3 4. Only one step of 2 fills both.
    steps = make_steps(trace_of_requests([3, 2, 5]), phase="prefill", tokens_per_rank=2, ranks=2)
    assert _tokens(steps) == [[0, 1, 3, 4]]
    assert steps[0].source_rank_T.tolist() == [0, 0, 1, 1]
    assert _tokens(make_steps(trace_of_requests([3, 2, 5]), phase="prefill", tokens_per_rank=1, ranks=2)) == [
        [0, 3],
        [1, 4],
    ]


def test_decode_takes_each_token_of_a_step_from_another_stream():
    # 10 tokens, 4 streams: pieces of 2 tokens are 0 1 | 3 4 | 5 6 | 7 8 (2 and 9 are left over), dealt in turn.
    steps = make_steps(trace_of_requests([3, 2, 5]), phase="decode", tokens_per_rank=2, ranks=2)
    assert _tokens(steps) == [[0, 5, 3, 7], [1, 6, 4, 8]]
    assert steps[1].source_rank_T.tolist() == [0, 0, 1, 1]


def test_decode_pieces_are_as_short_as_the_streams_need():
    # 5 streams of 2 do not fit into 3 + 2 + 5 tokens (4 do), so each is 1 token long.
    steps = make_steps(trace_of_requests([3, 2, 5]), phase="decode", tokens_per_rank=5, ranks=1)
    assert _tokens(steps) == [[0, 1, 2, 3, 4]]


def test_limit_is_a_prefix():
    trace = trace_of_requests([8, 8])
    every = _tokens(make_steps(trace, phase="prefill", tokens_per_rank=2, ranks=2))
    assert len(every) == 4
    assert _tokens(make_steps(trace, phase="prefill", tokens_per_rank=2, ranks=2, limit=3)) == every[:3]


def test_a_mixed_trace_gives_only_the_phase_asked_for():
    trace = trace_of_requests([2, 3], phases=[0, 1])
    assert _tokens(make_steps(trace, phase="prefill", tokens_per_rank=1, ranks=1)) == [[0], [1]]
    assert _tokens(make_steps(trace, phase="decode", tokens_per_rank=1, ranks=1)) == [[2], [3], [4]]


def test_a_trace_of_one_phase_stands_in_for_the_other():
    trace = trace_of_requests([3], phases=[1])
    assert len(make_steps(trace, phase="prefill", tokens_per_rank=1, ranks=1)) == 3


@given(
    trace=traces(),
    phase=st.sampled_from(["prefill", "decode"]),
    tokens_per_rank=st.integers(1, 3),
    ranks=st.integers(1, 4),
)
def test_laws(trace, phase, tokens_per_rank, ranks):
    try:
        steps = make_steps(trace, phase=phase, tokens_per_rank=tokens_per_rank, ranks=ranks)
    except InputError:
        assume(False)
    used = np.concatenate([step.tokens_T for step in steps])
    assert np.unique(used).size == used.size
    assert used.min() >= 0
    assert used.max() < trace.tokens
    for step in steps:
        assert step.tokens_T.dtype == step.source_rank_T.dtype == np.int64
        assert step.source_rank_T.tolist() == np.repeat(np.arange(ranks), tokens_per_rank).tolist()
        assert step.tokens_T.size == ranks * tokens_per_rank


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phase": "prefill", "ranks": 4}, r"the 3 requests leave one with 0: use fewer ranks"),
        ({"phase": "prefill", "tokens_per_rank": 3}, r"3 requests leave one with 2"),
        ({"phase": "decode", "tokens_per_rank": 6}, r"need 12 streams .* there are 10: use fewer ranks"),
        ({"phase": "decode", "ranks": 0}, r"ranks is 0"),
        ({"phase": "decode", "tokens_per_rank": 0}, r"tokens_per_rank is 0"),
        ({"phase": "decode", "limit": 0}, r"limit is 0"),
    ],
)
def test_too_little_for_a_step_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        make_steps(trace_of_requests([3, 2, 5]), **{"tokens_per_rank": 2, "ranks": 2, **options})


def test_split_takes_whole_requests_in_order():
    parts = split_requests(trace_of_requests([3, 2, 5, 1]), (2, 1, 1))
    assert [part.request_T.tolist() for part in parts] == [[3, 3, 3, 2, 2], [1] * 5, [0]]


@given(trace=traces(), shares=st.lists(st.floats(0.1, 10), min_size=1, max_size=3))
def test_split_loses_nothing(trace, shares):
    try:
        parts = split_requests(trace, shares)
    except InputError:
        assume(False)
    assert sum(part.tokens for part in parts) == trace.tokens
    requests = [set(part.request_T.tolist()) for part in parts]
    assert sum(len(some) for some in requests) == len(set.union(*requests))
    for part in parts:
        assert part.tokens > 0


@pytest.mark.parametrize("shares", [(), (1, 0), (1, -1), (1, float("nan"))])
def test_shares_must_be_positive(shares):
    with pytest.raises(InputError, match="shares are"):
        split_requests(trace_of_requests([1, 1]), shares)


def test_an_empty_part_is_refused():
    with pytest.raises(InputError, match=r"2 requests split by \[1, 1, 1\] leave a part empty"):
        split_requests(trace_of_requests([1, 1]), (1, 1, 1))

"""What the tokens of a step look back on, by hand; (query, key) pairs add up whatever is done to them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_strategies import trace_of_requests

from traces.batching import Phase, Step, make_steps
from traces.context import Context
from traces.errors import InputError


def pairs(context: Context) -> Any:
    """(query, key) pairs of each rank: each new token sees what is cached and, on average, half of the new ones."""
    return context.requests_G * context.new_tokens_G * (context.cached_tokens_G + context.new_tokens_G / 2)


def contexts(sizes: list[int], *, phase: Phase = "prefill", tokens_per_rank: int, ranks: int = 1) -> list[Context]:
    """The context of each step of requests of these lengths."""
    trace = trace_of_requests(sizes, phases=[int(phase == "decode")] * len(sizes))
    steps = make_steps(trace, phase=phase, tokens_per_rank=tokens_per_rank, ranks=ranks)
    return [Context.of_step(trace, step, phase=phase, ranks=ranks) for step in steps]


def as_lists(context: Context) -> tuple[list[float], list[float], list[float]]:
    return context.requests_G.tolist(), context.new_tokens_G.tolist(), context.cached_tokens_G.tolist()


def test_a_later_chunk_of_a_prompt_looks_back_on_the_earlier_ones() -> None:
    # One prompt of 12 tokens in chunks of 4.
    assert [as_lists(c) for c in contexts([12], tokens_per_rank=4)] == [
        ([1], [4], [0]),
        ([1], [4], [4]),
        ([1], [4], [8]),
    ]


def test_requests_that_share_a_step_are_told_as_even_ones() -> None:
    """A prompt of 4 and the first 2 tokens of the next: 2 requests of 3 tokens.

    Pairs: 4 tokens see half of 4 each, 2 see half of 2: 8 + 2 = 10. Even ones would have 2 * 3 * 3 / 2 = 9 of their
    own, so that 1/6 of a token is cached.
    """
    first, second = contexts([4, 8], tokens_per_rank=6)
    assert as_lists(first)[:2] == ([2], [3])
    assert first.cached_tokens_G[0] == pytest.approx(1 / 6)
    # The other 6 tokens of the second prompt look back on 2.
    assert as_lists(second) == ([1], [6], [2])


def test_ranks_have_requests_of_their_own() -> None:
    # Requests go to ranks in turn: 3 and 3 tokens on rank 0, 6 on rank 1.
    (context,) = contexts([3, 6, 3], tokens_per_rank=6, ranks=2)
    assert as_lists(context) == ([2, 1], [3, 6], [0, 0])


def test_at_decode_each_token_is_a_request_that_looks_back_on_its_position() -> None:
    # Two streams of 3 tokens on one rank, at positions 0, 1, 2.
    assert [as_lists(c) for c in contexts([3, 3], phase="decode", tokens_per_rank=2)] == [
        ([2], [1], [0]),
        ([2], [1], [1]),
        ([2], [1], [2]),
    ]
    # Positions 0 and 3 of one request cut into two streams: 1.5 on average.
    assert as_lists(contexts([6], phase="decode", tokens_per_rank=2)[0]) == ([2], [1], [1.5])


def test_a_cache_of_ones_own_is_spread_over_the_requests_of_a_rank() -> None:
    trace = trace_of_requests([3, 6, 3])
    (step,) = make_steps(trace, phase="prefill", tokens_per_rank=6, ranks=2)
    given_kv = Context.of_step(trace, step, phase="prefill", ranks=2, kv_tokens_per_rank=100)
    assert as_lists(given_kv) == ([2, 1], [3, 6], [50, 100])


def test_a_rank_without_tokens_has_no_requests() -> None:
    trace = trace_of_requests([2])
    step = Step(tokens_T=np.arange(2), source_rank_T=np.zeros(2, dtype=np.int64))
    context = Context.of_step(trace, step, phase="prefill", ranks=2)
    assert as_lists(context) == ([1, 0], [2, 1], [0, 0])


def test_the_same_on_all_ranks() -> None:
    context = Context.even("decode", ranks=2, requests=4, new_tokens=1, cached_tokens=9)
    assert as_lists(context) == ([4, 4], [1, 1], [9, 9])


def test_halves_of_several_requests_have_half_of_them() -> None:
    assert as_lists(Context.even("prefill", ranks=1, requests=3, new_tokens=8, cached_tokens=5).halved()) == (
        [1.5],
        [8],
        [5],
    )


def test_halves_of_one_request_look_back_on_each_other() -> None:
    # 8 tokens that look back on 5: the first 4 on 5, the other 4 on 9, on average 7.
    assert as_lists(Context.even("prefill", ranks=1, requests=1, new_tokens=8, cached_tokens=5).halved()) == (
        [1],
        [4],
        [7],
    )


def test_a_padded_step_has_requests_that_look_back_on_nothing() -> None:
    # 6 requests of 10 tokens and 3 of 20 in a graph of 8.
    context = Context(
        phase="decode",
        requests_G=np.array([6.0, 3.0]),
        new_tokens_G=np.ones(2),
        cached_tokens_G=np.array([10.0, 20.0]),
    )
    assert as_lists(context.padded(8)) == ([8, 8], [1, 1], [7.5, 7.5])
    with pytest.raises(InputError, match="only decode steps run in buckets of a fixed size"):
        Context.even("prefill", ranks=1, requests=1, new_tokens=8, cached_tokens=0).padded(8)


def test_ranks_that_work_together_have_the_requests_of_all() -> None:
    # Groups of two: 2 requests of 3 tokens and 1 of 6; 1 of 4 and none.
    context = Context(
        phase="prefill",
        requests_G=np.array([2.0, 1.0, 1.0, 0.0]),
        new_tokens_G=np.array([3.0, 6.0, 4.0, 1.0]),
        cached_tokens_G=np.array([5.0, 8.0, 10.0, 0.0]),
    )
    shared = context.shared(2)
    # 12 tokens of 3 requests. 6 see 5 + 1.5, 6 see 8 + 3: 8.75 on average, of which 2 are of the 4 new ones.
    assert as_lists(shared) == ([3, 3, 1, 1], [4, 4, 4, 4], [6.75, 6.75, 10, 10])
    assert context.shared(1) is context


sizes_of_requests = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(sizes=sizes_of_requests, ranks=st.integers(1, 3), seed=st.integers(0, 99))
def test_tokens_and_pairs_add_up(sizes: list[int], ranks: int, seed: int) -> None:
    """Of any tokens: a token at position p sees p earlier ones and, on average, half of itself."""
    trace = trace_of_requests(sizes)
    rng = np.random.default_rng(seed)
    tokens_T = rng.permutation(trace.tokens)[: rng.integers(1, trace.tokens + 1)]
    step = Step(tokens_T=tokens_T, source_rank_T=np.sort(rng.integers(0, ranks, tokens_T.size)))
    context = Context.of_step(trace, step, phase="prefill", ranks=ranks)
    for rank in range(ranks):
        own_T = tokens_T[step.source_rank_T == rank]
        assert context.requests_G[rank] == np.unique(trace.request_T[own_T]).size
        if own_T.size:
            assert context.requests_G[rank] * context.new_tokens_G[rank] == pytest.approx(own_T.size)
        seen = (trace.position_T[own_T] + 0.5).sum()
        # Tokens that do not follow one another may see less than as many that do.
        assert pairs(context)[rank] == pytest.approx(seen) or context.cached_tokens_G[rank] == 0


whole_contexts = st.builds(
    lambda rows: Context(
        phase="prefill",
        requests_G=np.array([float(row[0]) for row in rows]),
        new_tokens_G=np.array([float(row[1]) for row in rows]),
        cached_tokens_G=np.array([float(row[2]) for row in rows]),
    ),
    st.lists(st.tuples(st.integers(1, 5), st.integers(2, 64), st.integers(0, 500)), min_size=4, max_size=4),
)


@given(context=whole_contexts)
def test_two_halves_are_the_whole(context: Context) -> None:
    half = context.halved()
    np.testing.assert_allclose(2 * half.requests_G * half.new_tokens_G, context.requests_G * context.new_tokens_G)
    np.testing.assert_allclose(2 * pairs(half), pairs(context))


@given(context=whole_contexts, group=st.sampled_from([1, 2, 4]))
def test_a_group_has_the_tokens_of_its_ranks(context: Context, group: int) -> None:
    shared = context.shared(group)
    tokens_G = context.requests_G * context.new_tokens_G
    shared_tokens_G = shared.requests_G * shared.new_tokens_G
    np.testing.assert_allclose(shared_tokens_G, np.repeat(tokens_G.reshape(-1, group).sum(axis=1), group))
    # Requests of very unequal lengths may have to be told as even ones that look back on nothing.
    together = np.repeat(pairs(context).reshape(-1, group).sum(axis=1), group)
    exact_G = np.isclose(pairs(shared), together)
    assert (exact_G | (shared.cached_tokens_G == 0)).all()

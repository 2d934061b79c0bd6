"""Batching: which recorded tokens run together in a step, and which rank holds each of them before dispatch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from traces.errors import InputError
from traces.trace import DECODE, PREFILL, RoutingTrace

Phase = Literal["prefill", "decode"]
PHASE_CODES: dict[Phase, int] = {"prefill": PREFILL, "decode": DECODE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The tokens of one step, rank 0's first, then rank 1's, the same number each.

    `tokens_T` int64: indices into the trace; `source_rank_T` int64: the rank that holds each token.
    """

    tokens_T: NDArray[np.int64]
    source_rank_T: NDArray[np.int64]


def make_steps(
    trace: RoutingTrace, *, phase: Phase, tokens_per_rank: int, ranks: int, limit: int | None = None
) -> list[Step]:
    """Cut the trace into steps of `tokens_per_rank` tokens on each of `ranks` ranks; at most `limit` steps.

    prefill: requests go to ranks in turn, in order of appearance; each rank runs its requests one after
    another, and step j takes the j-th run of `tokens_per_rank` tokens from every rank.

    decode: each token of a step is of another stream, and step j takes the j-th token of each stream. The
    recorded requests are cut into equal consecutive pieces, as long as they can be and still give the
    `ranks * tokens_per_rank` streams, which go to ranks in turn. So streams of one request run side by side, and
    more run at once than were recorded: they are more alike than those of as many requests would be.

    A trace that holds both phases gives only the tokens of `phase`; one that holds a single phase stands in for
    the other. Tokens that fill no whole step are left out. Errors: `InputError` where they do not fill one.
    """
    for name, value in (("tokens_per_rank", tokens_per_rank), ("ranks", ranks), ("limit", limit)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    requests = _requests(trace, phase)
    if phase == "prefill":
        queues = [np.concatenate([np.empty(0, np.int64), *requests[rank::ranks]]) for rank in range(ranks)]
        shortest = min(queue.size for queue in queues)
        if shortest < tokens_per_rank:
            raise InputError(
                f"prefill steps of {tokens_per_rank} tokens on each of {ranks} ranks need as many from every rank; "
                f"the {len(requests)} requests leave one with {shortest}: "
                "use fewer ranks, fewer tokens a rank, or a longer trace"
            )
        steps = shortest // tokens_per_rank
        tokens_JGT = np.stack([queue[: steps * tokens_per_rank].reshape(steps, -1) for queue in queues], axis=1)
    else:
        streams = ranks * tokens_per_rank
        pieces_NJ = _equal_pieces(requests, streams)
        tokens_JGT = pieces_NJ.reshape(tokens_per_rank, ranks, -1).transpose(2, 1, 0)
    source_rank_T = np.repeat(np.arange(ranks), tokens_per_rank)
    return [Step(tokens_T=tokens_GT.reshape(-1), source_rank_T=source_rank_T) for tokens_GT in tokens_JGT[:limit]]


def split_requests(trace: RoutingTrace, shares: Sequence[float]) -> list[RoutingTrace]:
    """Split by whole requests, in order of appearance, into consecutive parts by share of the requests.

    Shares are relative: (2, 1, 1) halves the requests and then halves the rest. So a plan is made on earlier
    requests than those it is tuned and validated on. Errors: `InputError` where a part would be empty.
    """
    if not shares or not all(0 < share < math.inf for share in shares):
        raise InputError(f"shares are {list(shares)}; give a number above 0 for each part")
    requests = _by_request(trace)
    edges = np.rint(np.cumsum([0.0, *shares]) / sum(shares) * len(requests)).astype(int)
    if (np.diff(edges) == 0).any():
        raise InputError(
            f"trace {trace.source}: {len(requests)} requests split by {list(shares)} leave a part empty; "
            "use more even shares, fewer parts, or a trace of more requests"
        )
    return [trace.take(np.sort(np.concatenate(requests[start:end]))) for start, end in pairwise(edges)]


def _requests(trace: RoutingTrace, phase: Phase) -> list[NDArray[np.int64]]:
    """The trace's tokens of `phase` by request; all of them if the trace has only one phase."""
    in_phase_T = trace.phase_T == PHASE_CODES[phase]
    requests = _by_request(trace)
    if not in_phase_T.any():
        return requests
    return [tokens for request in requests if (tokens := request[in_phase_T[request]]).size]


def _by_request(trace: RoutingTrace) -> list[NDArray[np.int64]]:
    """The indices of each request's tokens, by position; requests in order of appearance."""
    _, first_R, request_T = np.unique(trace.request_T, return_index=True, return_inverse=True)
    appearance_R = np.argsort(np.argsort(first_R))
    order_T = np.lexsort((trace.position_T, appearance_R[request_T]))
    ends_R = np.cumsum(np.bincount(appearance_R[request_T]))
    return np.split(order_T.astype(np.int64), ends_R[:-1])


def _equal_pieces(requests: list[NDArray[np.int64]], count: int) -> NDArray[np.int64]:
    """The first `count` pieces [N, J] when requests are cut into the longest equal pieces that give so many."""
    size_R = np.array([request.size for request in requests])
    if size_R.sum() < count:
        raise InputError(
            f"decode steps need {count} streams (ranks × tokens a rank), each of at least one token; "
            f"there are {size_R.sum()}: use fewer ranks, fewer tokens a rank, or a longer trace"
        )
    longest = min(int(size_R.sum()) // count, int(size_R.max()))
    length = next(length for length in range(longest, 0, -1) if (size_R // length).sum() >= count)
    pieces = [request[: request.size // length * length].reshape(-1, length) for request in requests]
    return np.concatenate(pieces)[:count]

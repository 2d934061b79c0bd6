"""Flows that share links max-min fairly: how long an all-to-all takes where links contend.

F flows (rank pairs with bytes left) · X links that can be the slowest (`Routes.loaded`). At any time each flow has a
link that is full and on which no flow is faster; when a flow ends, the others speed up.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from cost_models.cluster import Cluster

BATCH = 0.03  # share of the flows under way that end as one batch; measured by benchmarks/flows.py
_SAME = 1e-9  # ends that are this close, as a share of the time so far, are one


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """How far an all-to-all came: seconds that passed and `remaining_GG` bytes [source, destination]."""

    elapsed_s: float
    remaining_GG: NDArray[np.float64]


def max_min_makespan_s(cluster: Cluster, bytes_GG: NDArray[Any], *, batch: float = BATCH) -> float:
    """Seconds until `bytes_GG` [source, destination] have moved by max-min fair flows, one for each rank pair.

    Never less than the port-load bound, and at most the largest sum, over the links of a path, of each link's own
    time: a flow always waits for one of them. Where each flow crosses one link it is the bound, and where each crosses
    two (a non-blocking network) even traffic meets it; uneven traffic took up to 5% longer where all ranks send to all,
    and 12% where few do. `batch` is the share of the flows under way whose ends are one event: 0 simulates each alone,
    and the default is within 0.1% of that (`benchmarks/flows.py`). Latency is the largest of a path in use, once. Bytes
    a rank sends to itself take no time.
    """
    # No rounding may take a simulation below the bound.
    return max(_transfer(cluster, bytes_GG, np.inf, batch).elapsed_s, cluster.all_to_all_s(bytes_GG))


def transfer(cluster: Cluster, bytes_GG: NDArray[Any], until_s: float) -> Transfer:
    """What `max_min_makespan_s` has done after `until_s` seconds, to go on with other links.

    Latency is in `elapsed_s` once everything has moved: the last bytes are then on their way and arrive. So a link
    that changes at 2 s gives `half = transfer(before, bytes_GG, 2.0)`, then
    `half.elapsed_s + max_min_makespan_s(after, half.remaining_GG)`.
    """
    return _transfer(cluster, bytes_GG, until_s, BATCH)


def _transfer(cluster: Cluster, bytes_GG: NDArray[Any], until_s: float, batch: float) -> Transfer:
    remaining_GG = np.array(bytes_GG, dtype=np.float64)
    np.fill_diagonal(remaining_GG, 0.0)
    if cluster.ranks == 1 or cluster.graph.number_of_edges() == 0:
        return Transfer(elapsed_s=0.0, remaining_GG=np.zeros_like(remaining_GG))
    routes = cluster.routes
    pair_F = np.flatnonzero(remaining_GG)
    left_F = remaining_GG.ravel()[pair_F]
    start_F, link_Y = _crossings(pair_F, routes.loaded.start_P, routes.loaded.link_Y)
    elapsed_s = _drain(left_F, start_F, link_Y, routes.links.bandwidth_X, until_s, batch)
    remaining_GG.flat[pair_F] = left_F
    if not left_F.any():
        elapsed_s += float(routes.latency_P[pair_F].max(initial=0.0))
    return Transfer(elapsed_s=elapsed_s, remaining_GG=remaining_GG)


@numba.njit(cache=True)
def _crossings(pair_F: Any, start_P: Any, link_Y: Any) -> Any:
    """The links of the flows' pairs alone, in the same form; unsigned, so that no index is looked at for its sign."""
    start_F = np.zeros(pair_F.size + 1, dtype=np.int64)
    for f in range(pair_F.size):
        start_F[f + 1] = start_F[f] + start_P[pair_F[f] + 1] - start_P[pair_F[f]]
    crossed_Y = np.empty(start_F[-1], dtype=np.uint32)
    for f in range(pair_F.size):
        crossed_Y[start_F[f] : start_F[f + 1]] = link_Y[start_P[pair_F[f]] : start_P[pair_F[f] + 1]]
    return start_F, crossed_Y


@numba.njit(cache=True)
def _drain(left_F: Any, start_F: Any, link_Y: Any, bandwidth_X: Any, until_s: float, batch: float) -> float:
    """Seconds until all flows have ended, at most `until_s`; takes what moved from `left_F`.

    In rounds: (1) fair rates; (2) the time at which the first `batch` of the flows have ended at these rates; (3) the
    bytes that each flow moves in that time, shared fairly too: what a flow that ends leaves of its share goes to others
    on its links, as if it had ended evenly over the round. With one flow in a batch rates hold and there is no (3).
    """
    first_X, flow_Y = _by_link(start_F, link_Y, bandwidth_X.size)
    size_X = first_X[1:] - first_X[:-1]
    active, rate_F = np.arange(left_F.size), np.empty(left_F.size)
    elapsed = 0.0
    while active.size > 0 and elapsed < until_s:
        _share(left_F, 0.0, start_F, link_Y, first_X, size_X, flow_Y, bandwidth_X, rate_F)
        end_A = left_F[active] / rate_F[active]
        seconds = end_A.min()
        if batch * active.size >= 2:
            nth = int(batch * active.size) - 1
            last = np.partition(end_A, nth)[nth]
            if last > seconds + (elapsed + seconds) * _SAME:
                seconds = min(last, until_s - elapsed)
                _share(left_F, seconds, start_F, link_Y, first_X, size_X, flow_Y, bandwidth_X, rate_F)
        seconds = min(seconds, until_s - elapsed)
        elapsed += seconds
        count = 0
        for f in active:
            left_F[f] -= rate_F[f] * seconds
            if left_F[f] > rate_F[f] * elapsed * _SAME:
                active[count] = f
                count += 1
            else:
                left_F[f] = 0.0
        active = active[:count]
        for x in range(size_X.size):
            count = first_X[x]
            for y in range(first_X[x], first_X[x] + size_X[x]):
                if left_F[flow_Y[y]] > 0:
                    flow_Y[count] = flow_Y[y]
                    count += 1
            size_X[x] = count - first_X[x]
    return elapsed


@numba.njit(cache=True)
def _by_link(start_F: Any, link_Y: Any, links: int) -> Any:
    """The flows of each link."""
    first_X = np.zeros(links + 1, dtype=np.int64)
    for x in link_Y:
        first_X[x + 1] += 1
    first_X = np.cumsum(first_X)
    next_X = first_X[:-1].copy()
    flow_Y = np.empty(link_Y.size, dtype=np.uint32)
    for f in range(start_F.size - 1):
        for y in range(start_F[f], start_F[f + 1]):
            flow_Y[next_X[link_Y[y]]] = f
            next_X[link_Y[y]] += 1
    return first_X, flow_Y


@numba.njit(cache=True)
def _share(
    left_F: Any,
    seconds: float,
    start_F: Any,
    link_Y: Any,
    first_X: Any,
    size_X: Any,
    flow_Y: Any,
    bandwidth_X: Any,
    rate_F: Any,
) -> None:
    """Max-min fair rates into `rate_F`, by progressive filling: the link with the least for each flow is full first.

    With `seconds` above 0 no flow takes more than lets it end in them. What a link has for each of its flows only
    grows as others are settled, so that the heap's old values are bounds.
    """
    free_X, open_X = bandwidth_X.copy(), size_X.copy()
    fair_X = np.empty(free_X.size)
    heap = np.empty(free_X.size, dtype=np.int64)
    waiting = 0
    for x in range(free_X.size):
        if open_X[x] > 0:
            fair_X[x] = free_X[x] / open_X[x]
            heap[waiting] = x
            waiting += 1
    for place in range(waiting // 2 - 1, -1, -1):
        _sift_down(heap, waiting, place, fair_X)
    is_open_F = np.ones(left_F.size, dtype=np.bool_)
    while waiting > 0:
        x = heap[0]
        if open_X[x] > 0:
            fair = free_X[x] / open_X[x]
            if fair > fair_X[x]:
                fair_X[x] = fair
                _sift_down(heap, waiting, 0, fair_X)
                continue
            fair = fair_X[x]
            before = open_X[x]
            if seconds > 0:
                for y in range(first_X[x], first_X[x] + size_X[x]):
                    f = flow_Y[y]
                    if is_open_F[f] and left_F[f] <= fair * seconds:
                        is_open_F[f] = False
                        rate_F[f] = left_F[f] / seconds
                        _take(rate_F[f], f, start_F, link_Y, free_X, open_X)
            if open_X[x] < before:
                continue  # they left more for the others
            for y in range(first_X[x], first_X[x] + size_X[x]):
                f = flow_Y[y]
                if is_open_F[f]:
                    is_open_F[f] = False
                    rate_F[f] = fair
                    _take(fair, f, start_F, link_Y, free_X, open_X)
        waiting -= 1
        heap[0] = heap[waiting]
        _sift_down(heap, waiting, 0, fair_X)


@numba.njit(cache=True)
def _take(rate: float, f: int, start_F: Any, link_Y: Any, free_X: Any, open_X: Any) -> None:
    """A flow's rate is settled: its links have that much less for one flow fewer."""
    for y in range(start_F[f], start_F[f + 1]):
        free_X[link_Y[y]] -= rate
        open_X[link_Y[y]] -= 1


@numba.njit(cache=True)
def _sift_down(heap: Any, size: int, place: int, key_X: Any) -> None:
    """Move the entry at `place` below all that are smaller; the smallest is `heap[0]`."""
    while True:
        child = 2 * place + 1
        if child + 1 < size and key_X[heap[child + 1]] < key_X[heap[child]]:
            child += 1
        if child >= size or key_X[heap[child]] >= key_X[heap[place]]:
            return
        heap[place], heap[child] = heap[child], heap[place]
        place = child

"""The paths of a cluster as compiled tables, and what traffic loads onto their links.

P rank pairs (source * G + destination) · X links, one for each direction. What crosses a pair's path is a row of a
sparse table: the links of pair p are `link_Y[start_P[p]:start_P[p + 1]]`.
"""

from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numba
import numpy as np
from numpy.typing import NDArray

Tier = Literal["scale_up", "scale_out", "fabric", "host"]
TIERS: tuple[Tier, ...] = get_args(Tier)
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_ROUNDING = 1 + 1e-12  # sums of bandwidths that are equal on paper


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """X links, each in one direction, from vertex `tail_X` to `head_X`; vertices 0..G-1 are the ranks.

    `names_X` ("gpu3->nic3"), `bandwidth_X` bytes/s, `latency_X` seconds, `tier_X`; `vertices` how many there are.
    """

    names_X: tuple[str, ...]
    tail_X: Ints
    head_X: Ints
    bandwidth_X: Floats
    latency_X: Floats
    tier_X: tuple[Tier, ...]
    vertices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossings:
    """Which links each rank pair crosses: those of pair p are `link_Y[start_P[p]:start_P[p + 1]]`, in their order."""

    start_P: Ints
    link_Y: NDArray[np.int32]

    def of(self, pair: int) -> NDArray[np.int32]:
        """The links of one pair."""
        return self.link_Y[self.start_P[pair] : self.start_P[pair + 1]]

    def only(self, kept_X: NDArray[np.bool_]) -> Self:
        """The same without the links that are not kept."""
        kept_Y = kept_X[self.link_Y]
        before_Y = np.concatenate(([0], np.cumsum(kept_Y)))
        return type(self)(start_P=before_Y[self.start_P], link_Y=self.link_Y[kept_Y])


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """The path of every rank pair: all its links, those that can be a bottleneck, and its latency.

    A link that can carry whatever can reach it, or whatever can leave it, is never slower than those others. `paths`
    has every link, `loaded` only the ones that can be the slowest. On a non-blocking network those are two for each
    pair, and both the port-load bound and max-min fair rates are what they are with all links.
    """

    ranks: int
    links: Links
    paths: Crossings
    loaded: Crossings
    latency_P: Floats

    @classmethod
    def of(cls, links: Links, ranks: int) -> Self:
        """The shortest paths by number of links, none through a rank where another way exists.

        Of paths that pass through equally few ranks (a GPU that forwards for a neighbour whose own NIC is lost, as
        NCCL's PXN does) the one with the fewest links is taken; of equals the one that leaves a vertex by the earlier
        tier, then by the earlier link. A pair that cannot reach each other raises `Unreachable`.
        """
        tier_rank_X = np.array([TIERS.index(tier) for tier in links.tier_X], dtype=np.int64)
        out_Y = np.lexsort((np.arange(tier_rank_X.size), tier_rank_X, links.tail_X))
        start_V = _starts(links.tail_X, links.vertices)
        via_GV = _trees(start_V, out_Y, links.head_X, ranks)
        start_P, link_Y = _unroll(via_GV, links.tail_X, ranks)
        unreachable = np.flatnonzero(start_P[1:] < start_P[:-1])
        if unreachable.size:
            raise Unreachable(*divmod(int(unreachable[0]), ranks))
        paths = Crossings(start_P=start_P, link_Y=link_Y)
        in_Y = np.argsort(links.head_X, kind="stable")
        used_X = np.bincount(link_Y, minlength=links.bandwidth_X.size) > 0
        kept_X = _bottlenecks(
            used_X,
            np.argsort(-links.bandwidth_X, kind="stable"),
            links.bandwidth_X,
            links.tail_X,
            links.head_X,
            (start_V, out_Y),
            (_starts(links.head_X, links.vertices), in_Y),
            ranks,
        )
        return cls(
            ranks=ranks,
            links=links,
            paths=paths,
            loaded=paths.only(kept_X),
            latency_P=_path_sums(start_P, link_Y, links.latency_X),
        )

    def load(self, bytes_LGG: NDArray[Any]) -> tuple[Floats, Floats]:
        """What L all-to-alls load onto each link that can be the slowest, [L, X], and their largest latency, L.

        `bytes_LGG` may be counts of any integer type, or floats: nothing is copied where it or its transpose
        (source and destination exchanged) is contiguous.
        """
        flip = not bytes_LGG.flags.c_contiguous and bytes_LGG.swapaxes(1, 2).flags.c_contiguous
        stored_LGG = bytes_LGG.swapaxes(1, 2) if flip else np.ascontiguousarray(bytes_LGG)
        load_LX = np.zeros((len(stored_LGG), self.links.bandwidth_X.size))
        latency_L = np.zeros(len(stored_LGG))
        _add_loads(stored_LGG, flip, self.loaded.start_P, self.loaded.link_Y, self.latency_P, load_LX, latency_L)
        return load_LX, latency_L


class Unreachable(Exception):  # noqa: N818 -- it is caught and told in the user's words, never shown
    """No path from rank `source` to rank `destination`."""

    def __init__(self, source: int, destination: int) -> None:
        super().__init__(source, destination)
        self.source = source
        self.destination = destination


def _starts(vertex_X: Ints, vertices: int) -> Ints:
    """Where each vertex's links begin in a list sorted by vertex; one more entry for the end."""
    return np.concatenate(([0], np.cumsum(np.bincount(vertex_X, minlength=vertices))))


@numba.njit(cache=True)
def _trees(start_V: Any, out_Y: Any, head_X: Any, ranks: int) -> Any:
    """The link by which the best path from each rank enters each vertex, [G, V]; -1: none.

    Breadth first, in rounds: ranks that a round reaches are ends of paths in it, and the next round goes on from them.
    """
    vertices = start_V.size - 1
    via_GV = np.full((ranks, vertices), -1, dtype=np.int32)
    seed = np.empty(vertices, dtype=np.int64)
    reached = np.empty(vertices, dtype=np.int64)
    queue = np.empty(vertices, dtype=np.int64)
    hops = np.empty(vertices, dtype=np.int64)
    for source in range(ranks):
        via = via_GV[source]
        hops[source] = 0
        seed[0] = source
        seeds, found = 1, 1
        while seeds > 0 and found < ranks:
            next_seed, head, tail, ends = 0, 0, 0, 0
            while next_seed < seeds or head < tail:
                # Both lists are in order of hops, so their merge is too.
                if head == tail or (next_seed < seeds and hops[seed[next_seed]] <= hops[queue[head]]):
                    vertex = seed[next_seed]
                    next_seed += 1
                else:
                    vertex = queue[head]
                    head += 1
                for y in range(start_V[vertex], start_V[vertex + 1]):
                    link = out_Y[y]
                    other = head_X[link]
                    if via[other] >= 0 or other == source:
                        continue
                    via[other] = link
                    hops[other] = hops[vertex] + 1
                    if other < ranks:
                        reached[ends] = other
                        ends += 1
                    else:
                        queue[tail] = other
                        tail += 1
            seeds = ends
            found += ends
            seed, reached = reached, seed
    return via_GV


@numba.njit(cache=True)
def _unroll(via_GV: Any, tail_X: Any, ranks: int) -> Any:
    """The trees as lists of links; a pair without a path has an end before its start."""
    start_P = np.zeros(ranks * ranks + 1, dtype=np.int64)
    for source in range(ranks):
        for destination in range(ranks):
            pair = source * ranks + destination
            vertex, length = destination, 0
            while vertex != source and length >= 0:
                link = via_GV[source, vertex]
                if link < 0:
                    length = -1
                else:
                    vertex = tail_X[link]
                    length += 1
            start_P[pair + 1] = start_P[pair] + length
            if length < 0:
                return start_P[: pair + 2], np.zeros(0, dtype=np.int32)
    link_Y = np.empty(start_P[-1], dtype=np.int32)
    for source in range(ranks):
        for destination in range(ranks):
            vertex, y = destination, start_P[source * ranks + destination + 1]
            while vertex != source:
                y -= 1
                link_Y[y] = via_GV[source, vertex]
                vertex = tail_X[link_Y[y]]
    return start_P, link_Y


@numba.njit(cache=True)
def _bottlenecks(
    used_X: Any, order_X: Any, bandwidth_X: Any, tail_X: Any, head_X: Any, leaving: Any, entering: Any, ranks: int
) -> Any:
    """The links that can be the slowest of a path, the widest tried first.

    A link goes where all that feeds it, or all that it feeds, is still kept and no wider in sum: so each that went is
    held by links that stay. Ranks send and receive themselves, so that their own links bound nothing.
    """
    kept_X = used_X.copy()
    for link in order_X:
        if not used_X[link]:
            continue
        for side in range(2):
            vertex = tail_X[link] if side == 0 else head_X[link]
            far = head_X[link] if side == 0 else tail_X[link]
            if vertex < ranks:
                continue
            start_V, link_Y = entering if side == 0 else leaving
            total, held = 0.0, True
            for y in range(start_V[vertex], start_V[vertex + 1]):
                other = link_Y[y]
                if not used_X[other] or (tail_X[other] if side == 0 else head_X[other]) == far:
                    continue  # no shortest path turns back
                held = held and kept_X[other]
                total += bandwidth_X[other]
            if held and total <= bandwidth_X[link] * _ROUNDING:
                kept_X[link] = False
                break
    return kept_X


@numba.njit(cache=True)
def _path_sums(start_P: Any, link_Y: Any, figure_X: Any) -> Any:
    sum_P = np.zeros(start_P.size - 1)
    for pair in range(sum_P.size):
        for y in range(start_P[pair], start_P[pair + 1]):
            sum_P[pair] += figure_X[link_Y[y]]
    return sum_P


@numba.njit(cache=True)
def _add_loads(
    stored_LGG: Any, flip: bool, start_P: Any, link_Y: Any, latency_P: Any, load_LX: Any, latency_L: Any
) -> None:
    """Add each pair's bytes to its links. Most pairs of a row share a link: their bytes are summed before it is loaded.

    Rows are in the outer loop, so that their part of the tables is worked out once for all layers.
    """
    layers, ranks = stored_LGG.shape[0], stored_LGG.shape[1]
    width = 0
    for pair in range(start_P.size - 1):
        width = max(width, start_P[pair + 1] - start_P[pair])
    # Runs of pairs that share their first link, second link, …; and the pairs of runs of one.
    run_from, run_to, run_link, lone, lone_link = np.empty((5, ranks * width), dtype=np.int32)
    for one in range(ranks):
        step, first = (ranks, one) if flip else (1, one * ranks)
        runs, lones, most_latency = 0, 0, 0.0
        for place in range(width):
            other = 0
            while other < ranks:
                link = _link_at(first + step * other, place, start_P, link_Y)
                end = other + 1
                while end < ranks and _link_at(first + step * end, place, start_P, link_Y) == link:
                    end += 1
                if link >= 0 and end - other == 1:
                    lone[lones], lone_link[lones] = other, link
                    lones += 1
                elif link >= 0:
                    run_from[runs], run_to[runs], run_link[runs] = other, end, link
                    runs += 1
                other = end
        for other in range(ranks):
            most_latency = max(most_latency, latency_P[first + step * other])
        for layer in range(layers):
            load_X, row = load_LX[layer], stored_LGG[layer, one]
            for index in range(runs):
                load_X[run_link[index]] += _sum(row, run_from[index], run_to[index])
            for index in range(lones):
                load_X[lone_link[index]] += row[lone[index]]
            if most_latency > latency_L[layer]:
                for other in range(ranks):
                    if row[other] != 0:
                        latency_L[layer] = max(latency_L[layer], latency_P[first + step * other])


@numba.njit(cache=True, inline="always")
def _link_at(pair: int, place: int, start_P: Any, link_Y: Any) -> int:
    y = start_P[pair] + place
    return int(link_Y[y]) if y < start_P[pair + 1] else -1


@numba.njit(cache=True)
def _sum(row: Any, start: int, end: int) -> float:
    """Four sums at once, so that no addition waits for the one before; their order is the same on every machine."""
    a, b, c, d = 0.0, 0.0, 0.0, 0.0
    fours = start + (end - start) // 4 * 4
    for index in range(start, fours, 4):
        a += row[index]
        b += row[index + 1]
        c += row[index + 2]
        d += row[index + 3]
    for index in range(fours, end):
        a += row[index]
    return (a + b) + (c + d)

"""Longest processing time: replicas to the heaviest experts, then heaviest first to the lightest rank."""

import heapq
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from router.placement.problem import PlacementProblem
from router.placement.replicate import replicate


def lpt(problem: PlacementProblem) -> NDArray[np.int64]:
    """Slots [L, S] that balance loads over ranks (Graham 1969).

    1. Redundant slots go, one by one, to the expert with the largest load per replica that is not on all ranks yet.
    2. Replicas, heaviest first, go to the lightest rank that has room and does not hold the expert yet;
       two replicas of one expert meet only where every rank has one.
    """
    return np.stack([_pack_layer(load_E, problem.ranks, problem.slots) for load_E in problem.even_where_none_LE])


def _pack_layer(load_E: NDArray[np.float64], ranks: int, slots: int) -> NDArray[np.int64]:
    replicas_E = replicate(load_E, slots, ranks)
    replica_load_E = load_E / replicas_E
    expert_of_item = np.repeat(np.arange(load_E.size), replicas_E)
    heaviest_first = expert_of_item[np.argsort(-replica_load_E[expert_of_item], kind="stable")]
    held: list[list[int]] = [[] for _ in range(ranks)]
    lightest = [(0.0, rank) for rank in range(ranks)]
    for expert in heaviest_first.tolist():
        passed_over = []
        while lightest and expert in held[lightest[0][1]]:
            passed_over.append(heapq.heappop(lightest))
        rank_load, rank = heapq.heappop(lightest) if lightest else passed_over.pop(0)
        held[rank].append(expert)
        if len(held[rank]) < slots // ranks:
            heapq.heappush(lightest, (rank_load + float(replica_load_E[expert]), rank))
        for entry in passed_over:
            heapq.heappush(lightest, entry)
    _separate(held)
    return np.array([expert for on_rank in held for expert in sorted(on_rank)])


def _separate(held: list[list[int]]) -> None:
    """Swap replicas until no rank holds an expert twice that another rank does not hold at all.

    The last replicas to be packed may have found room only beside their own kind. Each swap leaves fewer such pairs:
    the other rank has an expert that this one lacks, or it has one twice itself.
    """
    twice = next(_crowded(held), None)
    while twice is not None:
        rank, expert, other = twice
        swapped = min(held[other], key=lambda e: (e in held[rank], held[other].count(e) == 1, e))
        held[rank][held[rank].index(expert)] = swapped
        held[other][held[other].index(swapped)] = expert
        twice = next(_crowded(held), None)


def _crowded(held: list[list[int]]) -> Iterator[tuple[int, int, int]]:
    """Each rank that holds an expert twice, the expert, and a rank without it."""
    for rank, on_rank in enumerate(held):
        for expert in sorted(set(on_rank)):
            if on_rank.count(expert) > 1:
                yield from ((rank, expert, other) for other in range(len(held)) if expert not in held[other])

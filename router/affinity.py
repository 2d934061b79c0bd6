"""Affinity: to how many nodes and ranks a placement sends a token, and how often a token stays from layer to layer."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.placement.affinity_turns import replicas_in_turn
from router.placement.base import Placement


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Visits:
    """The mean number of nodes, and of ranks, that compute an expert of a token: [L] each.

    What the wire protocols send follows: `per_node` one copy a node over the network, `per_rank` one a rank.
    """

    nodes_L: NDArray[np.float64]
    ranks_L: NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Stays:
    """Of all pairs of a token's expert in a layer and one in the next, the share on one node, and on one rank: [L - 1].

    It cuts traffic where tokens stay with their experts from layer to layer (ExFlow, arXiv 2401.08383); where attention
    is data-parallel, as in the simulator, they go home in between and it cuts none.
    """

    nodes_L: NDArray[np.float64]
    ranks_L: NDArray[np.float64]


def visits(placement: Placement, ids_TLK: NDArray[np.integer], nodes: int) -> Visits:
    """Count the nodes and ranks of each token. An id that is none of the placement's experts is none."""
    rank_TLK = _ranks_of(placement, ids_TLK)
    ranks_per_node = placement.ranks // nodes
    return Visits(
        nodes_L=_distinct(np.where(rank_TLK < 0, -1, rank_TLK // ranks_per_node)).mean(axis=0),
        ranks_L=_distinct(rank_TLK).mean(axis=0),
    )


def stays(placement: Placement, ids_TLK: NDArray[np.integer], nodes: int) -> Stays:
    """Count the pairs that stay, over all tokens; between layers where no token has an expert, none does."""
    rank_TLK = _ranks_of(placement, ids_TLK)
    before_TLK, after_TLK = rank_TLK[:, :-1, :, None], rank_TLK[:, 1:, None, :]
    both_TLKK = (before_TLK >= 0) & (after_TLK >= 0)
    pairs_L = np.maximum(both_TLKK.sum(axis=(0, 2, 3)), 1)
    ranks_per_node = placement.ranks // nodes
    on_node_TLKK = both_TLKK & (before_TLK // ranks_per_node == after_TLK // ranks_per_node)
    on_rank_TLKK = both_TLKK & (before_TLK == after_TLK)
    return Stays(nodes_L=on_node_TLKK.sum(axis=(0, 2, 3)) / pairs_L, ranks_L=on_rank_TLKK.sum(axis=(0, 2, 3)) / pairs_L)


def _ranks_of(placement: Placement, ids_TLK: NDArray[np.integer]) -> NDArray[np.int64]:
    """The rank that computes each pair, -1 for none: [T, L, K]."""
    rank_TLK = np.full(ids_TLK.shape, -1, dtype=np.int64)
    for layer in range(placement.layers):
        ids_TK = ids_TLK[:, layer]
        replica_TK = replicas_in_turn(ids_TK, placement.replicas_LE[layer])
        known_TK = replica_TK >= 0
        slot_P = placement.expert_slots_LEX[layer][ids_TK[known_TK], replica_TK[known_TK]]
        rank_TLK[:, layer][known_TK] = slot_P // placement.slots_per_rank
    return rank_TLK


def _distinct(group_TLK: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many groups each token has, but for -1: [T, L]."""
    sorted_TLK = np.sort(group_TLK, axis=2)
    first_TLK = np.ones(sorted_TLK.shape, dtype=np.bool_)
    first_TLK[:, :, 1:] = sorted_TLK[:, :, 1:] != sorted_TLK[:, :, :-1]
    return np.asarray((first_TLK & (sorted_TLK >= 0)).sum(axis=2))

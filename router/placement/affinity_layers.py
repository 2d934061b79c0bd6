"""Affinity between layers: which node and rank of the next layer go by the name of which of this one.

Letters of this file: S replicas of a layer (one a slot), G ranks, N nodes, L layers.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from router.matching import matched_ranks


def follows_SS(one_TK: NDArray[np.int64], next_TK: NDArray[np.int64], replicas: int) -> NDArray[np.int64]:
    """How many tokens have each replica in a layer and each in the next: [S, S]. -1: none."""
    counts_SS = np.zeros((replicas, replicas), dtype=np.int64)
    for one_T in one_TK.T:
        for next_T in next_TK.T:
            both_T = (one_T >= 0) & (next_T >= 0)
            np.add.at(counts_SS, (one_T[both_T], next_T[both_T]), 1)
    return counts_SS


def pull_SG(
    rank_LS: NDArray[np.int64],
    follows: Sequence[NDArray[np.int64]],
    layer: int,
    ranks: int,
    nodes: int,
    node_cost: float,
) -> NDArray[np.float64]:
    """What each replica of a layer keeps on each rank, with the layers before and after as they lie: [S, G].

    Pairs with replicas on the rank, and `node_cost` times those on its node.
    """
    on_rank_GS = np.zeros((ranks, rank_LS.shape[1]))
    if layer > 0:
        np.add.at(on_rank_GS, rank_LS[layer - 1], follows[layer - 1])
    if layer < len(follows):
        np.add.at(on_rank_GS, rank_LS[layer + 1], follows[layer].T)
    on_node_NS = on_rank_GS.reshape(nodes, ranks // nodes, -1).sum(axis=1)
    return (on_rank_GS + node_cost * np.repeat(on_node_NS, ranks // nodes, axis=0)).T


def align(
    rank_LS: NDArray[np.int64], follows: Sequence[NDArray[np.int64]], ranks: int, nodes: int, node_cost: float
) -> NDArray[np.int64]:
    """The same sets of replicas on nodes and ranks, renamed so that most pairs of consecutive layers stay: [L, S].

    A pair counts 1 on one rank and `node_cost` on one node. Only names relative to the layer before count, so that each
    pair of layers is a problem of its own (`router.matching`).
    """
    aligned_LS = rank_LS.copy()
    for layer, counts_SS in enumerate(follows, start=1):
        pairs_GG = np.zeros((ranks, ranks))
        np.add.at(pairs_GG, (aligned_LS[layer - 1][:, None], rank_LS[layer][None, :]), counts_SS)
        new_name_G = np.empty(ranks, dtype=np.int64)
        new_name_G[matched_ranks(pairs_GG, nodes, node_cost)] = np.arange(ranks)
        aligned_LS[layer] = new_name_G[rank_LS[layer]]
    return aligned_LS

"""Traffic of dispatch and combine: bytes of a row on the wire, copies of a token, and what the busiest rank moves.

X is any shape of operations, G ranks, N nodes, L ranks of a node.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import comb, gammaln

from cost_models.devices import FP4_WITH_SCALES_BYTES
from cost_models.ops import Array, TokenExchange

Floats = NDArray[np.float64]
Direction = Literal["dispatch", "combine"]


def row_bytes(hidden: Array | int, dtype: str, direction: Direction) -> Floats:
    """Bytes on the wire of a token `hidden` wide, with its scales.

    Dispatch: FP8 has a 4-byte scale for 128 values (DeepEP), NVFP4 one byte for 16. Results are combined in BF16
    whatever was dispatched, but for `fp4`, the low-precision combine of TensorRT-LLM.

    >>> row_bytes(7168, "fp8", "dispatch").item(), row_bytes(7168, "fp8", "combine").item()
    (7392.0, 14336.0)
    """
    if direction == "combine":
        element = FP4_WITH_SCALES_BYTES if dtype == "fp4" else 2.0
    else:
        element = {"fp8": 1 + 4 / 128, "nvfp4": FP4_WITH_SCALES_BYTES, "fp4": FP4_WITH_SCALES_BYTES}.get(dtype, 2.0)
    return np.asarray(hidden, dtype=np.float64) * element


def chance_of_a_copy(experts: Array | int, top_k: Array | int, groups: Array | float) -> Floats:
    """Chance that one of `groups` equal groups holds any of the `top_k` of `experts` experts that a token chose evenly.

    1 − C(E − E/G, k) / C(E, k). Of 4 experts on 2 ranks, 2 are chosen: both on the other rank in 1 of 6 cases.

    >>> float(np.round(chance_of_a_copy(4, 2, 2), 4))  # 5/6
    0.8333
    """
    experts, top_k, groups = (np.asarray(x, dtype=np.float64) for x in (experts, top_k, groups))
    others = experts - experts / groups
    possible = others >= top_k
    others = np.where(possible, others, top_k)
    log_missed = gammaln(others + 1) - gammaln(others - top_k + 1) - gammaln(experts + 1) + gammaln(experts - top_k + 1)
    return np.asarray(np.where(possible, -np.expm1(np.minimum(log_missed, 0)), 1.0))


def even_chance(hidden: Array, experts: Array, top_k: Array, ranks: Array) -> Floats:
    """Chance of a copy for a rank where a table's tokens choose evenly."""
    return chance_of_a_copy(experts, top_k, ranks)


def chance_in_models(hidden: Array, experts: Array, top_k: Array, ranks: Array) -> Floats:
    """The same in tables that were measured with the routers of models: DeepSeek-V3's takes 4 of 8 groups of experts.

    Its 8 of 256 experts lie in 4 groups, of which a rank holds 8 / ranks.
    """
    chance = chance_of_a_copy(experts, top_k, ranks)
    groups, kept = 8, 4
    held = groups / np.asarray(ranks, dtype=np.float64)
    grouped = np.zeros_like(chance)
    for mine in range(1, kept + 1):  # of the kept groups lie on the rank, of all in `held`
        likely = comb(held, mine) * comb(groups - held, kept - mine) / comb(groups, kept)
        grouped += likely * chance_of_a_copy(128, top_k, kept / mine)
    return np.where((hidden == 7168) & (experts == 256) & (top_k == 8) & (held >= 1), grouped, chance)


def balanced_chance(hidden: Array, experts: Array, top_k: Array, ranks: Array) -> Floats:
    """The same where each token's experts lie on as many ranks as there can be."""
    return np.asarray(np.minimum(top_k / np.asarray(ranks, dtype=np.float64), 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Bytes through the busiest rank, shape X.

    `rows`: what its experts get, from itself too; `up`: to or from the other ranks of its node; `out`: of its node.
    """

    rows: Floats
    up: Floats
    out: Floats


def expected_load(operation: TokenExchange, row: Floats, rank_chance: Floats) -> Load:
    """The load of rows of `row` bytes where each rank has the same chance of a copy of a token.

    Normal mode: a copy to each node with chosen experts, passed on inside it to each rank with chosen experts.
    Low latency: a copy for each chosen expert, straight to its rank.
    """
    tokens, top_k, experts, ranks, nodes = sizes_of(operation)
    peers = ranks / nodes - 1
    if operation.mode == "low_latency":
        rows = tokens * top_k * row
        return Load(rows=rows, up=rows * peers / ranks, out=rows * (1 - 1 / nodes))
    rows = tokens * ranks * rank_chance * row
    return Load(
        rows=rows,
        up=rows * peers / (peers + 1),
        out=tokens * (nodes - 1) * chance_of_a_copy(experts, top_k, nodes) * row,
    )


def measured_load(operation: TokenExchange) -> Load:
    """The load of the real traffic in `bytes_XGG`, of which the larger of what a rank sends and receives counts.

    Ranks of a node are neighbours in G. In normal mode what goes to another node takes the NIC once for all its
    ranks, as often as even choice would have them share a copy; the rank of the same number over there passes it on.
    """
    assert operation.bytes_XGG is not None
    bytes_XGG = np.asarray(operation.bytes_XGG, dtype=np.float64)
    if operation.direction == "combine":  # the way back
        bytes_XGG = np.swapaxes(bytes_XGG, -1, -2)
    ranks = bytes_XGG.shape[-1]
    nodes = int(np.max(operation.nodes_X))
    local = ranks // nodes
    bytes_XNLNL = bytes_XGG.reshape(*bytes_XGG.shape[:-2], nodes, local, nodes, local)

    def busiest(sent_XNL: Floats, received_XNL: Floats) -> Floats:
        return np.asarray(np.maximum(sent_XNL, received_XNL).max(axis=(-1, -2)))

    sent_XNL, received_XNL = bytes_XNLNL.sum(axis=(-1, -2)), bytes_XNLNL.sum(axis=(-4, -3))
    same_node_XLLN = np.einsum("...nlnm->...lmn", bytes_XNLNL)
    to_node_XNLN = bytes_XNLNL.sum(axis=-1)
    own_node_XNL = np.einsum("...nln->...nl", to_node_XNLN)
    if operation.mode == "low_latency":
        own_rank_XNL = np.einsum("...lln->...nl", same_node_XLLN)
        from_own_node_XNL = np.moveaxis(same_node_XLLN.sum(axis=-3), -1, -2)
        return Load(
            rows=busiest(received_XNL, received_XNL),
            up=busiest(own_node_XNL - own_rank_XNL, from_own_node_XNL - own_rank_XNL),
            out=busiest(sent_XNL - own_node_XNL, received_XNL - from_own_node_XNL),
        )
    _, top_k, experts, _, _ = sizes_of(operation)
    shared = chance_of_a_copy(experts, top_k, nodes) / (local * chance_of_a_copy(experts, top_k, ranks))
    through_XNL = np.swapaxes(to_node_XNLN.sum(axis=-3), -1, -2)  # what the rank of this number in a node takes in
    same_number_XNL = np.einsum("...klnl->...nl", bytes_XNLNL)
    from_afar_XNL = through_XNL - own_node_XNL
    return Load(
        rows=busiest(received_XNL, received_XNL),
        up=busiest(through_XNL - same_number_XNL, received_XNL - same_number_XNL),
        out=busiest(sent_XNL - own_node_XNL, from_afar_XNL) * shared,
    )


def sizes_of(operation: TokenExchange) -> tuple[Floats, ...]:
    """Tokens, top k, experts, ranks and nodes as floats."""
    values = (operation.tokens_X, operation.top_k, operation.experts, operation.ranks_X, operation.nodes_X)
    return tuple(np.asarray(value, dtype=np.float64) for value in values)

"""Traffic of dispatch and combine: bytes of a row on the wire, copies of a token, and what the busiest rank moves.

X is any shape of operations, G ranks, N nodes, L ranks of a node.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import comb, gammaln

from cost_models.devices import FP4_WITH_SCALES_BYTES
from cost_models.ops import AllToAll, Array, TokenExchange
from cost_models.traffic import Traffic
from traces.errors import InputError

Floats = NDArray[np.float64]
Direction = Literal["dispatch", "combine"]

_KEPT_NODES = 4  # that a token goes to in DeepEP's test between nodes


def row_bytes(hidden: Array | int, dtype: str, direction: Direction) -> Floats:
    """Bytes on the wire of a token `hidden` wide, with its scales.

    Dispatch: FP8 has a 4-byte scale for 128 values (DeepEP), NVFP4 one byte for 16. Results are combined in BF16
    whatever was dispatched, but for `fp4`, the low-precision combine of TensorRT-LLM.

    >>> row_bytes(7168, "fp8", "dispatch").item(), row_bytes(7168, "fp8", "combine").item()
    (7392.0, 14336.0)
    """
    element = {"float32": 4.0, "fp4": FP4_WITH_SCALES_BYTES}
    if direction == "dispatch":
        element |= {"fp8": 1 + 4 / 128, "nvfp4": FP4_WITH_SCALES_BYTES}
    return np.asarray(hidden, dtype=np.float64) * element.get(dtype, 2.0)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Chance:
    """Chance that a rank, and a node, gets a copy of a token, shape X."""

    rank: Floats
    node: Floats


def even_chance(hidden: Array | int, experts: Array | int, top_k: Array | int, ranks: Array, nodes: Array) -> Chance:
    """Where tokens choose evenly."""
    return Chance(rank=chance_of_a_copy(experts, top_k, ranks), node=chance_of_a_copy(experts, top_k, nodes))


def chance_in_tests(hidden: Array, experts: Array, top_k: Array, ranks: Array, nodes: Array) -> Chance:
    """The same in DeepEP's test between nodes: a token keeps to the four nodes of the experts with the best scores.

    From `tests/test_internode.py` of DeepEP and its copy that made the tables (NVIDIA AIConfigurator,
    collector/deep_collector/test_internode.py): its groups are the nodes, of which `min(nodes, 4)` are kept. On 8 nodes
    a token so goes to 3.98 of them, not to 5.30. The tests inside a node and of the low-latency mode have no groups.
    """
    chance = even_chance(hidden, experts, top_k, ranks, nodes)
    rank, node = (np.array(np.broadcast_to(values, np.shape(ranks))) for values in (chance.rank, chance.node))
    for i in np.flatnonzero(np.asarray(nodes) > _KEPT_NODES):
        node_copies, rank_copies = copies_of_a_token(
            int(experts[i]), int(top_k[i]), int(ranks[i]), int(nodes[i]), _KEPT_NODES
        )
        rank[i], node[i] = rank_copies / ranks[i], node_copies / nodes[i]
    return Chance(rank=rank, node=node)


@cache
def copies_of_a_token(experts: int, top_k: int, ranks: int, nodes: int, kept_nodes: int) -> tuple[float, float]:
    """Nodes and ranks that a token goes to in DeepEP's test between nodes, on average over 20,000 drawn tokens.

    Scores are |N(0, 1)|. A node's is that of its best expert; a token keeps the `kept_nodes` best nodes, if there are
    more, and there its `top_k` best experts.
    """
    score_TE = np.abs(np.random.default_rng(0).standard_normal((20_000, experts)))
    if nodes > kept_nodes:
        score_TNE = score_TE.reshape(len(score_TE), nodes, -1)
        best_TN = score_TNE.max(axis=2)
        last_kept_T = np.sort(best_TN, axis=1)[:, -kept_nodes]
        score_TE = np.where((best_TN >= last_kept_T[:, None])[:, :, None], score_TNE, 0).reshape(score_TE.shape)
    ids_TK = np.argpartition(-score_TE, top_k, axis=1)[:, :top_k]

    def groups_of_a_token(groups: int) -> float:
        sorted_TK = np.sort(ids_TK // (experts // groups), axis=1)
        return float(1 + (np.diff(sorted_TK, axis=1) > 0).sum(axis=1).mean())

    return groups_of_a_token(nodes), groups_of_a_token(ranks)


def chance_in_models(hidden: Array, experts: Array, top_k: Array, ranks: Array, nodes: Array) -> Chance:
    """The same in tables measured with the routers of models: DeepSeek-V3's takes 4 of 8 groups of experts."""
    chance = even_chance(hidden, experts, top_k, ranks, nodes)
    grouped = (hidden == 7168) & (experts == 256) & (top_k == 8)
    return Chance(
        rank=np.where(grouped & (ranks <= 8), _chance_of_four_in_eight(top_k, ranks), chance.rank),
        node=np.where(grouped & (nodes <= 8), _chance_of_four_in_eight(top_k, nodes), chance.node),
    )


def _chance_of_four_in_eight(top_k: Array, places: Array) -> Floats:
    """Chance that one of `places` gets a copy where a token's experts, of 256, lie in 4 of 8 groups."""
    groups, kept = 8, 4
    held = groups / np.asarray(places, dtype=np.float64)
    chance = np.zeros(np.shape(held))
    for mine in range(1, kept + 1):  # of the kept groups lie there, of all in `held`
        likely = comb(held, mine) * comb(groups - held, kept - mine) / comb(groups, kept)
        chance = chance + likely * chance_of_a_copy(128, top_k, kept / mine)
    return chance


def balanced_chance(hidden: Array, experts: Array, top_k: Array, ranks: Array, nodes: Array) -> Chance:
    """The same where each token's experts lie on as many ranks, and nodes, as there can be."""
    rank, node = (
        np.asarray(np.minimum(top_k / np.asarray(places, dtype=np.float64), 1.0)) for places in (ranks, nodes)
    )
    return Chance(rank=rank, node=node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Bytes through the busiest rank, shape X.

    `rows`: what its experts get, from itself too; `up`: to or from the other ranks of its node; `out`: of its node.
    """

    rows: Floats
    up: Floats
    out: Floats


def expected_load(operation: TokenExchange, row: Floats, chance: Chance) -> Load:
    """The load of rows of `row` bytes where all ranks, and all nodes, have the same chance of a copy of a token.

    Normal mode: a copy to each node with chosen experts, passed on inside it to each rank with chosen experts.
    Low latency: a copy for each chosen expert, straight to its rank.
    """
    tokens, top_k, _, ranks, nodes = sizes_of(operation)
    peers = ranks / nodes - 1
    if operation.mode == "low_latency":
        rows = tokens * top_k * row
        return Load(rows=rows, up=rows * peers / ranks, out=rows * (1 - 1 / nodes))
    rows = tokens * ranks * chance.rank * row
    return Load(rows=rows, up=rows * peers / (peers + 1), out=tokens * (nodes - 1) * chance.node * row)


def measured_load(operation: TokenExchange, row: Floats) -> Load:
    """The load of the real traffic in rows of `row` bytes: the larger of what the busiest rank sends and receives.

    The way back loads the same links with the same rows in the other direction.
    """
    rows = _known(operation).rows
    return Load(rows=rows.computed * row, up=rows.up * row, out=rows.out * row)


def bytes_by_tier(operation: TokenExchange) -> dict[str, Floats]:
    """Bytes that cross links inside nodes (`scale_up`) and between them (`scale_out`), shape X, over all ranks."""
    rows = _known(operation).rows
    row = row_bytes(operation.hidden, operation.dtype, operation.direction)
    return {"scale_up": rows.all_up * row, "scale_out": rows.all_out * row}


def bytes_between_ranks(operation: AllToAll | TokenExchange) -> Array:
    """Bytes from source to destination rank of every leg, [..., G, G]; `InputError` where an exchange does not say."""
    if isinstance(operation, AllToAll):
        return operation.bytes_XGG
    row = row_bytes(operation.hidden, operation.dtype, operation.direction)
    bytes_XGG = _known(operation).legs_XGG() * row[..., None, None]
    return bytes_XGG if operation.direction == "dispatch" else np.swapaxes(bytes_XGG, -1, -2)


def _known(operation: TokenExchange) -> Traffic:
    if operation.traffic is None:
        raise InputError("this cost model prices an exchange by its traffic; give it")
    return operation.traffic


def sizes_of(operation: TokenExchange) -> tuple[Floats, ...]:
    """Tokens, top k, experts, ranks and nodes as floats."""
    values = (operation.tokens_X, operation.top_k, operation.experts, operation.ranks_X, operation.nodes_X)
    return tuple(np.asarray(value, dtype=np.float64) for value in values)

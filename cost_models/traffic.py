"""Traffic: rows between ranks, as a step really sends them, and what they load onto the busiest rank.

X is any shape of exchanges, G ranks, N nodes.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)  # no slots: counted once, priced for both ways and by every kernel
class Traffic:
    """The rows of an exchange by the ranks at both ends.

    `rows_XGG`: rows by source and computing rank, those that stay on a rank too. `node_rows_XGN`: rows that a source
    has for each node, where a token goes to a node once, to the rank of the source's number there, and is passed on
    inside it; None: every row goes straight to its rank. `node_of_G`: the node of each rank, neighbours together.
    """

    rows_XGG: Array
    node_rows_XGN: Array | None = None
    node_of_G: NDArray[np.int64]

    @classmethod
    def of(cls, rows_XGG: Array, *, nodes: int = 1, node_rows_XGN: Array | None = None) -> "Traffic":
        """Of ranks that divide evenly over `nodes` nodes."""
        ranks = np.shape(rows_XGG)[-1]
        return cls(rows_XGG=rows_XGG, node_rows_XGN=node_rows_XGN, node_of_G=np.arange(ranks) // (ranks // nodes))

    @property
    def ranks(self) -> int:
        """G."""
        return int(self.rows_XGG.shape[-1])

    @cached_property
    def rows(self) -> "RowLoads":
        """What ranks move, in rows."""
        load_LX = np.empty((5, self._flat_XGG.shape[0]))
        first_N = np.searchsorted(self.node_of_G, np.arange(self.node_of_G[-1] + 2))
        _count(self._flat_XGG, self._flat_XGN, first_N, forwarders(self.node_of_G), load_LX)
        return RowLoads(*(load_X.reshape(self.rows_XGG.shape[:-2]) for load_X in load_LX))

    def legs_XGG(self) -> Array:
        """Rows by the ranks at both ends of every leg: a token that is passed on is there once for each leg."""
        if self.node_rows_XGN is None:
            return self.rows_XGG
        legs_XGG = np.zeros(self._flat_XGG.shape, dtype=self.rows_XGG.dtype)
        _legs(self._flat_XGG, self._flat_XGN, self.node_of_G, forwarders(self.node_of_G), legs_XGG)
        return legs_XGG.reshape(self.rows_XGG.shape)

    def at(self, row: int) -> "Traffic":
        """One exchange of several, [X] being [L]: still an array of one."""
        nodes = self.node_rows_XGN
        return Traffic(
            rows_XGG=self.rows_XGG[row : row + 1],
            node_rows_XGN=None if nodes is None else nodes[row : row + 1],
            node_of_G=self.node_of_G,
        )

    def nothing(self) -> "Traffic":
        """The same exchanges with no rows."""
        nodes = self.node_rows_XGN
        return Traffic(
            rows_XGG=np.zeros_like(self.rows_XGG),
            node_rows_XGN=None if nodes is None else np.zeros_like(nodes),
            node_of_G=self.node_of_G,
        )

    @property
    def _flat_XGG(self) -> Array:
        return np.ascontiguousarray(self.rows_XGG).reshape(-1, self.ranks, self.ranks)

    @property
    def _flat_XGN(self) -> Array:
        """Of no size in N where nothing is passed on."""
        exchanges = self._flat_XGG.shape[0]
        if self.node_rows_XGN is None:
            return np.empty((exchanges, self.ranks, 0), dtype=self.rows_XGG.dtype)
        return np.ascontiguousarray(self.node_rows_XGN).reshape(exchanges, self.ranks, -1)


@dataclass(frozen=True, slots=True)
class RowLoads:
    """Rows of each exchange, shape X.

    `computed`: by the busiest rank; `up`: to or from the others of its node by the busiest rank, `out`: of other nodes;
    `all_up` and `all_out`: the same, sent by all ranks together.
    """

    computed: Floats
    up: Floats
    out: Floats
    all_up: Floats
    all_out: Floats


def forwarders(node_of_G: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rank of each node that takes in what a rank sends there, [G, N]: the one of its own number in its node.

    >>> forwarders(np.array([0, 0, 1, 1, 2])).tolist()  # the last node has lost a rank
    [[0, 2, 4], [1, 3, 4], [0, 2, 4], [1, 3, 4], [0, 2, 4]]
    """
    first_N, size_N = np.unique(node_of_G, return_index=True, return_counts=True)[1:]
    local_G = np.arange(node_of_G.size) - first_N[node_of_G]
    return np.asarray(first_N + local_G[:, None] % size_N)


@numba.njit(cache=True)
def _count(rows_XGG: Array, node_rows_XGN: Array, first_N: Array, forwarder_GN: Array, load_LX: Array) -> None:
    """Row by row of each source: what it has for each node, of which one rank takes in what is passed on there."""
    ranks, nodes = forwarder_GN.shape
    passes_on = node_rows_XGN.shape[2] > 0
    loads = np.empty((5, ranks))
    computed, up_sent, up_got, out_sent, out_got = loads[0], loads[1], loads[2], loads[3], loads[4]
    for x in range(rows_XGG.shape[0]):
        loads[:] = 0
        own = 0
        for source in range(ranks):
            rows_G = rows_XGG[x, source]
            for rank in range(ranks):
                computed[rank] += rows_G[rank]
            if first_N[own + 1] <= source:
                own += 1
            for node in range(nodes):
                if node != own and not passes_on:
                    continue
                here = 0.0
                for rank in range(first_N[node], first_N[node + 1]):
                    here += rows_G[rank]
                    up_got[rank] += rows_G[rank]
                sender = source if node == own else forwarder_GN[source, node]
                up_sent[sender] += here - rows_G[sender]
                up_got[sender] -= rows_G[sender]
                if node != own:
                    out_sent[source] += node_rows_XGN[x, source, node]
                    out_got[sender] += node_rows_XGN[x, source, node]
            if not passes_on:
                for start, end in ((0, first_N[own]), (first_N[own + 1], ranks)):
                    for rank in range(start, end):
                        out_sent[source] += rows_G[rank]
                        out_got[rank] += rows_G[rank]
        load_LX[0, x] = computed.max()
        load_LX[1, x] = max(up_sent.max(), up_got.max())
        load_LX[2, x] = max(out_sent.max(), out_got.max())
        load_LX[3, x] = up_sent.sum()
        load_LX[4, x] = out_sent.sum()


@numba.njit(cache=True)
def _legs(rows_XGG: Array, node_rows_XGN: Array, node_of_G: Array, forwarder_GN: Array, legs_XGG: Array) -> None:
    """Rows by the ranks at both ends of each leg, where a token goes to a node once and is passed on there."""
    ranks = node_of_G.size
    for x in range(rows_XGG.shape[0]):
        for source in range(ranks):
            for rank in range(ranks):
                node = node_of_G[rank]
                sender = source if node_of_G[source] == node else forwarder_GN[source, node]
                legs_XGG[x, sender, rank] += rows_XGG[x, source, rank]
            for node in range(node_rows_XGN.shape[2]):
                if node != node_of_G[source]:
                    legs_XGG[x, source, forwarder_GN[source, node]] += node_rows_XGN[x, source, node]

"""Network: what a collective takes where links contend, are slow or change while it runs.

A cost model prices an exchange as if links shared nothing but their ports. The part of its time that moves bytes then
grows as max-min fair flows take longer over the cluster's links than that bound; launch, synchronising and the
overhead of messages stay what they are. So the efficiency that was measured for a size goes with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cost_models.cluster import Cluster
from cost_models.kernel_costs import KernelCosts
from cost_models.kernels.token_traffic import bytes_between_ranks
from cost_models.ops import CostModel, TokenExchange
from sim.flows import max_min_makespan_s, transfer
from sim.stages import Stage

_PORTS = 2  # links of a flow that only its own two ends can slow


@dataclass(frozen=True, kw_only=True)  # no slots: what is derived is made once and kept
class Network:
    """The links of `cluster`, and the clusters that it becomes: `changes` of (seconds, cluster), in order of time.

    Where every flow crosses its two ports alone, the busier port decides, as a library that schedules its sends can
    have it: flows are simulated only where links contend beyond that. `every_collective`: always. Fair shares of two
    ports take as long for even traffic, and up to 5% longer for dense uneven traffic (`benchmarks/flows.py`).
    """

    cluster: Cluster
    costs: CostModel
    changes: tuple[tuple[float, Cluster], ...] = ()
    every_collective: bool = False

    def seconds(self, stage: Stage, row: int, start_s: float) -> float:
        """What a communication stage takes that starts at `start_s`."""
        priced_s = float(stage.seconds_LG[row].max())
        now, later = self._since(start_s)
        undisturbed = now is self.cluster and (not later or later[0][0] >= start_s + priced_s)
        if stage.exchange is None or (undisturbed and not self._contends):
            return priced_s
        exchange = stage.exchange.at(row)
        bytes_GG = bytes_between_ranks(exchange)[0]
        links_L, _ = self.cluster.link_load_s(bytes_GG[None])
        bound_s = float(links_L[0])  # what bare links take at least
        fixed_s = self._fixed_share(exchange) * priced_s
        if bound_s == 0 or fixed_s >= priced_s:
            return priced_s
        price = (priced_s - fixed_s) / bound_s  # seconds for each second of bare links
        spent_s = fixed_s
        for change_s, cluster in later:
            moving_s = max(change_s - start_s - spent_s, 0.0) / price
            left_GG = self._left(now, bytes_GG, moving_s)
            if not left_GG.any():
                break
            spent_s = max(change_s - start_s, spent_s)
            bytes_GG, now = left_GG, cluster
        return spent_s + price * self._moving_s(now, bytes_GG)

    def _left(self, cluster: Cluster, bytes_GG: NDArray[np.float64], moving_s: float) -> NDArray[np.float64]:
        """The bytes that are left after so many seconds of bare links."""
        if cluster is not self.cluster or self._contends:
            return transfer(cluster, bytes_GG, moving_s).remaining_GG
        bound_s = self._moving_s(cluster, bytes_GG)
        return bytes_GG * max(1 - moving_s / bound_s, 0.0)

    def _moving_s(self, cluster: Cluster, bytes_GG: NDArray[np.float64]) -> float:
        """What bare links take for bytes alone: their latency is in the fixed part."""
        links_L, latency_L = cluster.link_load_s(bytes_GG[None])
        if cluster is not self.cluster or self._contends:
            return max_min_makespan_s(cluster, bytes_GG) - float(latency_L[0])
        return float(links_L[0])

    def _since(self, start_s: float) -> tuple[Cluster, Sequence[tuple[float, Cluster]]]:
        """The cluster at `start_s`, and its changes after that."""
        past = sum(at_s <= start_s for at_s, _ in self.changes)
        return (self.changes[past - 1][1] if past else self.cluster), self.changes[past:]

    @cached_property
    def _contends(self) -> bool:
        """Whether some flow crosses more than its two ports."""
        if self.cluster.graph.number_of_edges() == 0:
            return False
        return self.every_collective or bool(np.diff(self.cluster.routes.loaded.start_P).max(initial=0) > _PORTS)

    def _fixed_share(self, exchange: TokenExchange) -> float:
        """The share of an exchange's price that no byte costs: launch, synchronising, messages, latency."""
        costs = self.costs
        whole_s = float(costs.seconds(exchange)[0])
        fixed_X = costs.fixed_s(exchange) if isinstance(costs, KernelCosts) else costs.seconds(exchange.empty())
        _, latency_L = self.cluster.link_load_s(bytes_between_ranks(exchange))
        return min((float(fixed_X[0]) + float(latency_L[0])) / whole_s, 1.0) if whole_s else 1.0

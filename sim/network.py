"""Network: what a collective takes where links contend, are slow or change while it runs.

A cost model prices an exchange as if links shared nothing but their ports. The part of its time that moves bytes then
grows as max-min fair flows take longer over the cluster's links than that bound; launch, synchronising and the
overhead of messages stay what they are. So the efficiency that was measured for a size goes with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cost_models.cluster import Cluster
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
        if stage.exchange is None or (not self.changes and not self._contends):
            return priced_s
        now, later = self._since(start_s)
        bytes_GG, bound_s, fixed_s = self._parts(stage.exchange, row)
        if bound_s == 0:
            return priced_s
        price = max(priced_s - fixed_s, 0.0) / bound_s  # seconds for each second that bare links would take
        spent_s = fixed_s
        for change_s, cluster in later:
            moved = transfer(now, bytes_GG, max(change_s - start_s - spent_s, 0.0) / price) if price else None
            if moved is None or not moved.remaining_GG.any():
                break
            spent_s = max(change_s - start_s, spent_s)
            bytes_GG, now = moved.remaining_GG, cluster
        _, latency_L = now.link_load_s(bytes_GG[None])  # which the fixed part has once
        return spent_s + price * (max_min_makespan_s(now, bytes_GG) - float(latency_L[0]))

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

    def _parts(self, exchange: TokenExchange, row: int) -> tuple[NDArray[np.float64], float, float]:
        """Of one layer: bytes by rank pair, seconds that bare links take at least, and seconds that no byte costs."""
        assert exchange.traffic is not None
        one = replace(exchange, tokens_X=np.asarray(exchange.tokens_X)[row : row + 1], traffic=exchange.traffic.at(row))
        bytes_GG = bytes_between_ranks(one)[0]
        links_L, latency_L = self.cluster.link_load_s(bytes_GG[None])
        return bytes_GG, float(links_L[0]), self._fixed_s(one) + float(latency_L[0])

    def _fixed_s(self, exchange: TokenExchange) -> float:
        assert exchange.traffic is not None
        nothing = replace(exchange, tokens_X=np.zeros_like(exchange.tokens_X), traffic=exchange.traffic.nothing())
        return float(self.costs.seconds(nothing)[0])

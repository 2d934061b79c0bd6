"""Clusters: ranks and links as a directed graph, and what an all-to-all loads onto each link.

Every edge has `bandwidth_bytes_s` and `latency_s`. Datasheets give no latency, so the presets say 0: their
times are lower bounds until links are calibrated.
"""

from functools import cached_property

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from cost_models.devices import Device
from traces.errors import InputError


class Cluster:
    """G ranks on `nodes` nodes that reach each other over the links of `graph`, where they are the integers 0..G-1."""

    def __init__(
        self, *, name: str, graph: "nx.DiGraph[object]", ranks: int, device: Device | None, nodes: int = 1
    ) -> None:
        if ranks < 1:
            raise InputError(f"cluster {name}: {ranks} ranks; it needs at least 1")
        self.name = name
        self.graph = graph
        self.ranks = ranks
        self.nodes = nodes
        self.device = device

    @cached_property
    def _crossings(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """For each crossing of a link: rank pair (source * G + destination) and link; then each link's figures."""
        link_of = {edge: index for index, edge in enumerate(self.graph.edges)}
        pairs, links = [], []
        for source in range(self.ranks):
            paths = nx.single_source_shortest_path(self.graph, source)
            for destination in range(self.ranks):
                for edge in nx.utils.pairwise(paths[destination]):
                    pairs.append(source * self.ranks + destination)
                    links.append(link_of[edge])
        figures = self.graph.edges
        bandwidth = np.array([figures[edge]["bandwidth_bytes_s"] for edge in link_of], dtype=np.float64)
        latency = np.array([figures[edge]["latency_s"] for edge in link_of], dtype=np.float64)
        return np.array(pairs, dtype=np.int64), np.array(links, dtype=np.int64), bandwidth, latency

    def all_to_all_s(self, bytes_GG: NDArray[np.float64]) -> float:
        """Seconds until `bytes_GG` [source, destination] have moved, each link loaded to its bottleneck.

        The largest bytes/bandwidth over links, plus the largest latency of a path in use: a lower bound that max-min
        fair flows meet where each flow crosses two links. Bytes a rank sends to itself cross no link.
        """
        pair_X, link_X, bandwidth, latency = self._crossings
        if pair_X.size == 0:
            return 0.0
        bytes_X = np.asarray(bytes_GG, dtype=np.float64).ravel()[pair_X]
        load = np.bincount(link_X, weights=bytes_X, minlength=bandwidth.size)
        path_latency = np.bincount(pair_X, weights=latency[link_X] * (bytes_X > 0), minlength=self.ranks**2)
        return float((load / bandwidth).max() + path_latency.max())


def gpu_cluster(device: Device, ranks: int) -> Cluster:
    """Nodes of `device.ranks_per_node` GPUs behind one switch each; every GPU has a NIC to a non-blocking network."""
    graph: nx.DiGraph[object] = nx.DiGraph()
    nodes = -(-ranks // device.ranks_per_node)
    for rank in range(ranks):
        graph.add_node(rank)
        links = [(f"switch{rank // device.ranks_per_node}", device.scale_up)]
        if nodes > 1:
            links.append((f"nic{rank}", device.scale_out))
            _both_ways(graph, f"nic{rank}", "network", device.scale_out)
        for other, bandwidth in links:
            _both_ways(graph, rank, other, bandwidth)
    return Cluster(name=f"{ranks} x {device.name}", graph=graph, ranks=ranks, device=device, nodes=nodes)


def cpu_box(ranks: int) -> Cluster:
    """Ranks as processes of one host; what its memory moves is known only from calibration, so there are no links."""
    graph: nx.DiGraph[object] = nx.DiGraph()
    graph.add_nodes_from(range(ranks))
    return Cluster(name=f"{ranks} x cpu", graph=graph, ranks=ranks, device=None)


def _both_ways(graph: "nx.DiGraph[object]", one: object, other: object, bandwidth: float) -> None:
    for source, destination in ((one, other), (other, one)):
        graph.add_edge(source, destination, bandwidth_bytes_s=bandwidth, latency_s=0.0)

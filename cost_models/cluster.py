"""Clusters: ranks and links as a directed graph, and what an all-to-all loads onto each link.

Every edge has `bandwidth_bytes_s`, `latency_s` and a `tier`: "scale_up" (NVLink), "scale_out" (a GPU's NIC), "fabric"
(between switches of the network) or "host" (PCIe, or NVLink-C2C). Datasheets give no latency, so clusters made from
them say 0: their times are lower bounds until links are calibrated.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from cost_models.devices import Device, device
from cost_models.topology import Links, Routes, Tier, Unreachable
from traces.errors import InputError

Fabric = Literal["rail", "fat_tree", "flat"]
Edge = tuple[object, object]
_LEAF_PORTS = 32  # NICs below a leaf: half of a 64-port switch's, the other half goes up
_TRAY = 4  # GPUs of a tray in a rack whose NVLink domain is larger than a box


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link in one direction between two vertices, of which ranks are integers and others have names."""

    tail: object
    head: object
    bandwidth_bytes_s: float
    latency_s: float = 0.0
    tier: Tier = "scale_up"


class Cluster:
    """G ranks on `nodes` nodes that reach each other over the links of `graph`, where they are the integers 0..G-1.

    `node_of_G` the node of each rank (without it, `nodes` nodes of equal size), `speed_G` its share of the device's
    speed: what takes a second on the device takes `1 / speed` here. `is_nominal`: ranks have the ports of the
    device's datasheet at full speed and without latency, and the network between them blocks nothing, so that a
    bound on those ports is a bound on the cluster. `healthy` is what a degraded cluster was, and `was_G` the number
    that each rank had there.
    """

    def __init__(
        self,
        *,
        name: str,
        graph: "nx.DiGraph[object]",
        ranks: int,
        device: Device | None,
        nodes: int = 1,
        node_of_G: NDArray[np.int64] | None = None,
        speed_G: NDArray[np.float64] | None = None,
        is_nominal: bool = False,
        healthy: "Cluster | None" = None,
        was_G: NDArray[np.int64] | None = None,
    ) -> None:
        if ranks < 1:
            raise InputError(f"cluster {name}: {ranks} ranks; it needs at least 1")
        self.name = name
        self.graph = graph
        self.ranks = ranks
        self.device = device
        self.node_of_G = np.arange(ranks) // -(-ranks // nodes) if node_of_G is None else node_of_G
        self.nodes = int(self.node_of_G.max()) + 1
        self.speed_G = np.ones(ranks) if speed_G is None else speed_G
        self.is_nominal = is_nominal
        self.healthy = healthy
        self.was_G = np.arange(ranks) if was_G is None else was_G

    @classmethod
    def of_links(cls, links: Iterable[Link], *, ranks: int, **about: Any) -> "Cluster":
        """Ranks that these links join; `about` them as in the constructor. The last of two equal ends holds."""
        graph: nx.DiGraph[object] = nx.DiGraph()
        _add(graph, links)
        graph.add_nodes_from(range(ranks))
        return cls(graph=graph, ranks=ranks, **about)

    @cached_property
    def links(self) -> Links:
        """The links as arrays, in the order of the graph's edges."""
        vertex_of: dict[object, int] = {rank: rank for rank in range(self.ranks)}
        for vertex in self.graph:
            vertex_of.setdefault(vertex, len(vertex_of))
        edges = list(self.graph.edges(data=True))
        return Links(
            names_X=tuple(f"{vertex_name(tail)}->{vertex_name(head)}" for tail, head, _ in edges),
            tail_X=np.array([vertex_of[tail] for tail, _, _ in edges], dtype=np.int64),
            head_X=np.array([vertex_of[head] for _, head, _ in edges], dtype=np.int64),
            bandwidth_X=np.array([link["bandwidth_bytes_s"] for _, _, link in edges], dtype=np.float64),
            latency_X=np.array([link["latency_s"] for _, _, link in edges], dtype=np.float64),
            tier_X=tuple(link.get("tier", "scale_up") for _, _, link in edges),
            vertices=len(vertex_of),
        )

    @cached_property
    def routes(self) -> Routes:
        """The path of each pair; `InputError` names a pair that has none."""
        try:
            return Routes.of(self.links, self.ranks)
        except Unreachable as error:
            raise InputError(
                f"cluster {self.name}: no path from {vertex_name(error.source)} to "
                f"{vertex_name(error.destination)}; every rank must reach every other: add a link, or lose a rank"
            ) from error

    def port_load_s(self, bytes_LGG: NDArray[Any], *, scale: float = 1.0) -> NDArray[np.float64]:
        """Seconds that each of L all-to-alls takes, `bytes_LGG` [layer, source, destination], each times `scale`.

        The largest bytes/bandwidth over links, plus the largest latency of a path in use: a lower bound for any way
        to share the links. Bytes a rank sends to itself cross no link. Integer counts need no copy as floats. Where
        the cluster has no links (the processes of one host) nothing is known and everything is 0.
        """
        slowest_L, latency_L = self.link_load_s(bytes_LGG, scale=scale)
        return slowest_L + latency_L

    def link_load_s(
        self, bytes_LGG: NDArray[Any], *, scale: float = 1.0
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The two parts of `port_load_s`: the slowest link's bytes/bandwidth, and the largest latency, L each."""
        if self.graph.number_of_edges() == 0 or self.ranks == 1 or scale == 0:
            return np.zeros(len(bytes_LGG)), np.zeros(len(bytes_LGG))
        load_LX, latency_L = self.routes.load(bytes_LGG)
        slowest_L: NDArray[np.float64] = (load_LX * scale / self.links.bandwidth_X).max(axis=1)
        return slowest_L, latency_L

    def all_to_all_s(self, bytes_GG: NDArray[Any]) -> float:
        """Seconds until `bytes_GG` [source, destination] have moved: `port_load_s` of one all-to-all."""
        return float(self.port_load_s(np.asarray(bytes_GG)[np.newaxis])[0])

    def bytes_by_tier(self, bytes_LGG: NDArray[Any]) -> dict[Tier, float]:
        """Bytes that go to other ranks of their node ("scale_up") and to other nodes ("scale_out").

        `bytes_LGG` [layer, source, destination]. A pair's bytes count once, however many links they cross.
        """
        bytes_GG = np.add.reduce(bytes_LGG, axis=0, dtype=np.float64)
        inside_GG = self.node_of_G[:, np.newaxis] == self.node_of_G
        inside = float(bytes_GG[inside_GG].sum() - np.trace(bytes_GG))
        return {"scale_up": inside, "scale_out": float(bytes_GG[~inside_GG].sum())}

    def vertex(self, name: str) -> object:
        """The vertex that people call `name`; `InputError` names those there are."""
        number = re.fullmatch(r"(?:gpu|rank)(\d+)", name)
        if number is not None:
            if int(number[1]) < self.ranks:
                return int(number[1])
            raise InputError(f"there is no {name}; the ranks are gpu0 to gpu{self.ranks - 1}")
        if name in self.graph:
            return name
        others = [str(vertex) for vertex in self.graph if not isinstance(vertex, int)]
        close = difflib.get_close_matches(name, others, n=3) or others[:8]
        raise InputError(f"there is no {name}; there are {', '.join(close) or 'only ranks'}")

    def edges_between(self, one: object, two: object) -> list[Edge]:
        """The links that join two vertices, at most one each way."""
        return [edge for edge in ((one, two), (two, one)) if self.graph.has_edge(*edge)]

    def edges_of(self, vertex: object) -> list[Edge]:
        """All links into and out of a vertex."""
        return [*self.graph.in_edges(vertex), *self.graph.out_edges(vertex)]

    def neighbours(self, vertex: object) -> list[object]:
        """The other ends of a vertex's links."""
        return list(dict.fromkeys(nx.all_neighbors(self.graph, vertex)))

    def with_links(self, links: Iterable[Link], *, name: str) -> "Cluster":
        """The cluster with more links, each in place of one that joins the same two."""
        graph, links = self.graph.copy(), list(links)
        _add(graph, links)
        return Cluster(
            name=name,
            graph=graph,
            ranks=self.ranks,
            device=self.device,
            node_of_G=self.node_of_G,
            speed_G=self.speed_G,
            is_nominal=self.is_nominal and not links,
            healthy=self.healthy,
            was_G=self.was_G,
        )

    def slowed(self, share: Mapping[Edge, float], *, speed_G: NDArray[np.float64], name: str) -> "Cluster":
        """The cluster with `share` of some links' bandwidth and ranks of `speed_G`; what has 0 of either is lost.

        Ranks after a lost one move up by one and keep their nodes, of which empty ones are lost too. `InputError` names
        a pair that can no longer reach each other.
        """
        graph = self.graph.copy()
        for edge, of_it in share.items():
            if of_it == 0:
                graph.remove_edge(*edge)
            else:
                graph.edges[edge]["bandwidth_bytes_s"] *= of_it
        kept = np.flatnonzero(speed_G > 0)
        if kept.size < self.ranks:
            graph.remove_nodes_from(np.flatnonzero(speed_G == 0).tolist())
            graph = nx.relabel_nodes(graph, {rank: new for new, rank in enumerate(kept.tolist())})
        nobody_slower = bool((speed_G == self.speed_G).all())
        slowed = Cluster(
            name=name,
            graph=graph,
            ranks=kept.size,
            device=self.device,
            node_of_G=np.unique(self.node_of_G[kept], return_inverse=True)[1].astype(np.int64),
            speed_G=speed_G[kept],
            is_nominal=self.is_nominal and all(of_it == 1 for of_it in share.values()) and nobody_slower,
            healthy=self.healthy or self,
            was_G=self.was_G[kept],
        )
        if self.graph.number_of_edges():
            _ = slowed.routes  # tells now, not in the middle of a simulation, what can no longer be reached
        return slowed


def _add(graph: "nx.DiGraph[object]", links: Iterable[Link]) -> None:
    for link in links:
        graph.add_edge(
            link.tail,
            link.head,
            bandwidth_bytes_s=link.bandwidth_bytes_s,
            latency_s=link.latency_s,
            tier=link.tier,
        )


def vertex_name(vertex: object) -> str:
    """A vertex of the graph as people write it: rank 3 is "gpu3"."""
    return f"gpu{vertex}" if isinstance(vertex, int | np.integer) else str(vertex)


def gpu_cluster(
    device: Device,
    ranks: int,
    *,
    fabric: Fabric = "rail",
    oversubscription: float = 1.0,
    host: bool = True,
    latency_s: Mapping[Tier, float] | None = None,
) -> Cluster:
    """Nodes of `device.ranks_per_node` GPUs behind one switch each, and a network between them with a NIC for each GPU.

    `rail`: NIC i of every node is on leaf i, and a spine joins the leaves. `fat_tree`: all NICs of a node are on one
    leaf, 32 NICs to a leaf and at least a node. `flat`: one network that blocks nothing. Where more than eight GPUs
    share a switch (a rack of 72) there are four rails, one for each GPU of a tray. What a leaf has above it is its
    NICs' bandwidth over `oversubscription`. All spine switches are one vertex with their bandwidth in sum, as if
    traffic spread over them perfectly; so is a leaf that is several switches. `host`: each node has one, joined to its
    GPUs by PCIe or NVLink-C2C. `latency_s` by tier, of each link. A cluster that fits into one node has no NICs.
    """
    if oversubscription < 1:
        raise InputError(f"oversubscription {oversubscription:g}; it must be at least 1 (non-blocking)")
    nodes = -(-ranks // device.ranks_per_node)
    node_of_G = np.arange(max(ranks, 0)) // device.ranks_per_node
    joined: list[tuple[object, object, float, Tier]] = []
    below: dict[str, int] = {}  # NICs of each leaf
    for rank in range(ranks):
        node, place = divmod(rank, device.ranks_per_node)
        joined.append((rank, f"switch{node}", device.scale_up, "scale_up"))
        if nodes > 1:
            leaf = _leaf(fabric, node, place, device.ranks_per_node)
            below[leaf] = below.get(leaf, 0) + 1
            joined.append((rank, f"nic{rank}", device.scale_out, "scale_out"))
            joined.append((f"nic{rank}", leaf, device.scale_out, "scale_out"))
        if host:
            joined.append((rank, f"host{node}", device.host_bandwidth, "host"))
    if len(below) > 1:
        for leaf, nics in below.items():
            joined.append((leaf, "spine", nics * device.scale_out / oversubscription, "fabric"))
    latency_s = latency_s or {}
    blocks = oversubscription > 1 and len(below) > 1
    shape = f", {fabric.replace('_', ' ')} {oversubscription:g}:1" if blocks else ""
    return Cluster.of_links(
        (
            Link(tail=tail, head=head, bandwidth_bytes_s=bandwidth, latency_s=latency_s.get(tier, 0.0), tier=tier)
            for one, two, bandwidth, tier in joined
            for tail, head in ((one, two), (two, one))
        ),
        name=f"{ranks} x {device.name}{shape}",
        ranks=ranks,
        device=device,
        node_of_G=node_of_G,
        is_nominal=not blocks and not any(latency_s.values()),
    )


def _leaf(fabric: Fabric, node: int, place: int, ranks_per_node: int) -> str:
    match fabric:
        case "rail":
            return f"leaf{place if ranks_per_node <= 8 else place % _TRAY}"
        case "fat_tree":
            return f"leaf{node // max(1, _LEAF_PORTS // ranks_per_node)}"
        case "flat":
            return "network"
    raise InputError(f"unknown fabric {fabric!r}; known are rail, fat_tree, flat")


def cpu_box(ranks: int) -> Cluster:
    """Ranks as processes of one host; what its memory moves is known only from calibration, so there are no links."""
    return Cluster.of_links([], name=f"{ranks} x cpu", ranks=ranks, device=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A cluster that people have: `ranks` of `device` on a `fabric`, and `about` what it is."""

    device: str
    ranks: int
    fabric: Fabric = "rail"
    oversubscription: float = 1.0
    about: str


# Nodes in a scalable unit are those of NVIDIA's SuperPOD reference architectures.
PRESET_CLUSTERS: Mapping[str, Preset] = {
    "a100_node": Preset(device="a100_sxm", ranks=8, about="one HGX A100"),
    "a100_pod": Preset(device="a100_sxm", ranks=160, about="a SuperPOD unit of 20 DGX A100"),
    "h100_node": Preset(device="h100_sxm", ranks=8, about="one HGX H100"),
    "h100_8_nodes": Preset(device="h100_sxm", ranks=64, about="eight HGX H100"),
    "h100_pod": Preset(device="h100_sxm", ranks=256, about="a SuperPOD unit of 32 DGX H100"),
    "h100_oversubscribed": Preset(
        device="h100_sxm", ranks=256, fabric="fat_tree", oversubscription=2.0, about="32 HGX H100, half a spine"
    ),
    "h200_node": Preset(device="h200_sxm", ranks=8, about="one HGX H200"),
    "h200_pod": Preset(device="h200_sxm", ranks=256, about="a SuperPOD unit of 32 DGX H200"),
    "h800_node": Preset(device="h800_sxm", ranks=8, about="one HGX H800"),
    "h800_prefill": Preset(device="h800_sxm", ranks=32, about="DeepSeek-V3's prefill unit: four HGX H800"),
    "h800_decode": Preset(device="h800_sxm", ranks=144, about="DeepSeek-V3's decode unit: 18 HGX H800"),
    "b200_node": Preset(device="b200_sxm", ranks=8, about="one HGX B200"),
    "b200_pod": Preset(device="b200_sxm", ranks=256, about="a SuperPOD unit of 32 DGX B200"),
    "gb200_rack": Preset(device="gb200", ranks=72, about="one GB200 NVL72"),
    "gb200_pod": Preset(device="gb200", ranks=576, about="a SuperPOD unit of eight GB200 NVL72"),
}


def preset_cluster(name: str) -> Cluster:
    """The cluster of `PRESET_CLUSTERS` called `name`; `InputError` lists the known ones."""
    if name not in PRESET_CLUSTERS:
        raise InputError(f"unknown cluster {name!r}; known are {', '.join(PRESET_CLUSTERS)}")
    preset = PRESET_CLUSTERS[name]
    return gpu_cluster(
        device(preset.device), preset.ranks, fabric=preset.fabric, oversubscription=preset.oversubscription
    )

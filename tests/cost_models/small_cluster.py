"""A small device with round figures, and helpers that write traffic and read paths, for tests of clusters by hand."""

from typing import Any

import numpy as np

from cost_models.cluster import Cluster
from cost_models.devices import Device

SMALL = Device(
    name="small",
    memory_bytes=1e3,
    memory_bandwidth=1e3,
    peak_flops={2: 1e3},
    scale_up=100.0,
    scale_out=10.0,
    ranks_per_node=2,
    sms=4,
    l2_bytes=10.0,
    host_bandwidth=5.0,
)


def traffic(ranks: int, **bytes_by_pair: float) -> Any:
    """`traffic(4, r0_r1=100)`: bytes from rank 0 to rank 1."""
    bytes_GG = np.zeros((ranks, ranks))
    for pair, size in bytes_by_pair.items():
        source, destination = (int(rank[1:]) for rank in pair.split("_"))
        bytes_GG[source, destination] = size
    return bytes_GG


def path(cluster: Cluster, source: int, destination: int, *, loaded: bool = False) -> list[str]:
    """The names of the links that a rank pair crosses, or of those that can be its slowest."""
    crossings = cluster.routes.loaded if loaded else cluster.routes.paths
    return [cluster.links.names_X[link] for link in crossings.of(source * cluster.ranks + destination)]

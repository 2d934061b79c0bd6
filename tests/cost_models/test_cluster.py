"""Clusters by hand: what an all-to-all takes on a ring, inside a node and between nodes."""

from dataclasses import replace
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.cluster import Cluster, cpu_box, gpu_cluster
from cost_models.devices import DEVICES, Device, device
from traces.errors import InputError

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


def ring(ranks: int, *, bandwidth_bytes_s: float = 10.0, latency_s: float = 0.0) -> Cluster:
    """A one-way ring: rank r sends to r + 1 only, so every path is known."""
    graph: nx.DiGraph[object] = nx.DiGraph()
    for rank in range(ranks):
        graph.add_edge(rank, (rank + 1) % ranks, bandwidth_bytes_s=bandwidth_bytes_s, latency_s=latency_s)
    return Cluster(name="ring", graph=graph, ranks=ranks, device=None)


def traffic(ranks: int, **bytes_by_pair: float) -> Any:
    """`traffic(4, r0_r1=100)`: bytes from rank 0 to rank 1."""
    bytes_GG = np.zeros((ranks, ranks))
    for pair, size in bytes_by_pair.items():
        source, destination = (int(rank[1:]) for rank in pair.split("_"))
        bytes_GG[source, destination] = size
    return bytes_GG


def test_a_hundred_bytes_over_ten_bytes_a_second_take_ten_seconds() -> None:
    assert ring(4).all_to_all_s(traffic(4, r0_r1=100)) == 10.0


def test_bytes_that_cross_several_links_take_as_long_as_on_one() -> None:
    # 0 -> 3 crosses three links of the one-way ring, all at once.
    assert ring(4).all_to_all_s(traffic(4, r0_r3=100)) == 10.0


def test_flows_over_one_link_add_up() -> None:
    # 0 -> 2 and 1 -> 2 both cross the link 1 -> 2: 200 bytes.
    assert ring(4).all_to_all_s(traffic(4, r0_r2=100, r1_r2=100)) == 20.0
    # Different links do not: 0 -> 1 and 2 -> 3.
    assert ring(4).all_to_all_s(traffic(4, r0_r1=100, r2_r3=100)) == 10.0


def test_all_to_all_on_a_ring() -> None:
    # Four pairs at each distance 1, 2, 3 make 4 + 8 + 12 = 24 crossings of 4 links: 6 * 100 bytes on each.
    assert ring(4).all_to_all_s(np.full((4, 4), 100.0)) == 60.0


def test_latency_is_that_of_the_longest_path_in_use() -> None:
    slow = ring(4, latency_s=0.5)
    assert slow.all_to_all_s(traffic(4, r0_r1=100)) == 10.5
    assert slow.all_to_all_s(traffic(4, r0_r3=100)) == 11.5  # three links
    assert slow.all_to_all_s(traffic(4, r0_r1=100, r0_r2=1)) == 10.1 + 1.0  # 101 bytes on the first link, two links
    assert slow.all_to_all_s(np.zeros((4, 4))) == 0.0  # nothing is sent, nothing is waited for


def test_bytes_to_oneself_cost_nothing() -> None:
    for cluster in (ring(4, latency_s=1.0), gpu_cluster(SMALL, 4), gpu_cluster(SMALL, 2)):
        assert cluster.all_to_all_s(np.diag(np.full(cluster.ranks, 1e9))) == 0.0
    assert gpu_cluster(SMALL, 1).all_to_all_s(np.array([[1e9]])) == 0.0


def test_inside_a_node_the_switch_links_are_the_bottleneck() -> None:
    # Ranks 0 and 1 share a node: 1000 bytes at 100 bytes/s.
    assert gpu_cluster(SMALL, 4).all_to_all_s(traffic(4, r0_r1=1000)) == 10.0
    # Both ways at once: links are full duplex.
    assert gpu_cluster(SMALL, 4).all_to_all_s(traffic(4, r0_r1=1000, r1_r0=1000)) == 10.0


def test_between_nodes_the_nic_is_the_bottleneck() -> None:
    two_nodes = gpu_cluster(SMALL, 4)
    # Rank 0 to rank 2 in the other node: 1000 bytes at its NIC's 10 bytes/s.
    assert two_nodes.all_to_all_s(traffic(4, r0_r2=1000)) == 100.0
    # Each rank has a NIC of its own, so two pairs take no longer than one …
    assert two_nodes.all_to_all_s(traffic(4, r0_r2=1000, r1_r3=1000)) == 100.0
    # … but two flows into one NIC do.
    assert two_nodes.all_to_all_s(traffic(4, r0_r2=1000, r1_r2=1000)) == 200.0
    # A slow network does not slow what stays inside a node: max(500/100, 100/10).
    assert two_nodes.all_to_all_s(traffic(4, r0_r1=500, r0_r2=100)) == 10.0


def test_one_node_has_no_network() -> None:
    assert not [node for node in gpu_cluster(SMALL, 2).graph if str(node).startswith("nic")]
    assert gpu_cluster(SMALL, 3).all_to_all_s(traffic(3, r0_r2=10)) == 1.0  # the third rank is alone in node 1


@given(
    bytes_GG=st.lists(st.floats(0, 1e6), min_size=16, max_size=16),
    factor=st.floats(1, 10),
    pair=st.integers(0, 15),
)
def test_more_bytes_never_take_less(bytes_GG: list[float], factor: float, pair: int) -> None:
    cluster = gpu_cluster(SMALL, 4)
    before = np.array(bytes_GG).reshape(4, 4)
    after = before.copy()
    after.flat[pair] *= factor
    assert cluster.all_to_all_s(after) >= cluster.all_to_all_s(before)
    np.testing.assert_allclose(cluster.all_to_all_s(before * factor), cluster.all_to_all_s(before) * factor, rtol=1e-9)


def test_a_cluster_needs_a_rank() -> None:
    with pytest.raises(InputError, match="cluster 0 x small: 0 ranks; it needs at least 1"):
        gpu_cluster(SMALL, 0)


def test_processes_of_one_host_have_no_links_to_price() -> None:
    box = cpu_box(2)
    assert (box.name, box.ranks, box.device) == ("2 x cpu", 2, None)


def test_datasheets_are_decimal_and_dense() -> None:
    h100 = device("h100_sxm")
    assert (h100.memory_bandwidth, h100.scale_up, h100.scale_out) == (3.35e12, 450e9, 50e9)
    assert h100.peak(2.0) == 989e12  # bf16
    assert h100.peak(1.0) == 1978e12  # fp8
    assert h100.peak(4.25 / 8) == 989e12  # MXFP4 has no peak of its own there: unpacked to bf16
    assert device("b200_sxm").peak(4.25 / 8) == 9000e12
    assert device("a100_sxm").peak(1.0) == 312e12


def test_an_unknown_gpu_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=f"unknown gpu 'h9'; known are {', '.join(DEVICES)}"):
        device("h9")


@pytest.mark.parametrize("name", sorted(DEVICES))
def test_every_datasheet_makes_a_cluster_that_slows_with_its_size(name: str) -> None:
    sheet = replace(device(name), ranks_per_node=2)
    two, four = (gpu_cluster(sheet, ranks).all_to_all_s(np.full((ranks, ranks), 1e6)) for ranks in (2, 4))
    assert 0 < two < four  # one other rank, then three, two of them behind the NIC

"""Clusters by hand: what an all-to-all takes on a ring, in a node, between nodes, over a spine."""

from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cluster import SMALL, path, traffic

from cost_models.cluster import PRESET_CLUSTERS, Cluster, Link, cpu_box, gpu_cluster, preset_cluster
from cost_models.degrade import degrade
from cost_models.devices import DEVICES, device
from traces.errors import InputError


def ring(ranks: int, *, bandwidth_bytes_s: float = 10.0, latency_s: float = 0.0) -> Cluster:
    """A one-way ring: rank r sends to r + 1 only, so every path is known."""
    graph: nx.DiGraph[object] = nx.DiGraph()
    for rank in range(ranks):
        graph.add_edge(rank, (rank + 1) % ranks, bandwidth_bytes_s=bandwidth_bytes_s, latency_s=latency_s)
    return Cluster(name="ring", graph=graph, ranks=ranks, device=None)


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


@settings(deadline=None)  # the first example compiles
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


def test_a_rail_joins_the_gpus_with_the_same_number_in_their_nodes() -> None:
    cluster = gpu_cluster(SMALL, 4)
    assert path(cluster, 0, 1) == ["gpu0->switch0", "switch0->gpu1"]  # not by the host, which is as near
    assert path(cluster, 0, 2) == ["gpu0->nic0", "nic0->leaf0", "leaf0->nic2", "nic2->gpu2"]
    assert path(cluster, 0, 3)[1:-1] == ["nic0->leaf0", "leaf0->spine", "spine->leaf1", "leaf1->nic3"]
    # A NIC's two links are equally wide, the spine is as wide as all NICs: two links can be the slowest.
    assert path(cluster, 0, 3, loaded=True) == ["nic0->leaf0", "nic3->gpu3"]
    assert cluster.node_of_G.tolist() == [0, 0, 1, 1]


def test_a_rack_of_72_has_four_rails() -> None:
    cluster = gpu_cluster(device("gb200"), 144)
    leaves = {str(vertex) for vertex in cluster.graph if str(vertex).startswith("leaf")}
    assert leaves == {"leaf0", "leaf1", "leaf2", "leaf3"}
    assert path(cluster, 5, 73)[1:-1] == ["nic5->leaf1", "leaf1->nic73"]  # the second GPU of a tray in either rack


def test_an_oversubscribed_spine_is_the_bottleneck_between_rails() -> None:
    # Four nodes of two. Leaf 0 has the NICs of 0, 2, 4, 6: 4 * 10 bytes/s down, and at 2:1 20 bytes/s up.
    cluster = gpu_cluster(SMALL, 8, oversubscription=2.0)
    # Each of them sends 100 bytes to the other rail: 100 / 10 = 10 s on a NIC, 400 / 20 = 20 s on the leaf's uplink.
    assert cluster.all_to_all_s(traffic(8, r0_r3=100, r2_r5=100, r4_r7=100, r6_r1=100)) == 20.0
    # On its own rail none of that crosses the spine.
    assert cluster.all_to_all_s(traffic(8, r0_r2=100, r2_r4=100, r4_r6=100, r6_r0=100)) == 10.0
    # With two leaves all that goes up comes down to the other: the way up is left out.
    assert path(cluster, 0, 3, loaded=True) == ["nic0->leaf0", "spine->leaf1", "nic3->gpu3"]
    assert not cluster.is_nominal


def test_a_fat_tree_has_all_nics_of_a_node_on_one_leaf() -> None:
    # 17 nodes of two: 16 on leaf 0, one on leaf 1, which has 2 * 10 bytes/s down and at 2:1 10 bytes/s up.
    cluster = gpu_cluster(SMALL, 34, fabric="fat_tree", oversubscription=2.0)
    assert path(cluster, 0, 3)[1:-1] == ["nic0->leaf0", "leaf0->nic3"]
    # Its two ranks send 100 bytes each: 200 / 10.
    assert cluster.all_to_all_s(traffic(34, r32_r0=100, r33_r1=100)) == 20.0


@settings(deadline=None)  # the first example compiles
@given(st.lists(st.floats(0, 1e6), min_size=64, max_size=64))
def test_networks_that_block_nothing_take_the_same_time(sizes: list[float]) -> None:
    bytes_GG = np.array(sizes).reshape(8, 8)
    flat = gpu_cluster(SMALL, 8, fabric="flat").all_to_all_s(bytes_GG)
    assert gpu_cluster(SMALL, 8).all_to_all_s(bytes_GG) == flat
    assert gpu_cluster(SMALL, 8, fabric="fat_tree").all_to_all_s(bytes_GG) == flat
    assert gpu_cluster(SMALL, 8, host=False).all_to_all_s(bytes_GG) == flat


def test_nominal_is_full_speed_without_latency() -> None:
    nominal = gpu_cluster(SMALL, 4)
    assert nominal.is_nominal
    assert gpu_cluster(SMALL, 2, oversubscription=2.0).is_nominal  # one node has no spine
    assert not gpu_cluster(SMALL, 4, latency_s={"fabric": 1e-6}).is_nominal
    assert not degrade(nominal, ["gpu0=0.9"]).is_nominal
    assert not ring(4).is_nominal


def test_latency_of_a_tier_is_that_of_each_of_its_links() -> None:
    cluster = gpu_cluster(SMALL, 4, latency_s={"scale_up": 1.0, "scale_out": 2.0, "fabric": 4.0})
    assert cluster.all_to_all_s(traffic(4, r0_r1=100)) == 100 / 100 + 2 * 1.0
    assert cluster.all_to_all_s(traffic(4, r0_r2=100)) == 100 / 10 + 4 * 2.0
    assert cluster.all_to_all_s(traffic(4, r0_r3=100)) == 100 / 10 + 4 * 2.0 + 2 * 4.0


def test_port_load_of_many_layers_is_that_of_each() -> None:
    # Rails of two nodes, and a ring, where the links of a pair are many and each row has its own latencies.
    slow_ring = ring(6, latency_s=0.5)
    for cluster in (gpu_cluster(SMALL, 6, oversubscription=4.0), slow_ring, degrade(gpu_cluster(SMALL, 6), ["nic1=0"])):
        rows_LGG = np.random.default_rng(0).integers(0, 4, (5, 6, 6), dtype=np.int32)
        rows_LGG[3] = 0
        rows_LGG[4] = np.eye(6)
        each_L = [cluster.all_to_all_s(rows_GG * 7.0) for rows_GG in rows_LGG]
        back_L = [cluster.all_to_all_s(rows_GG.T * 7.0) for rows_GG in rows_LGG]
        assert each_L[3:] == [0.0, 0.0]
        np.testing.assert_allclose(cluster.port_load_s(rows_LGG, scale=7.0), each_L, rtol=1e-12)
        np.testing.assert_allclose(cluster.port_load_s(rows_LGG * 7.0), each_L, rtol=1e-12)
        np.testing.assert_allclose(cluster.port_load_s(rows_LGG.swapaxes(1, 2), scale=7.0), back_L, rtol=1e-12)
        np.testing.assert_allclose(cluster.port_load_s(rows_LGG[::2], scale=7.0), each_L[::2], rtol=1e-12)


@settings(deadline=None)  # the first example compiles
@given(
    switches=st.integers(1, 4),
    edges=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(1, 5)), min_size=1, max_size=24),
    sizes=st.lists(st.integers(0, 9), min_size=16, max_size=16),
)
def test_links_that_are_left_out_are_never_the_slowest(
    switches: int, edges: list[tuple[int, int, int]], sizes: list[int]
) -> None:
    """On any network of four ranks and some switches, against all links of the paths."""
    graph: nx.DiGraph[object] = nx.DiGraph()
    for rank in range(4):  # all on switch 4, so that each reaches each
        graph.add_edge(rank, "s4", bandwidth_bytes_s=3.0, latency_s=0.0)
        graph.add_edge("s4", rank, bandwidth_bytes_s=3.0, latency_s=0.0)
    for tail, head, bandwidth in edges:
        ends = [end if end < 4 else f"s{4 + end % switches}" for end in (tail, head)]
        if ends[0] != ends[1]:
            graph.add_edge(*ends, bandwidth_bytes_s=float(bandwidth), latency_s=0.0)
    cluster = Cluster(name="any", graph=graph, ranks=4, device=None)
    load_X = np.zeros(len(cluster.links.names_X))
    for pair in range(16):
        load_X[cluster.routes.paths.of(pair)] += sizes[pair]
    want = (load_X / cluster.links.bandwidth_X).max()
    np.testing.assert_allclose(cluster.all_to_all_s(np.array(sizes).reshape(4, 4)), want, rtol=1e-12)
    # And the paths are the shortest, with a hundred links' worth for each rank on the way.
    for source in range(4):
        cost = nx.single_source_dijkstra_path_length(
            graph, source, weight=lambda tail, head, link, start=source: 101 if tail in {0, 1, 2, 3} - {start} else 1
        )
        for destination in range(4):
            links = path(cluster, source, destination)
            assert len(links) + 100 * sum("gpu" in link.split("->")[0] for link in links[1:]) == cost[destination]


def test_links_of_its_own_make_a_cluster_or_change_one() -> None:
    there, back = Link(tail=0, head=1, bandwidth_bytes_s=10.0), Link(tail=1, head=0, bandwidth_bytes_s=5.0)
    pair = Cluster.of_links([there, back], name="pair", ranks=2, device=None)
    assert pair.all_to_all_s(traffic(2, r0_r1=100)) == 10.0
    assert pair.all_to_all_s(traffic(2, r1_r0=100)) == 20.0
    node = gpu_cluster(SMALL, 4)
    joined = node.with_links([Link(tail=0, head=2, bandwidth_bytes_s=50.0, tier="scale_out")], name="joined")
    assert path(joined, 0, 2) == ["gpu0->gpu2"]
    assert joined.all_to_all_s(traffic(4, r0_r2=100)) == 2.0
    assert joined.all_to_all_s(traffic(4, r2_r0=100)) == 10.0  # the other way by the NIC, as before
    assert (joined.is_nominal, joined.node_of_G.tolist()) == (False, [0, 0, 1, 1])
    assert node.all_to_all_s(traffic(4, r0_r2=100)) == 10.0  # as it was
    assert node.with_links([], name="again").is_nominal


def test_vertices_by_their_names() -> None:
    cluster = gpu_cluster(SMALL, 4)
    assert (cluster.vertex("gpu3"), cluster.vertex("rank0"), cluster.vertex("nic2")) == (3, 0, "nic2")
    assert cluster.edges_between(0, "switch0") == [(0, "switch0"), ("switch0", 0)]
    assert cluster.edges_between(0, "switch1") == []
    assert cluster.edges_of("nic2") == [(2, "nic2"), ("leaf0", "nic2"), ("nic2", 2), ("nic2", "leaf0")]
    assert set(cluster.neighbours("nic2")) == {2, "leaf0"}
    with pytest.raises(InputError, match="there is no gpu4; the ranks are gpu0 to gpu3"):
        cluster.vertex("gpu4")
    with pytest.raises(InputError, match="there is no wire; there are only ranks"):
        cpu_box(2).vertex("wire")


def test_bytes_by_tier_count_each_pair_once() -> None:
    rows_LGG = np.ones((3, 4, 4), dtype=np.int32)
    # A layer: two nodes with 2 pairs inside each, 2 * 2 * 2 = 8 pairs between them; three layers.
    assert gpu_cluster(SMALL, 4).bytes_by_tier(rows_LGG) == {"scale_up": 12.0, "scale_out": 24.0}


def test_ranks_that_cannot_reach_each_other_are_named() -> None:
    graph: nx.DiGraph[object] = nx.DiGraph()
    graph.add_edge(0, 1, bandwidth_bytes_s=1.0, latency_s=0.0)
    with pytest.raises(InputError, match="cluster one-way: no path from gpu1 to gpu0; every rank must reach"):
        Cluster(name="one-way", graph=graph, ranks=2, device=None).all_to_all_s(np.ones((2, 2)))


@pytest.mark.parametrize("name", sorted(PRESET_CLUSTERS))
def test_every_preset_makes_a_cluster(name: str) -> None:
    preset = PRESET_CLUSTERS[name]
    cluster = preset_cluster(name)
    assert cluster.ranks == preset.ranks
    assert cluster.nodes == -(-preset.ranks // device(preset.device).ranks_per_node)
    assert cluster.all_to_all_s(np.full((preset.ranks, preset.ranks), 1e6)) > 0


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=f"unknown cluster 'h100'; known are {', '.join(PRESET_CLUSTERS)}"):
        preset_cluster("h100")


def test_a_fabric_is_one_of_three_and_oversubscription_at_least_one() -> None:
    with pytest.raises(InputError, match="unknown fabric 'torus'; known are rail, fat_tree, flat"):
        gpu_cluster(SMALL, 4, fabric="torus")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"oversubscription 0.5; it must be at least 1 \(non-blocking\)"):
        gpu_cluster(SMALL, 4, oversubscription=0.5)

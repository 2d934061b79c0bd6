"""Max-min fair flows by hand, against a simulation of one flow's end at a time, and their laws."""

from dataclasses import replace
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cost_models.cluster import Cluster, cpu_box, gpu_cluster
from cost_models.degrade import degrade
from cost_models.devices import device
from sim.flows import max_min_makespan_s, transfer

H100 = device("h100_sxm")
# Two GPUs in a node, 100 bytes/s inside it and 10 bytes/s from each NIC.
SMALL = replace(H100, name="small", scale_up=100.0, scale_out=10.0, host_bandwidth=5.0, ranks_per_node=2)
LONE = replace(SMALL, scale_out=1.0, ranks_per_node=1)  # a GPU a node, 1 byte/s


def ring(ranks: int, *, bandwidth_bytes_s: float = 10.0, latency_s: float = 0.0) -> Cluster:
    """A one-way ring: rank r sends to r + 1 only."""
    graph: nx.DiGraph[object] = nx.DiGraph()
    for rank in range(ranks):
        graph.add_edge(rank, (rank + 1) % ranks, bandwidth_bytes_s=bandwidth_bytes_s, latency_s=latency_s)
    return Cluster(name="ring", graph=graph, ranks=ranks, device=None)


def traffic(ranks: int, **bytes_by_pair: float) -> NDArray[np.float64]:
    """`traffic(4, r0_r1=100)`: bytes from rank 0 to rank 1."""
    bytes_GG = np.zeros((ranks, ranks))
    for pair, size in bytes_by_pair.items():
        source, destination = (int(rank[1:]) for rank in pair.split("_"))
        bytes_GG[source, destination] = size
    return bytes_GG


def exact_makespan_s(cluster: Cluster, bytes_GG: NDArray[np.float64]) -> float:
    """One flow's end after the other, fair rates by the book, over every link of the paths."""
    path_of = {
        pair: cluster.routes.paths.of(pair) for pair in np.flatnonzero(bytes_GG) if pair % (cluster.ranks + 1) != 0
    }
    left = {pair: float(bytes_GG.flat[pair]) for pair in path_of}
    elapsed_s = 0.0
    while left:
        rates: dict[Any, float] = {}
        free_X = cluster.links.bandwidth_X.copy()
        while len(rates) < len(left):
            open_X = np.zeros(free_X.size)
            for pair in left.keys() - rates.keys():
                open_X[path_of[pair]] += 1
            fair_X = np.where(open_X > 0, free_X / np.maximum(open_X, 1), np.inf)
            fullest = fair_X.argmin()
            for pair in left.keys() - rates.keys():
                if fullest in path_of[pair]:
                    rates[pair] = fair_X[fullest]
                    free_X[path_of[pair]] -= fair_X[fullest]
        seconds = min(left[pair] / rates[pair] for pair in left)
        elapsed_s += seconds
        left = {pair: size - rates[pair] * seconds for pair, size in left.items()}
        left = {pair: size for pair, size in left.items() if size > 1e-9 * bytes_GG.flat[pair]}
    return elapsed_s


def test_flows_share_a_link_evenly_and_speed_up_when_one_ends() -> None:
    # 0 -> 1 and 0 -> 2 share the ring's first link, 10 bytes/s: 5 each. 10 bytes are through at 2 s, and the other
    # flow, which then has 20 of its 30 left, goes on at 10 bytes/s: 2 + 2 = 4 s.
    sizes = traffic(4, r0_r1=10, r0_r2=30)
    assert max_min_makespan_s(ring(4), sizes) == 4.0
    at_one = transfer(ring(4), sizes, 1.0)
    assert (at_one.elapsed_s, at_one.remaining_GG[0].tolist()) == (1.0, [0.0, 5.0, 25.0, 0.0])
    at_three = transfer(ring(4), sizes, 3.0)
    assert (at_three.elapsed_s, at_three.remaining_GG[0].tolist()) == (3.0, [0.0, 0.0, 10.0, 0.0])
    assert transfer(ring(4), sizes, 99.0).elapsed_s == 4.0
    assert transfer(ring(4), sizes, 0.0).remaining_GG.tolist() == sizes.tolist()


def test_all_to_all_on_a_ring_of_four() -> None:
    # Each link has 1 + 2 + 3 = 6 flows of 100 bytes at 10/6 bytes/s: all end at 60 s.
    assert max_min_makespan_s(ring(4), np.full((4, 4), 100.0)) == pytest.approx(60.0, rel=1e-12)


def test_two_nodes_of_two() -> None:
    # Into rank 2's NIC come 100 bytes from each rank of the other node, 10 bytes/s in all: 20 s. Inside the nodes
    # 1000 bytes at 100 bytes/s take 10 s, beside it.
    sizes = traffic(4, r0_r2=100, r1_r2=100, r0_r1=1000, r2_r3=1000)
    assert max_min_makespan_s(gpu_cluster(SMALL, 4), sizes) == 20.0


def test_an_oversubscribed_spine() -> None:
    # Four nodes of two at 2:1: leaf 0 goes up with 4 * 10 / 2 = 20 bytes/s. 0 -> 2 stays on its rail.
    cluster = gpu_cluster(SMALL, 8, oversubscription=2.0)
    sizes = traffic(8, r0_r3=100, r2_r5=100, r4_r7=100, r0_r2=50)
    # NIC 0 has two flows at 5; that leaves 15 of the uplink to the other two, 7.5 each. At 10 s 0 -> 2 is through,
    # and 50, 25 and 25 are left to go up at 20/3 each. The two are through after 25 / (20/3) = 3.75 s; the last has
    # 25 left and the NIC to itself: 2.5 s. The bound is 150 / 10 = 300 / 20 = 15 s.
    assert max_min_makespan_s(cluster, sizes) == pytest.approx(10 + 3.75 + 2.5, rel=1e-12)
    assert cluster.all_to_all_s(sizes) == 15.0


def test_fair_flows_can_miss_the_bound_where_each_crosses_two_links() -> None:
    # Four GPUs with a NIC of 1 byte/s each. Rank 0 sends 1 + 2 + 4, rank 1 sends 4 + 3, rank 3 gets 4 + 3: 7 s.
    cluster = gpu_cluster(LONE, 4)
    sizes = traffic(4, r0_r1=1, r0_r2=2, r0_r3=4, r1_r0=4, r1_r3=3)
    assert cluster.all_to_all_s(sizes) == 7.0
    # To 3 s rank 0 sends a third each, rank 1 halves: left 0, 1, 3 and 2.5, 1.5. To 5 s halves: 0, 2 and 1.5, 0.5.
    # To 6 s 0 -> 3 could have all of its own NIC but shares rank 3's with 1 -> 3, which rank 1 holds at a half. Then
    # 1.5 bytes of it are left, alone: 7.5 s.
    assert max_min_makespan_s(cluster, sizes) == pytest.approx(7.5, rel=1e-12)


def test_latency_is_added_once() -> None:
    slow = ring(4, latency_s=0.5)
    sizes = traffic(4, r0_r1=10, r0_r3=30)
    assert max_min_makespan_s(slow, sizes) == 4.0 + 3 * 0.5
    half = transfer(slow, sizes, 1.0)
    assert half.elapsed_s == 1.0
    assert half.elapsed_s + max_min_makespan_s(slow, half.remaining_GG) == 5.5
    assert transfer(slow, sizes, 5.0).elapsed_s == 5.5


def test_a_nic_that_slows_in_the_middle() -> None:
    before = gpu_cluster(SMALL, 4)
    half = transfer(before, traffic(4, r0_r2=100), 2.0)
    # 80 of 100 bytes are left after 2 s at 10 bytes/s, and then 5 bytes/s.
    assert half.remaining_GG[0, 2] == 80.0
    after = degrade(before, ["nic0=0.5"])
    assert half.elapsed_s + max_min_makespan_s(after, half.remaining_GG) == 2.0 + 16.0


def test_a_nic_that_is_lost_sends_by_its_neighbour() -> None:
    # 0 -> 2 and 1 -> 3 then share NIC 0.
    lost = degrade(gpu_cluster(SMALL, 4), ["nic1=lost"])
    assert max_min_makespan_s(lost, traffic(4, r0_r2=100, r1_r3=100)) == 20.0


def test_what_crosses_no_link_takes_no_time() -> None:
    for cluster in (gpu_cluster(SMALL, 1), cpu_box(2), ring(3, latency_s=1.0)):
        assert max_min_makespan_s(cluster, np.diag(np.full(cluster.ranks, 1e9))) == 0.0
        assert max_min_makespan_s(cluster, np.zeros((cluster.ranks, cluster.ranks))) == 0.0


CLUSTERS = {
    "rail": gpu_cluster(replace(H100, ranks_per_node=4), 16),
    "rail 2:1": gpu_cluster(replace(H100, ranks_per_node=4), 16, oversubscription=2.0),
    "pairs 4:1": gpu_cluster(replace(H100, ranks_per_node=2), 12, oversubscription=4.0),
    "lost nic": degrade(gpu_cluster(replace(H100, ranks_per_node=4), 16), ["nic5=lost", "leaf2=0.3"]),
    "ring": ring(8),
}


@pytest.mark.parametrize("name", sorted(CLUSTERS))
def test_one_flow_at_a_time_is_the_book_and_batches_are_within_a_thousandth(name: str) -> None:
    cluster = CLUSTERS[name]
    rng = np.random.default_rng(0)
    for bytes_GG in (
        rng.random((cluster.ranks, cluster.ranks)) * 1e6,
        rng.lognormal(0, 1, (cluster.ranks, cluster.ranks)) * 1e6,
    ):
        exact_s = exact_makespan_s(cluster, bytes_GG)
        assert max_min_makespan_s(cluster, bytes_GG, batch=0.0) == pytest.approx(exact_s, rel=1e-6)
        assert max_min_makespan_s(cluster, bytes_GG) == pytest.approx(exact_s, rel=1e-3)


@pytest.mark.parametrize("oversubscription", [1.0, 2.0])
@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
def test_batches_of_4032_flows_are_within_a_thousandth(oversubscription: float, spread: float) -> None:
    cluster = gpu_cluster(H100, 64, oversubscription=oversubscription)
    bytes_GG = np.random.default_rng(0).lognormal(0, spread, (64, 64)) * 1e6
    exact_s = max_min_makespan_s(cluster, bytes_GG, batch=0.0)
    assert max_min_makespan_s(cluster, bytes_GG) == pytest.approx(exact_s, rel=1e-3)


@st.composite
def some_traffic(draw: st.DrawFn) -> tuple[Cluster, NDArray[np.float64]]:
    cluster = CLUSTERS[draw(st.sampled_from(sorted(CLUSTERS)))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes_GG = rng.lognormal(0, draw(st.floats(0, 2)), (cluster.ranks, cluster.ranks))
    return cluster, 1e6 * sizes_GG * (rng.random(sizes_GG.shape) < draw(st.floats(0.05, 1)))


@settings(deadline=None)
@given(some_traffic())
def test_no_faster_than_the_busiest_link_and_no_slower_than_a_path_s_links_in_turn(case: Any) -> None:
    cluster, bytes_GG = case
    seconds = max_min_makespan_s(cluster, bytes_GG)
    assert seconds >= cluster.all_to_all_s(bytes_GG)
    loaded, bandwidth_X = cluster.routes.loaded, cluster.links.bandwidth_X
    pairs = [pair for pair in np.flatnonzero(bytes_GG) if pair % (cluster.ranks + 1) != 0]
    load_X = np.zeros(bandwidth_X.size)
    for pair in pairs:
        load_X[loaded.of(pair)] += bytes_GG.flat[pair]
    in_turn_s = max(((load_X / bandwidth_X)[loaded.of(pair)].sum() for pair in pairs), default=0.0)
    assert seconds <= in_turn_s * (1 + 1e-3)


@settings(deadline=None)
@given(some_traffic(), st.floats(1, 100))
def test_all_links_wider_never_hurt(case: Any, factor: float) -> None:
    cluster, bytes_GG = case
    graph = cluster.graph.copy()
    for _, _, link in graph.edges(data=True):
        link["bandwidth_bytes_s"] *= factor
    wider = Cluster(name="wider", graph=graph, ranks=cluster.ranks, device=None)
    assert max_min_makespan_s(wider, bytes_GG) <= max_min_makespan_s(cluster, bytes_GG) * (1 + 1e-6)


@settings(deadline=None)
@given(some_traffic(), st.floats(0, 1.2))
def test_a_transfer_in_two_parts_moves_the_same_bytes_in_the_same_time(case: Any, share: float) -> None:
    cluster, bytes_GG = case
    whole_s = max_min_makespan_s(cluster, bytes_GG)
    first = transfer(cluster, bytes_GG, share * whole_s)
    assert (first.remaining_GG >= 0).all()
    assert (first.remaining_GG <= bytes_GG).all()
    assert first.elapsed_s == pytest.approx(min(share, 1) * whole_s, rel=1e-3)
    # No link carries more than it can.
    moved_GG = bytes_GG - first.remaining_GG
    np.fill_diagonal(moved_GG, 0.0)
    assert cluster.all_to_all_s(moved_GG) <= first.elapsed_s * (1 + 1e-6) + whole_s * 1e-9
    both_s = first.elapsed_s + max_min_makespan_s(cluster, first.remaining_GG)
    assert both_s == pytest.approx(whole_s, rel=2e-3)


@settings(deadline=None)
@given(some_traffic())
def test_the_same_traffic_takes_the_same_time_to_the_last_bit(case: Any) -> None:
    cluster, bytes_GG = case
    assert max_min_makespan_s(cluster, bytes_GG) == max_min_makespan_s(cluster, bytes_GG.copy())

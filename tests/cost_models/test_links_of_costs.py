"""Measured exchanges over links that are not the datasheet's: what waits stays, what moves takes longer."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest

from cost_models.cluster import Cluster, gpu_cluster
from cost_models.degrade import degrade
from cost_models.devices import DEVICES
from cost_models.kernel_costs import KernelCosts
from cost_models.ops import TokenExchange
from cost_models.traffic import Traffic

Mode = Literal["normal", "low_latency"]
H100 = DEVICES["h100_sxm"]
TWO_NODES = gpu_cluster(H100, 16)
MODES: tuple[Mode, ...] = ("low_latency", "normal")
DIRECTIONS = ("dispatch", "combine")


def costs(cluster: Cluster) -> KernelCosts:
    return KernelCosts.shipped(cluster, "sglang")


NOMINAL = costs(TWO_NODES)


def exchange(mode: Mode, direction: Any = "dispatch", *, tokens: int = 1024, rows_GG: Any = None) -> TokenExchange:
    """Even traffic of 16 ranks on two nodes: half of a token's eight copies go to the other node."""
    rows_XGG = np.full((1, 16, 16), tokens / 2) if rows_GG is None else rows_GG[None]
    node_rows_XGN = np.full((1, 16, 2), float(tokens)) if mode == "normal" else None
    return TokenExchange(
        tokens_X=np.array([tokens]),
        hidden=7168,
        top_k=8,
        experts=256,
        ranks_X=np.array(16),
        nodes_X=np.array(2),
        direction=direction,
        mode=mode,
        dtype="fp8",
        sms_X=24 if mode == "normal" else 0,
        traffic=Traffic.of(rows_XGG, nodes=2, node_rows_XGN=node_rows_XGN),
    )


def nothing(mode: Mode, direction: Any = "dispatch") -> TokenExchange:
    return exchange(mode, direction, tokens=0)


def parts_s(mode: Mode, direction: Any = "dispatch") -> tuple[float, float]:
    """Of the exchange on the measured links: what it takes to exchange nothing, and the rest, which moves."""
    fixed_s = NOMINAL.seconds(nothing(mode, direction))[0]
    return fixed_s, NOMINAL.seconds(exchange(mode, direction))[0] - fixed_s


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_over_a_nic_at_half_speed_what_moves_takes_twice_as_long(mode: Mode, direction: str) -> None:
    # Low latency: 8 of 16 rows of a token leave by a NIC of 50 GB/s, 7 by NVLink at 450: the NIC is the bottleneck.
    # Normal: one copy of each token by the NIC, and 7 of the 16 x 512 rows of a rank by NVLink; again the NIC
    # (1024 / 50 = 20.5 against 7168 / 450 = 15.9). At 25 GB/s it takes twice as long, and all wait for it.
    fixed_s, moving_s = parts_s(mode, direction)
    half = costs(degrade(TWO_NODES, ["nic3=0.5"])).seconds(exchange(mode, direction))[0]
    assert half == pytest.approx(fixed_s + 2 * moving_s, rel=1e-9)
    assert fixed_s > 0
    assert moving_s > fixed_s


@pytest.mark.parametrize("mode", MODES)
def test_an_exchange_of_nothing_takes_no_longer_over_slow_links(mode: Mode) -> None:
    slow = costs(degrade(TWO_NODES, ["nic3=0.1", "switch0=0.5"]))
    assert slow.seconds(nothing(mode)) == NOMINAL.seconds(nothing(mode))


def test_a_slow_link_that_is_not_the_bottleneck_changes_nothing() -> None:
    # NVLink at half: 7 x 512 rows at 225 GB/s are 15.9, the 8 x 512 rows of the NIC at 50 GB/s are 81.9.
    slow = costs(degrade(TWO_NODES, ["gpu3-switch0=0.5"]))
    given = exchange("low_latency")
    np.testing.assert_allclose(slow.seconds(given), NOMINAL.seconds(given), rtol=1e-9)


def test_traffic_that_avoids_the_slow_link_is_not_slower() -> None:
    rows_GG = np.full((16, 16), 512.0)
    rows_GG[3, 8:] = rows_GG[8:, 3] = 0
    slow, given = costs(degrade(TWO_NODES, ["nic3=0.25"])), exchange("low_latency", rows_GG=rows_GG)
    np.testing.assert_allclose(slow.seconds(given), NOMINAL.seconds(given), rtol=1e-9)


@pytest.mark.parametrize(
    ("oversubscription", "slower"),
    [
        # A leaf has a NIC of either node, and 2 x 50 / 4 = 25 GB/s up. Of the 8 ranks of the other node one is on the
        # rail of the sender, 7 are not: 2 x 7 rows at 25 against 8 at 50 GB/s.
        (4.0, (14 / 25) / (8 / 50)),
        # At 100 / 1.1 GB/s up the NIC, 8 / 50 = 0.16, is slower than the uplink, 14 * 1.1 / 100 = 0.154.
        (1.1, 1.0),
    ],
)
def test_an_oversubscribed_spine_is_shared_by_its_nics(oversubscription: float, slower: float) -> None:
    fixed_s, moving_s = parts_s("low_latency")
    cluster = gpu_cluster(H100, 16, oversubscription=oversubscription)
    assert not cluster.is_nominal
    found = costs(cluster).seconds(exchange("low_latency"))[0]
    assert found == pytest.approx(fixed_s + slower * moving_s, rel=1e-9)


def test_on_rails_a_token_of_the_normal_mode_never_crosses_the_spine() -> None:
    # It goes to the rank of its source's number over there, on the same leaf.
    found = costs(gpu_cluster(H100, 16, oversubscription=8.0)).seconds(exchange("normal"))
    np.testing.assert_allclose(found, NOMINAL.seconds(exchange("normal")), rtol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_nominal_clusters_of_any_fabric_cost_the_same_to_the_bit(mode: Mode) -> None:
    given = exchange(mode)
    for cluster in (
        gpu_cluster(H100, 16, fabric="fat_tree"),
        gpu_cluster(H100, 16, fabric="fat_tree", oversubscription=4.0),  # both nodes are on one leaf
        gpu_cluster(H100, 16, fabric="flat"),
        gpu_cluster(H100, 16, host=False),
        degrade(TWO_NODES, []),
    ):
        assert cluster.is_nominal
        assert costs(cluster).seconds(given).tolist() == NOMINAL.seconds(given).tolist()


def test_links_matter_to_real_traffic_only() -> None:
    given = TokenExchange(
        tokens_X=np.array([1024]),
        hidden=7168,
        top_k=8,
        experts=256,
        ranks_X=np.array(16),
        nodes_X=np.array(2),
        direction="dispatch",
        mode="low_latency",
        dtype="fp8",
    )
    assert costs(degrade(TWO_NODES, ["nic3=0.5"])).seconds(given) == NOMINAL.seconds(given)


def test_a_gpu_that_computes_slowly_sends_as_fast() -> None:
    given = exchange("low_latency")
    np.testing.assert_allclose(
        costs(degrade(TWO_NODES, ["gpu3=0.5"])).seconds(given), NOMINAL.seconds(given), rtol=1e-9
    )


def test_intervals_move_with_what_they_surround() -> None:
    slow = costs(degrade(TWO_NODES, ["nic3=0.5"])).predict(exchange("low_latency"))
    assert slow.low_s_X is not None
    assert slow.high_s_X is not None
    assert slow.low_s_X[0] < slow.seconds_X[0] < slow.high_s_X[0]


def test_latency_of_the_links_is_added_once() -> None:
    # Six links to the other node's other rail: gpu, NIC, leaf, spine, leaf, NIC, gpu; 1 us each.
    slow = costs(gpu_cluster(H100, 16, latency_s={"scale_up": 1e-6, "scale_out": 1e-6, "fabric": 1e-6}))
    for tokens in (1, 1024):
        given = exchange("low_latency", tokens=tokens)
        np.testing.assert_allclose(slow.seconds(given), NOMINAL.seconds(given) + 6e-6, rtol=1e-9)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_any_shape_of_exchanges_over_slow_links(mode: Mode, shape: tuple[int, ...]) -> None:
    one = exchange(mode)
    assert one.traffic is not None
    nodes = one.traffic.node_rows_XGN
    told = Traffic.of(
        np.broadcast_to(one.traffic.rows_XGG[0], (*shape, 16, 16)),
        nodes=2,
        node_rows_XGN=None if nodes is None else np.broadcast_to(nodes[0], (*shape, 16, 2)),
    )
    slow = costs(degrade(TWO_NODES, ["nic3=0.5"]))
    found_X = slow.seconds(replace(one, tokens_X=np.full(shape, 1024), traffic=told))
    np.testing.assert_allclose(found_X, np.full(shape, slow.seconds(one)[0]), rtol=1e-9)

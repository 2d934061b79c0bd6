"""Custom clusters as files: what they make, and what their errors say."""

from pathlib import Path

import pytest
from small_cluster import path, traffic

from cost_models.cluster import Cluster
from cost_models.cluster_file import read_cluster
from cost_models.devices import device
from traces.errors import InputError


def read(folder: Path, text: str) -> Cluster:
    file = folder / "mine.yaml"
    file.write_text(text)
    return read_cluster(file)


RING_OF_FOUR = """
device: h100_sxm
ranks: 4
links:
  - {from: gpu0, to: gpu1, bandwidth_bytes_s: 10, both_ways: false}
  - {from: gpu1, to: gpu2, bandwidth_bytes_s: 10, both_ways: false}
  - {from: gpu2, to: gpu3, bandwidth_bytes_s: 10, both_ways: false}
  - {from: gpu3, to: gpu0, bandwidth_bytes_s: 10, latency_s: 0.5, both_ways: false}
"""


def test_a_custom_ring_of_four(tmp_path: Path) -> None:
    cluster = read(tmp_path, RING_OF_FOUR)
    assert (cluster.name, cluster.ranks, cluster.nodes) == ("mine", 4, 1)
    # 2 -> 1 crosses three links of the one-way ring, one of them with a latency: 100 / 10 + 0.5.
    assert cluster.all_to_all_s(traffic(4, r2_r1=100)) == 10.5
    assert path(cluster, 2, 1) == ["gpu2->gpu3", "gpu3->gpu0", "gpu0->gpu1"]


def test_a_custom_device_and_fabric(tmp_path: Path) -> None:
    cluster = read(
        tmp_path,
        """
name: lab
device: {base: h100_sxm, scale_out: 25e9}
ranks: 8
ranks_per_node: 2
fabric: fat_tree
oversubscription: 2
latency_s: {scale_out: 1e-6}
links:
  - {from: gpu0, to: gpu2, bandwidth_bytes_s: 1e9, tier: scale_out}
  - {from: gpu1, to: nic1, bandwidth_bytes_s: 5e9, tier: scale_out}
degrade: [nic3=0.5]
""",
    )
    assert cluster.name == "lab with nic3=0.5"
    assert cluster.device is not None
    assert (cluster.device.name, cluster.device.ranks_per_node) == ("custom h100_sxm", 2)
    assert cluster.device.memory_bytes == device("h100_sxm").memory_bytes
    assert cluster.all_to_all_s(traffic(8, r4_r6=25e9)) == 1.0 + 4e-6  # one leaf, four links
    assert cluster.all_to_all_s(traffic(8, r0_r2=25e9)) == 25.0  # the cable of its own, shorter than the network
    assert cluster.all_to_all_s(traffic(8, r1_r6=25e9)) == 5.0 + 3e-6  # the link in place of NIC 1's
    assert cluster.all_to_all_s(traffic(8, r4_r3=25e9)) == 2.0 + 4e-6
    assert not cluster.is_nominal


def test_a_custom_file_without_anything_custom_is_the_preset(tmp_path: Path) -> None:
    cluster = read(tmp_path, "device: h100_sxm\nranks: 16\n")
    assert (cluster.name, cluster.nodes, cluster.is_nominal) == ("16 x h100_sxm", 2, True)
    assert cluster.device == device("h100_sxm")


def test_a_device_of_its_own_needs_all_its_fields(tmp_path: Path) -> None:
    cluster = read(
        tmp_path,
        """
device: {name: npu, memory_bytes: 64e9, memory_bandwidth: 1e12, peak_flops: {2: 1e14}, scale_up: 100e9,
  scale_out: 10e9, ranks_per_node: 4, sms: 32, l2_bytes: 32e6, host_bandwidth: 32e9}
ranks: 8
""",
    )
    assert cluster.device is not None
    assert (cluster.name, cluster.device.peak(2.0)) == ("8 x npu", 1e14)


BASE = "device: h100_sxm\nranks: 4\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[", "not YAML: while parsing a flow node"),
        ("- 1", "expected a mapping with device, ranks, …; found list"),
        ("device: h100_sxm", "ranks: missing; add it"),
        (BASE + "rank: 3", "rank: unknown key; remove it or correct its name"),
        ("device: h100\nranks: 4", "device: unknown gpu 'h100'; known are a100_sxm, "),
        ("device: {sms: 4}\nranks: 4", "device: without a base it needs name, memory_bytes, memory_bandwidth, "),
        ("device: h100_sxm\nranks: 0", "ranks: input should be greater than or equal to 1 (it is 0)"),
        (BASE + "fabric: torus", "fabric: input should be 'rail', 'fat_tree' or 'flat' (it is 'torus')"),
        (BASE + "oversubscription: 0", "oversubscription: input should be greater than or equal to 1 (it is 0)"),
        (
            BASE + "host: true\nlinks: [{from: gpu0, to: gpu1, bandwidth_bytes_s: 1}]",
            "host: of a fabric, and there are only links; name a fabric, or remove it",
        ),
        (BASE + "latency_s: {wifi: 1}", "latency_s.wifi.[key]: input should be 'scale_up', 'scale_out', "),
        (BASE + "links: [{from: gpu0, to: gpu1}]", "links.0.bandwidth_bytes_s: missing; add it"),
        (
            BASE + "links: [{from: gpu0, to: gpu4, bandwidth_bytes_s: 1}]",
            "links.0.to: 'gpu4' is no end of a link; ranks are gpu0 to gpu3, other names are letters, digits and . : _",
        ),
        (BASE + "links: [{from: a-b, to: gpu1, bandwidth_bytes_s: 1}]", "links.0.from: 'a-b' is no end of a link"),
        (BASE + "links: [{from: gpu1, to: rank1, bandwidth_bytes_s: 1}]", "links.0.to: 'rank1' is where the link"),
        (BASE + "links: [{from: gpu0, to: gpu1, bandwidth_bytes_s: 1}]", "no path from gpu0 to gpu2; every rank must"),
        (BASE + "degrade: [gpu9=0.5]", "degrade 'gpu9=0.5': there is no gpu9; the ranks are gpu0 to gpu3"),
    ],
)
def test_errors_in_a_custom_file_name_the_field_and_the_mend(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'mine.yaml'}: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_custom_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such cluster file; presets are a100_node, "):
        read_cluster(tmp_path / "nowhere.yaml")

"""The picture of a cluster: what it shows, what it counts, and what is red."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from cost_models.cluster import PRESET_CLUSTERS, Cluster, cpu_box, gpu_cluster, preset_cluster
from cost_models.cluster_file import read_cluster
from cost_models.degrade import degrade
from cost_models.devices import device
from tuner.cluster_svg import cluster_svg

H100 = device("h100_sxm")
RED = "#c81e1e"
SVG = "{http://www.w3.org/2000/svg}"


def draw(cluster: Cluster) -> ElementTree.Element:
    return ElementTree.fromstring(cluster_svg(cluster))


def words(picture: ElementTree.Element) -> list[str]:
    """All that can be read in a picture, tooltips apart."""
    return ["".join(text.itertext()) for text in picture.iter(f"{SVG}text")]


def red_words(picture: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in picture.iter(f"{SVG}text") if text.get("fill") == RED]


def links(picture: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """The drawn links by their tooltips."""
    return {
        title.text or "": path for path in picture.iter(f"{SVG}path") if (title := path.find(f"{SVG}title")) is not None
    }


def test_two_nodes_are_drawn_whole() -> None:
    picture = draw(gpu_cluster(H100, 16))
    read = words(picture)
    for name in ("16 x h100_sxm", "16 × h100_sxm on 2 nodes", "spine", "node 0", "node 1", "switch1", "host0"):
        assert name in read
    for rank in range(16):
        assert {f"gpu{rank}", f"nic{rank}", f"leaf{rank % 8}"} <= set(read)
    # A GPU has links to its switch, NIC and host; NICs to leaves; leaves to the spine: 16 * 4 + 8.
    assert len(links(picture)) == 72
    assert "switch0 – gpu3: 450 GB/s" in links(picture)
    assert "scale-up (NVLink): 450 GB/s each way" in read
    assert "fabric (between switches): 100 GB/s each way" in read  # two NICs of 50
    assert RED not in cluster_svg(gpu_cluster(H100, 16))


def test_wider_links_are_thicker() -> None:
    drawn = links(draw(gpu_cluster(H100, 16)))
    width = {name: float(path.get("stroke-width", "0")) for name, path in drawn.items()}
    assert width["gpu0 – nic0: 50 GB/s"] < width["leaf0 – spine: 100 GB/s"] < width["switch0 – gpu0: 450 GB/s"]


def test_a_big_cluster_is_counted_where_it_is_not_drawn() -> None:
    read = words(draw(preset_cluster("gb200_pod")))
    assert "… 5 more nodes" in read
    assert "node 0, … 64 more GPUs" in read
    assert "gpu8" not in read
    assert len(read) < 120


def test_what_is_slow_is_red_and_what_is_lost_is_dashed() -> None:
    cluster = degrade(gpu_cluster(H100, 16), ["gpu3=0.8", "nic5=0.5", "nic9-leaf1=0.25", "gpu12=lost"])
    picture = draw(cluster)
    read = words(picture)
    assert "Degraded: gpu3=0.8, nic5=0.5, nic9-leaf1=0.25, gpu12=lost" in read
    assert "Numbers are those from before; 15 ranks are left and take 0 to 14." in read
    assert sorted(red_words(picture)) == sorted(
        ["gpu3", "×0.8", "nic5", "×0.5", "×0.25", "gpu12", "lost"]  # a link says nothing that one of its ends says
    )
    drawn = links(picture)
    slow = drawn["nic9 – leaf1: 50 GB/s, 0.25 of it left"]
    lost = drawn["switch1 – gpu12: 450 GB/s, lost"]
    assert (slow.get("stroke"), slow.get("stroke-dasharray")) == (RED, None)
    assert (lost.get("stroke"), lost.get("stroke-dasharray")) == (RED, "5 4")
    assert drawn["switch0 – gpu3: 450 GB/s"].get("stroke") != RED  # it computes slowly, it sends as ever


def test_what_is_not_well_is_drawn_however_far_back() -> None:
    cluster = degrade(preset_cluster("h100_pod"), ["leaf7=0.9", "gpu201=0.5"])
    picture = draw(cluster)
    assert "gpu201" in red_words(picture)
    assert "node 25" in words(picture)
    assert "… 6 more nodes" in words(picture)
    rack = degrade(preset_cluster("gb200_rack"), ["gpu70=lost"])
    assert "gpu70" in red_words(draw(rack))


def test_one_way_links_have_arrows_and_custom_names_are_escaped(tmp_path: Path) -> None:
    file = tmp_path / "ring.yaml"
    file.write_text(
        """
name: a <small> ring & more
device: h100_sxm
ranks: 3
links:
  - {from: gpu0, to: gpu1, bandwidth_bytes_s: 10, both_ways: false}
  - {from: gpu1, to: gpu2, bandwidth_bytes_s: 10, both_ways: false}
  - {from: gpu2, to: gpu0, bandwidth_bytes_s: 2e6, both_ways: false}
"""
    )
    picture = draw(read_cluster(file))
    assert "a <small> ring & more" in words(picture)
    assert "scale-up (NVLink): 10 B/s to 2 MB/s" in words(picture)
    drawn = links(picture)
    assert drawn["gpu0 → gpu1: 10 B/s"].get("marker-end") == "url(#arrow)"
    assert drawn["gpu2 → gpu0: 2 MB/s"].get("marker-start") == "url(#arrow)"  # drawn from left to right
    assert drawn["gpu2 → gpu0: 2 MB/s"].get("marker-end") is None


def test_processes_of_one_host_are_boxes_without_links() -> None:
    picture = draw(degrade(cpu_box(2), ["rank1=0.5"]))
    assert links(picture) == {}
    assert red_words(picture) == ["gpu1", "×0.5"]


def test_a_long_list_of_what_is_degraded_is_cut() -> None:
    changes = [f"{what}{rank}=0.{rank:02}" for what in ("gpu", "nic") for rank in range(1, 64)]
    cluster = degrade(gpu_cluster(H100, 64), changes)
    read = words(draw(cluster))
    assert any(line.startswith("Degraded: gpu1=0.01, ") for line in read)
    assert any(line.startswith("… ") and line.endswith(" more lines") for line in read)


@pytest.mark.parametrize("name", sorted(PRESET_CLUSTERS))
def test_every_preset_is_one_document_that_needs_nothing_else(name: str) -> None:
    text = cluster_svg(preset_cluster(name))
    picture = ElementTree.fromstring(text)
    assert text.count("http") == 1  # the namespace
    assert text == cluster_svg(preset_cluster(name))
    # All boxes lie inside the picture.
    width = float(picture.get("width", "0"))
    for box in picture.iter(f"{SVG}rect"):
        if box.get("x") is not None:
            assert 0 <= float(box.get("x", "0")) <= float(box.get("x", "0")) + float(box.get("width", "0")) <= width

"""Clusters with parts that are slow or lost."""

import pickle

import numpy as np
import pytest
from small_cluster import SMALL, path, traffic

from cost_models.cluster import cpu_box, gpu_cluster
from cost_models.degrade import degrade
from traces.errors import InputError


def test_a_cluster_can_go_to_another_process() -> None:
    cluster = degrade(gpu_cluster(SMALL, 4), ["nic1=0.5"])
    again = pickle.loads(pickle.dumps(cluster))
    assert again.all_to_all_s(np.ones((4, 4))) == cluster.all_to_all_s(np.ones((4, 4)))


def test_a_slow_gpu_computes_slower_and_sends_as_fast() -> None:
    healthy = gpu_cluster(SMALL, 4)
    slow = degrade(healthy, ["gpu3=0.8"])
    assert slow.speed_G.tolist() == [1.0, 1.0, 1.0, 0.8]
    assert slow.all_to_all_s(np.ones((4, 4))) == healthy.all_to_all_s(np.ones((4, 4)))
    assert slow.name == "4 x small with gpu3=0.8"
    assert slow.healthy is healthy
    assert healthy.speed_G.tolist() == [1.0] * 4


def test_a_slow_nic_is_slow_both_ways() -> None:
    slow = degrade(gpu_cluster(SMALL, 4), ["nic1=0.5"])
    assert slow.all_to_all_s(traffic(4, r1_r3=100)) == 20.0  # 100 / (10 / 2)
    assert slow.all_to_all_s(traffic(4, r3_r1=100)) == 20.0
    assert slow.all_to_all_s(traffic(4, r0_r2=100)) == 10.0


def test_a_slow_link_is_one_link() -> None:
    slow = degrade(gpu_cluster(SMALL, 4), ["link gpu1-switch0=0.25", "nic0=0.5", "nic0-leaf0=0.5"])
    assert slow.all_to_all_s(traffic(4, r0_r1=100)) == 4.0  # 100 / (100 / 4)
    assert slow.all_to_all_s(traffic(4, r0_r2=100)) == 40.0  # factors multiply: 100 / (10 / 4)


def test_a_gpu_without_a_nic_sends_by_its_neighbours() -> None:
    lost = degrade(gpu_cluster(SMALL, 4), ["nic1=0"])
    assert path(lost, 1, 3) == [
        *("gpu1->switch0", "switch0->gpu0", "gpu0->nic0", "nic0->leaf0"),
        *("leaf0->spine", "spine->leaf1", "leaf1->nic3", "nic3->gpu3"),
    ]
    assert lost.all_to_all_s(traffic(4, r1_r3=100)) == 10.0
    assert lost.all_to_all_s(traffic(4, r1_r3=100, r0_r2=100)) == 20.0  # both by NIC 0: 200 / 10
    # Traffic to it comes by the NIC of its node on the sender's rail.
    assert path(lost, 2, 1)[-4:] == ["leaf0->nic0", "nic0->gpu0", "gpu0->switch0", "switch0->gpu1"]


def test_without_nvlink_a_gpu_sends_by_the_host() -> None:
    lost = degrade(gpu_cluster(SMALL, 4), ["gpu1-switch0=lost"])
    assert path(lost, 0, 1) == ["gpu0->host0", "host0->gpu1"]
    assert lost.all_to_all_s(traffic(4, r0_r1=100)) == 20.0  # 100 / 5


def test_ranks_move_up_by_one_lost_and_keep_their_nodes() -> None:
    healthy = gpu_cluster(SMALL, 6)
    lost = degrade(healthy, ["rank1=lost", "gpu4=0.5"])  # all names are those of before
    assert (lost.ranks, lost.nodes, lost.node_of_G.tolist()) == (5, 3, [0, 1, 1, 2, 2])
    assert lost.was_G.tolist() == [0, 2, 3, 4, 5]
    assert lost.speed_G.tolist() == [1.0, 1.0, 1.0, 0.5, 1.0]
    assert path(lost, 1, 3) == ["gpu1->nic2", "nic2->leaf0", "leaf0->nic4", "nic4->gpu3"]
    assert lost.all_to_all_s(traffic(5, r0_r1=100)) == 10.0
    again = degrade(lost, ["gpu0=0", "gpu1=0", "gpu2=0"])  # a whole node, and the rest of another
    assert (again.ranks, again.nodes, again.node_of_G.tolist(), again.was_G.tolist()) == (2, 1, [0, 0], [4, 5])
    assert again.healthy is healthy
    assert again.name == "6 x small with rank1=lost, gpu4=0.5, gpu0=0, gpu1=0, gpu2=0"


def test_nothing_degraded_is_the_same_cluster() -> None:
    same = degrade(gpu_cluster(SMALL, 4), [])
    assert (same.name, same.is_nominal) == ("4 x small", True)
    assert degrade(gpu_cluster(SMALL, 4), ["nic1=1.0", "gpu2=1"]).is_nominal


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (["gpu3"], "degrade 'gpu3': not of the form what=how, as gpu3=0.8, nic5=lost or nic5-leaf5=0.25"),
        (["gpu3=slow"], "degrade 'gpu3=slow': 'slow' is neither lost nor a share between 0 and 1"),
        (["gpu3=1.5"], "degrade 'gpu3=1.5': '1.5' is neither lost nor a share between 0 and 1"),
        (["gpu3=nan"], "degrade 'gpu3=nan': 'nan' is neither"),
        (["gpu4=0.8"], "degrade 'gpu4=0.8': there is no gpu4; the ranks are gpu0 to gpu3"),
        (["nic9=0.8"], "degrade 'nic9=0.8': there is no nic9; there are nic3, nic2, nic1"),
        (["nic1-leaf0=0.5"], "degrade 'nic1-leaf0=0.5': nic1 has no link to leaf0; it has to gpu1, leaf1"),
        (["gpu3=0.5", "rank3=0.5"], "degrade 'rank3=0.5': gpu3 is named twice; keep one"),
        (["switch0=0", "host0=0", "nic0=0"], "no path from gpu0 to gpu1; every rank must reach every other"),
        (["leaf0=0", "leaf1=lost"], "no path from gpu0 to gpu2"),
        ([f"gpu{rank}=lost" for rank in range(4)], "0 ranks; it needs at least 1"),
    ],
)
def test_what_cannot_be_degraded_is_said(changes: list[str], problem: str) -> None:
    with pytest.raises(InputError) as caught:
        degrade(gpu_cluster(SMALL, 4), changes)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_processes_of_one_host_can_be_slow() -> None:
    assert degrade(cpu_box(2), ["rank1=0.5"]).speed_G.tolist() == [1.0, 0.5]
    assert cpu_box(2).all_to_all_s(np.ones((2, 2))) == 0.0

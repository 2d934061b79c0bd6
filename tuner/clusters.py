"""A scenario's cluster: GPUs by name, a preset, a file of the user's own, or processes of this host."""

from cost_models.cluster import Cluster, cpu_box, gpu_cluster, preset_cluster
from cost_models.cluster_file import read_cluster
from cost_models.degrade import degrade
from cost_models.devices import device
from tuner.scenario import Scenario


def make_cluster(scenario: Scenario) -> Cluster:
    """The scenario's cluster, with what is slow or lost in it."""
    choice = scenario.cluster
    if choice.file is not None:
        cluster = read_cluster(choice.file)
    elif choice.preset is not None:
        cluster = preset_cluster(choice.preset)
    else:
        assert choice.device is not None
        assert choice.ranks is not None
        cluster = (
            cpu_box(choice.ranks)
            if choice.device == "cpu"
            else gpu_cluster(
                device(choice.device), choice.ranks, fabric=choice.fabric, oversubscription=choice.oversubscription
            )
        )
    return degrade(cluster, choice.degrade) if choice.degrade else cluster

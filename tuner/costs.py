"""A scenario's cost model: the datasheet, a calibration of this machine, or measured kernels."""

from pathlib import Path

from cost_models.calibrated import Calibrated
from cost_models.cluster import Cluster
from cost_models.kernel_costs import KernelCosts
from cost_models.kernel_profile import KernelProfile, is_kernel_profile, shipped_profile
from cost_models.ops import CostModel
from cost_models.profile import Profile
from cost_models.roofline import Roofline
from traces.errors import InputError
from traces.files import read_document
from tuner.clusters import make_cluster
from tuner.scenario import Scenario


def make_costs(scenario: Scenario, cluster: Cluster) -> CostModel:
    """The scenario's cost model; `InputError` if a profile is of another device."""
    if scenario.costs == "datasheet":
        return Roofline(cluster)
    paths = profile_paths(scenario)
    documents = [read_document(path) for path in paths]
    if all(map(is_kernel_profile, documents)):
        profiles = [KernelProfile.parse(document, path) for document, path in zip(documents, paths, strict=True)]
        for profile, path in zip(profiles, paths, strict=True):
            if cluster.device is None or not cluster.device.runs_kernels_of(profile.gpu):
                name = "cpu" if cluster.device is None else cluster.device.name
                raise InputError(
                    f"{path}: kernels of {profile.gpu}, the cluster's device is {name}; "
                    "use a profile of it, or another cluster.device"
                )
        return KernelCosts(profiles, cluster)
    if len(paths) > 1:
        raise InputError(f"{paths[0]}: only profiles of kernels go together; give a calibration of this machine alone")
    if scenario.execution.extent == "whole":
        raise InputError(
            f"{paths[0]}: a calibration of this machine prices the MoE layers alone; set execution.extent: moe"
        )
    return Calibrated(_of_this_machine(Profile.parse(documents[0], paths[0]), paths[0], cluster))


def profile_paths(scenario: Scenario) -> list[Path]:
    """The files that the scenario's costs stand in, in order of preference; none for a datasheet."""
    if scenario.costs == "datasheet":
        return []
    if isinstance(scenario.costs, Path):
        return [scenario.costs]
    device = make_cluster(scenario).device
    gpu = "cpu" if device is None else device.measured_as
    return [Path(name) if name.endswith(".json") else shipped_profile(gpu, name) for name in scenario.costs]


def calibration(scenario: Scenario) -> Profile | None:
    """The calibration of this machine that the scenario names, if it names one."""
    paths = profile_paths(scenario)
    if len(paths) != 1 or is_kernel_profile(document := read_document(paths[0])):
        return None
    return Profile.parse(document, paths[0])


def _of_this_machine(profile: Profile, path: Path, cluster: Cluster) -> Profile:
    needed = "cpu" if cluster.device is None else "cuda"
    if profile.device != needed:
        name = "cpu" if cluster.device is None else cluster.device.name
        raise InputError(
            f"{path}: measured on {profile.device} ranks, the cluster's are {name}; "
            f"use a profile of moeroute calibrate --device {needed}, or another cluster.device"
        )
    return profile

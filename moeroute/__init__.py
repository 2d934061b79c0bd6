"""moeroute: which routing policy, expert placement and layout a mixture-of-experts deployment should run.

What users import is listed in `__all__`; each name is loaded when it is first used, so that `import moeroute` is quick.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Adjustment": "router.policies.base",
    "Calibrated": "cost_models.calibrated",
    "Candidates": "router.candidates",
    "Capacity": "router.capacity",
    "Cluster": "cost_models.cluster",
    "Config": "tuner.config",
    "Context": "traces.context",
    "DeviceError": "traces.errors",
    "Disturbance": "sim.faults",
    "Execution": "sim.execution",
    "Fault": "sim.faults",
    "Hyperparameters": "router.nn.train",
    "Incremental": "router.rebalance",
    "InputError": "traces.errors",
    "KernelCosts": "cost_models.kernel_costs",
    "KernelProfile": "cost_models.kernel_profile",
    "LanguageModelConfig": "router.nn.lm",
    "Layout": "sim.layout",
    "ModelSpec": "traces.model",
    "MoerouteError": "traces.errors",
    "Never": "router.rebalance",
    "PLACEMENTS": "router.placement",
    "POLICIES": "router.policies",
    "PRESETS": "traces.presets",
    "Placement": "router.placement.base",
    "PlacementProblem": "router.placement.problem",
    "Profile": "cost_models.profile",
    "Replan": "router.rebalance",
    "Replay": "sim.replay",
    "ReplayedSteps": "sim.replayed_steps",
    "Replays": "tuner.replays",
    "Report": "sim.report",
    "Roofline": "cost_models.roofline",
    "RouteContext": "router.context",
    "RoutePrices": "router.prices",
    "RoutingHistory": "router.history",
    "RoutingPolicy": "router.policies",
    "RoutingTrace": "traces.trace",
    "Scenario": "tuner.scenario",
    "Selection": "router.policies.base",
    "Skip": "router.policies",
    "Space": "tuner.space",
    "SubNetwork": "router.subnetwork",
    "TopK": "router.policies",
    "TopP": "router.policies",
    "WhenItPays": "router.rebalance",
    "balancedness": "router.balance",
    "choose_part": "router.elastic.extract",
    "complete": "traces.completion",
    "cpu_box": "cost_models.cluster",
    "describe_policies": "router.policies",
    "device": "cost_models.devices",
    "extract": "router.elastic.extract",
    "gpu_cluster": "cost_models.cluster",
    "import_npz": "traces.formats.npz",
    "improve": "router.moves",
    "load_model": "router.nn.store",
    "lower": "sim.lower",
    "make_recipe": "router.elastic",
    "make_steps": "traces.batching",
    "place": "router.placement",
    "preset": "traces.presets",
    "preset_cluster": "cost_models.cluster",
    "rank_loads_LG": "router.balance",
    "read_scenario": "tuner.scenario",
    "read_trace": "traces.store",
    "rebalance_over_time": "sim.rebalancing",
    "relabel": "router.relabel",
    "size_of": "router.elastic.measure",
    "split_requests": "traces.batching",
    "synthetic_trace": "traces.synthetic",
    "trace_stats": "traces.stats",
    "trained_model": "router.nn.store",
    "tune": "tuner.study",
    "what_if": "tuner.whatif",
    "without_rank": "router.lost_ranks",
    "write_trace": "traces.store",
}

__all__ = sorted(_HOMES)  # a list of names all the same; a test holds it against the docs
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moeroute' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

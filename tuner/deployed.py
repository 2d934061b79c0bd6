"""Deployed: what a part of a small model would cost at the widths of a deployed one, simulated on eight H100s.

The routing is the small model's own, token by token; the widths, the number of layers and all that surrounds the MoE
layers are the deployed model's, of as many experts. Each of its layers routes as the recorded layer at the same depth.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from router.policies import RoutingPolicy
from router.policies.k_of_layers import fixed_k
from router.subnetwork import SubNetwork
from sim.report import Report
from traces.errors import InputError
from traces.model import ModelSpec
from traces.presets import preset
from traces.trace import RoutingTrace
from tuner.replays import Replays
from tuner.scenario import parse_scenario

# 16 experts, top 4, as the reference model has.
DEPLOYED_AS = "dbrx"
RANKS = 8
# By the experts of a layer: the published models that small ones can stand for.
_SHAPES = {16: DEPLOYED_AS, 8: "mixtral-8x7b"}


def deployed_shape(experts: int) -> ModelSpec:
    """The published model that one of so many experts stands for. Errors: `InputError` where there is none."""
    if experts not in _SHAPES:
        known = " or ".join(str(count) for count in sorted(_SHAPES))
        raise InputError(
            f"no published model that is simulated has {experts} experts a layer; a model of {known} can be deployed"
        )
    return preset(_SHAPES[experts])


def deployed_trace(trace: RoutingTrace, part: SubNetwork, of_layers: int, shape: ModelSpec) -> RoutingTrace:
    """The trace of a part, of a model of `of_layers` layers, as one of the same part of `shape`.

    Errors: `InputError` where `shape` has fewer experts than the part, or fewer layers than the model, or the model has
    null experts.
    """
    if trace.model.null_experts:
        raise InputError(f"trace {trace.source}: its model has null experts, which {shape.name} has not")
    layers = deployed_layers(part, of_layers, shape)
    model = shape.cut(layers=layers, experts=part.experts, top_k=part.top_k)
    recorded_L = _recorded(layers, part.depth)
    return replace(
        trace,
        model=replace(model, gate=trace.model.gate, renormalise=trace.model.renormalise),
        expert_ids_TLC=trace.expert_ids_TLC[:, recorded_L],
        gates_TLC=None if trace.gates_TLC is None else trace.gates_TLC[:, recorded_L],
        source=f"{trace.source}, at the widths of {shape.name}",
    )


def deployed_layers(part: SubNetwork, of_layers: int, shape: ModelSpec) -> int:
    """The layers of `shape` that are as large a share of them as the part's are of `of_layers`."""
    if shape.layers < of_layers:
        raise InputError(f"{shape.name} has {shape.layers} layers, fewer than the {of_layers} of the model")
    return max(round(shape.layers * part.depth / of_layers), 1)


def _recorded(layers: int, depth: int) -> Any:
    """For each of `layers` deployed layers the recorded one at the same depth."""
    return np.arange(layers) * depth // layers


def deployed_report(
    trace: RoutingTrace,
    part: SubNetwork,
    of_layers: int,
    *,
    tokens_per_rank: int = 64,
    kv_tokens_per_rank: int = 64 * 1024,
    steps: int = 4,
    shape: ModelSpec | None = None,
) -> Report:
    """A decode step of the part on eight H100s, kernels as measured, experts placed by the first half of the trace.

    `trace` is recorded with the part running. `shape` (None: DBRX) has as many experts as the model that the part is
    of (`deployed_shape`). As many slots a rank as the part's experts need; where they do not divide, some experts have
    two. Errors: `InputError` where the trace is too short, and as `deployed_trace`.
    """
    shape = shape or preset(DEPLOYED_AS)
    deployed = deployed_trace(trace, part, of_layers, shape)
    slots = -(-part.experts // RANKS) * RANKS
    scenario = parse_scenario(
        {
            "version": 1,
            "name": "deployed",
            "trace": {"model": shape.name, "tokens": 1, "zipf": 0},  # stands in for the one that is given
            "cluster": {"device": "h100_sxm", "ranks": RANKS},
            "costs": ["trtllm", "nccl"],
            "batch": {
                "phase": "decode",
                "tokens_per_rank": tokens_per_rank,
                "steps": steps,
                "kv_tokens_per_rank": kv_tokens_per_rank,
            },
            "config": {
                "policy": "top_k",
                "parameters": {"k": part.top_k},
                "placement": {"algorithm": "balanced", "redundant_slots": slots - part.experts},
            },
            "protocol": "per_rank",
            "fidelity": "analytic",
            "windows": {"plan": 2, "tune": 1, "validate": 1},
        },
        source="the deployed scenario",
    )
    replays = Replays.of(scenario, deployed)
    k_L = tuple(part.top_k_L[layer] for layer in _recorded(deployed.model.layers, part.depth))
    report, _, _ = replays.windows["tune"].run(
        RoutingPolicy(selection=fixed_k(k_L)), replays.placement(replays.scenario.config), fidelity="analytic"
    )
    return report

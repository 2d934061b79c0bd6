"""The section of `placement.py` on routing of single tokens: planned on one window, scored on the next.

A trace is cut into consecutive blocks of requests. Every algorithm plans on one block, and the simulator takes the time
of decode steps of the block after it; so it goes on through the trace. All algorithms meet the same steps.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from policy_cases import large_scale

from cost_models.cluster import Cluster, gpu_cluster
from cost_models.devices import device, dtype_bytes
from cost_models.kernel_costs import KernelCosts
from router.placement import PLACEMENTS
from router.placement.base import Placement
from router.placement.problem import PlacementProblem
from router.policies import RoutingPolicy, TopK
from router.replicas import ReplicaChoice
from router.splits import SPLITS
from sim.execution import Execution
from sim.lower import Protocol
from sim.rank_seconds import rank_seconds_of
from sim.replay import Replay
from traces.batching import Step, make_steps, split_requests
from traces.formats.npz import import_npz
from traces.model import ModelSpec
from traces.presets import preset
from traces.trace import DECODE, RoutingTrace

BASELINE: tuple[str, ReplicaChoice] = ("eplb", "even")
ALGORITHMS = ("contiguous", "random", "eplb", "balanced", "active_aware", "cost_aware", "affinity")
CHOICES: tuple[ReplicaChoice, ...] = ("even", "nearest", "water_filling", "fewest_active")
_COSTS = ("trtllm", "sglang", "nccl")  # the first that has an operation
_PLANNED_STEPS, _SCORED_STEPS = 64, 8
_RESAMPLES = 2000
_SWITCH_TOKENS = 54  # a quarter of that trace, which does not say where its requests end


@dataclass(frozen=True, eq=False, kw_only=True)
class Deployment:
    """One trace in `blocks` blocks of requests, on `ranks` GPUs with `slots` slots for experts."""

    name: str
    trace: RoutingTrace
    ranks: int
    slots: int
    tokens_per_rank: int
    blocks: int = 4
    layers: int | None = None
    protocol: Protocol = "per_expert"
    dispatch_dtype: str | None = None
    gpu: str = "h100_sxm"

    @cached_property
    def cluster(self) -> Cluster:
        """Eight GPUs to a node."""
        return gpu_cluster(device(self.gpu), ranks=self.ranks)

    @cached_property
    def costs(self) -> KernelCosts:
        """Measured kernels."""
        return KernelCosts.shipped(self.cluster, *_COSTS)

    def steps_of(self, block: RoutingTrace, limit: int | None) -> list[Step]:
        """Decode steps of a block."""
        return make_steps(block, phase="decode", tokens_per_rank=self.tokens_per_rank, ranks=self.ranks, limit=limit)

    def replay_of(self, block: RoutingTrace, steps: int | None = _SCORED_STEPS) -> Replay:
        """The first `steps` of a block (None: all), whole where the model's attention is known, else MoE layers."""
        return Replay(
            trace=block,
            steps=self.steps_of(block, steps),
            cluster=self.cluster,
            costs=self.costs,
            phase="decode",
            protocol=self.protocol,
            dispatch_dtype=self.dispatch_dtype,
            execution=Execution(extent="whole" if block.model.attention else "moe"),
            kv_tokens_per_rank=1024 * self.tokens_per_rank,
            sampled_layers=self.layers,
        )

    def problem_of(self, block: RoutingTrace, replay: Replay) -> PlacementProblem:
        """All that a block tells of the layers that are simulated."""
        model = block.model
        ids_TLK = block.expert_ids_TLC[:, replay.layers, : model.top_k].astype(np.int64)
        steps_WLE = np.stack(
            [_rows_LE(ids_TLK[step.tokens_T], model.experts) for step in self.steps_of(block, _PLANNED_STEPS)]
        )
        return PlacementProblem(
            loads_LE=_rows_LE(ids_TLK, model.experts).astype(np.float64),
            ranks=self.ranks,
            slots=self.slots,
            nodes=self.cluster.nodes,
            steps_WLE=steps_WLE,
            ids_TLK=ids_TLK,
            seconds=rank_seconds_of(
                model,
                self.costs,
                layout=replay.shared,
                protocol=self.protocol,
                dispatch_dtype=self.dispatch_dtype or model.activation_dtype,
                slots_per_rank=self.slots // self.ranks,
                tokens_per_rank=self.tokens_per_rank,
                width=model.top_k,
            ),
        )

    def run(self) -> Iterator[dict[str, Any]]:
        """A row for every algorithm and replica choice, against EPLB with evenly used replicas."""
        blocks = split_requests(self.trace, [1.0] * self.blocks)
        choices = CHOICES if self.slots > self.trace.model.experts else CHOICES[:1]
        step_s: dict[tuple[str, ReplicaChoice], list[float]] = {}
        between_nodes: dict[tuple[str, ReplicaChoice], list[float]] = {}  # bytes
        plan_s: dict[str, list[float]] = {}
        for earlier, later in pairwise(blocks):
            replay = self.replay_of(later)
            problem = self.problem_of(earlier, replay)
            policy = RoutingPolicy(selection=TopK(k=self.trace.model.top_k))
            assignments, _ = replay.route(policy)
            for algorithm in ALGORITHMS:
                by_split = {}
                for split in dict.fromkeys(choice if choice in SPLITS else None for choice in choices):
                    if by_split and "steps" not in PLACEMENTS[algorithm].needs:
                        by_split[split] = by_split[None]  # it does not look at how replicas are chosen
                        continue
                    start_s = time.process_time()
                    slots_LS = PLACEMENTS[algorithm].plan(replace(problem, split=split))
                    plan_s.setdefault(algorithm, []).append(time.process_time() - start_s)
                    by_split[split] = Placement(
                        slot_to_expert_LS=slots_LS[replay.row_of_layer], experts=problem.experts, ranks=self.ranks
                    )
                for choice in choices:
                    placement = by_split[choice if choice in SPLITS else None]
                    for step, of_step in zip(replay.steps, assignments, strict=True):
                        works = replay.lower(policy, placement, step, of_step, choice)
                        timeline = replay.simulate(replay.price(works, placement), "analytic")
                        step_s.setdefault((algorithm, choice), []).append(timeline.step_s)
                        bytes_ = sum(work.bytes_by_tier().get("scale_out", 0.0) for work in works)
                        between_nodes.setdefault((algorithm, choice), []).append(bytes_)
        base_N = np.array(step_s[BASELINE])
        for (algorithm, choice), seconds in step_s.items():
            seconds_N = np.array(seconds)
            yield {
                "trace": self.name,
                "ranks": self.ranks,
                "slots": self.slots,
                "tokens_per_rank": self.tokens_per_rank,
                "algorithm": algorithm,
                "replica_choice": choice,
                "step_s": float(seconds_N.mean()),
                "vs_eplb": float(seconds_N.mean() / base_N.mean()),
                "vs_eplb_ci": _ratio_ci(seconds_N, base_N),
                "bytes_between_nodes": float(np.mean(between_nodes[algorithm, choice])),
                "windows": self.blocks - 1,
                "steps": seconds_N.size,
                "plan_ms": float(np.median(plan_s[algorithm])) * 1e3,
            }


def _rows_LE(ids_TLK: NDArray[np.int64], experts: int) -> NDArray[np.int64]:
    """How many of the pairs each expert has."""
    return np.stack([np.bincount(ids_TK.reshape(-1), minlength=experts) for ids_TK in ids_TLK.swapaxes(0, 1)])


def _ratio_ci(seconds_N: NDArray[np.float64], base_N: NDArray[np.float64]) -> list[float]:
    """The 95% bootstrap interval of the ratio of means, steps drawn in pairs."""
    drawn = np.random.default_rng(0).integers(base_N.size, size=(_RESAMPLES, base_N.size))
    ratios = seconds_N[drawn].mean(axis=1) / base_N[drawn].mean(axis=1)
    return [float(end) for end in np.quantile(ratios, (0.025, 0.975))]


def deployment_for_rebalancing(folder: Path) -> Deployment | None:
    """The longest recorded trace, with redundant slots; None where it is not in `folder`."""
    found = (d for d in recorded_deployments(folder) if d.name == "gpt-oss-20b" and d.slots > d.trace.model.experts)
    return next(found, None)


def recorded_deployments(folder: Path) -> Iterator[Deployment]:
    """Of the traces that lie in `folder`; what is missing is said."""
    for name, file, model, settings in (
        (
            "gpt-oss-20b",
            "gptoss20b/gptoss20b_ship.npz",
            "gpt-oss-20b",
            [(8, 32, 16), (8, 40, 16), (32, 64, 4), (16, 32, 16, "per_node")],
        ),
        (
            "flame-moe-290m",
            "flame_moe_290m/flame_moe_290m_prefill2048.npz",
            "flame-moe-290m",
            [(8, 64, 8), (8, 72, 8), (32, 64, 2), (32, 96, 2), (16, 64, 16, "per_rank"), (16, 64, 16, "per_node")],
        ),
    ):
        if _there(folder / file):
            trace = _in_bfloat16(import_npz(folder / file, model=preset(model)).trace)
            yield from _deployments(name, trace, settings)
    file = "switch_base8/router-trace.v2.json"
    if _there(folder / file):
        yield from _deployments("switch-base-8", _switch(folder / file), [(4, 8, 4), (8, 16, 2)])


def synthetic_deployments() -> Iterator[Deployment]:
    """Few tokens a rank and many replicas: where METRO (arXiv 2512.09277) balances active experts to gain 11-22%."""
    for name, ranks, slots, tokens, zipf, more in (
        ("qwen3-30b-a3b", 8, 192, 4, 0.6, {}),
        ("qwen3-30b-a3b", 8, 192, 16, 0.6, {}),
        ("qwen3-235b-a22b", 8, 160, 4, 0.8, {"gpu": "a100_sxm"}),
        ("qwen3-235b-a22b", 8, 160, 16, 0.8, {"gpu": "a100_sxm"}),
        ("deepseek-v3", 32, 288, 4, 0.6, {"dispatch_dtype": "fp8"}),
        ("deepseek-v3", 32, 384, 4, 0.6, {"dispatch_dtype": "fp8"}),
    ):
        layers, blocks = 4, 3
        trace = large_scale(
            preset(name),
            layers=layers,
            tokens=256 * -(-blocks * ranks * tokens * _SCORED_STEPS // 256),
            zipf=zipf,
            candidates=preset(name).top_k,
        )
        yield Deployment(
            name=f"synthetic {name}" + (", A100" if "gpu" in more else ""),
            trace=trace,
            ranks=ranks,
            slots=slots,
            tokens_per_rank=tokens,
            blocks=blocks,
            layers=layers,
            **more,
        )


def _deployments(name: str, trace: RoutingTrace, settings: Sequence[tuple[Any, ...]]) -> Iterator[Deployment]:
    """`settings`: ranks, slots, tokens of a rank, and the protocol where it is not `per_expert`."""
    for ranks, slots, tokens, *protocol in settings:
        more: dict[str, Any] = {"protocol": protocol[0]} if protocol else {}
        shown = f"{name}, {protocol[0]}" if protocol else name
        yield Deployment(name=shown, trace=trace, ranks=ranks, slots=slots, tokens_per_rank=tokens, **more)


def _there(path: Path) -> bool:
    if not path.exists():
        print(f"{path}: not there, left out", file=sys.stderr)
    return path.exists()


def _in_bfloat16(trace: RoutingTrace) -> RoutingTrace:
    """The same model with weights for which kernels were measured."""
    model = replace(trace.model, weight_bytes=dtype_bytes("bfloat16"), weight_dtype="bfloat16")
    return replace(trace, model=model)


def _switch(path: Path) -> RoutingTrace:
    """The encoder of google/switch-base-8: its router's choices alone, so that gates are all one."""
    ids_TLC = np.array(json.loads(path.read_bytes())["selections"], dtype=np.uint16)
    token_T = np.arange(ids_TLC.shape[0], dtype=np.int32)
    model = ModelSpec(
        name="switch-base-8",
        layers=ids_TLC.shape[1],
        experts=8,
        top_k=1,
        hidden=768,
        expert_hidden=3072,
        expert_matrices=2,
        renormalise=False,
    )
    return RoutingTrace(
        model=model,
        expert_ids_TLC=ids_TLC,
        gates_TLC=np.ones(ids_TLC.shape, dtype=np.float16),
        request_T=token_T // _SWITCH_TOKENS,
        position_T=token_T % _SWITCH_TOKENS,
        phase_T=np.full(token_T.size, DECODE, dtype=np.uint8),
        score_kind="softmax",
        source="switch-base-8",
    )

"""A measured run: several deployments of a model's MoE layers, or of parts of it, on real ranks, in turn.

Deployments are interleaved round by round, in an order that differs from round to round, so that a machine that drifts
slows all of them alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from cost_models.microbench.benchmark import measure
from cost_models.microbench.ranks import RankGroup, run_on_ranks
from router.history import RoutingHistory
from router.nn.expert_parallel import ExpertParallelMoE, MoEWeights, check_runnable
from router.nn.microbench import probe_of
from router.nn.record import layer_inputs
from router.nn.store import TrainedModel
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.prices import RoutePrices
from router.replicas import ReplicaChoice
from traces.batching import Step
from traces.errors import InputError
from traces.model import ModelSpec
from traces.trace import RoutingTrace

_PROBE_BUDGET_S = 0.1


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class RecordedLayers:
    """The MoE layers of a model, and what entered each of them: [L, T, D] float32 a step."""

    model: ModelSpec
    weights_L: tuple[MoEWeights, ...]
    x_by_step_LTD: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, trained: TrainedModel, trace: RoutingTrace, steps: Sequence[Step]) -> Self:
        """Those of a trained model on the very tokens of `steps` of its trace.

        Errors: `InputError` if the trace is not the model's, or its gate none that ranks run.
        """
        _check_model(trained.spec)
        x_LTD = layer_inputs(trained, trace)
        return cls(
            model=trace.model,
            weights_L=tuple(
                MoEWeights(
                    gate_ED=layer.gate.weight.detach(),
                    w_gate_EFD=layer.w_gate_EFD.detach(),
                    w_up_EFD=layer.w_up_EFD.detach(),
                    w_down_EDF=layer.w_down_EDF.detach(),
                )
                for layer in trained.model.moe_layers
            ),
            x_by_step_LTD=tuple(x_LTD[:, torch.as_tensor(step.tokens_T)] for step in steps),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What is deployed: layers, a policy and what it asks for, where experts are, which replica computes a pair.

    Deployments of the same layers share one object: the ranks are sent it once.
    """

    layers: RecordedLayers
    policy: RoutingPolicy
    placement: Placement
    replica_choice: ReplicaChoice
    node_of_G: NDArray[np.int64]
    history: RoutingHistory | None = None
    prices: RoutePrices | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """Seconds of R rounds of J deployments.

    `step_s_RJ`: a step lasts until its slowest rank is done; `step_R`: which step of the trace a round ran.
    `stage_s_by_deployment`: wall seconds of each stage on rank 0, median over rounds; a collective's include the wait
    for the other ranks. `probe_s`: what the calibration's probe took just before.
    """

    step_s_RJ: NDArray[np.float64]
    step_R: NDArray[np.int64]
    stage_s_by_deployment: list[dict[str, float]]
    probe_s: float

    def typical_step_s(self, deployment: int) -> float:
        """The mean over steps of the median over rounds."""
        return float(
            np.mean([np.median(self.step_s_RJ[self.step_R == step, deployment]) for step in np.unique(self.step_R)])
        )


def measure_deployments(
    deployments: Sequence[Deployment], *, calibrated: ModelSpec, rounds: int, seed: int, device: str
) -> MeasuredRun:
    """Run every deployment once a round on its inputs, each round one step, in turn; all have as many steps.

    `calibrated`: the model whose probe is timed, as a calibration of the machine did.
    Errors: `InputError` for a policy that no rank can follow, `DeviceError` if the device is missing.
    """
    for deployment in deployments:
        check_runnable(deployment.policy, deployment.placement.ranks)
    plan = _Plan(calibrated=calibrated, deployments=list(deployments), rounds=rounds, seed=seed)
    return run_on_ranks(_measure_rank, plan, ranks=deployments[0].placement.ranks, device=device)


def _check_model(model: ModelSpec) -> None:
    """The ranks run a softmax gate and routed experts alone."""
    for field, differs in (
        ("gate", model.gate != "softmax"),
        ("shared_experts", model.shared_experts > 0),
        ("null_experts", model.null_experts > 0),
    ):
        if differs:
            raise InputError(
                f"model {model.name}: {field} is {getattr(model, field)}; a measured run has softmax gates and routed "
                "experts alone: simulate it"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What the ranks are sent: everything of every step; each takes its own tokens and slots."""

    calibrated: ModelSpec
    deployments: list[Deployment]
    rounds: int
    seed: int


def _measure_rank(group: RankGroup, plan: _Plan) -> MeasuredRun:
    probe = measure(group, ([probe_of(plan.calibrated, group.ranks)], _PROBE_BUDGET_S))[0]
    every = {id(deployment.layers): deployment.layers for deployment in plan.deployments}
    weights = {key: [layer.to(group.device) for layer in layers.weights_L] for key, layers in every.items()}
    own_x = {
        key: [
            x_LTD.chunk(group.ranks, dim=1)[group.rank].contiguous().to(group.device) for x_LTD in layers.x_by_step_LTD
        ]
        for key, layers in every.items()
    }
    models = [
        ExpertParallelMoE(
            group=group,
            layers=weights[id(deployment.layers)],
            placement=deployment.placement,
            policy=deployment.policy,
            replica_choice=deployment.replica_choice,
            node_of_G=deployment.node_of_G,
            renormalise=deployment.layers.model.renormalise,
            top_k=deployment.layers.model.top_k,
            history=deployment.history,
            prices=deployment.prices,
        )
        for deployment in plan.deployments
    ]
    inputs = [own_x[id(deployment.layers)] for deployment in plan.deployments]
    order = np.random.default_rng(plan.seed)  # the same on every rank
    step_R = np.arange(plan.rounds) % len(inputs[0])
    own_s_RJ = np.zeros((plan.rounds, len(models)))
    stages: list[list[dict[str, float]]] = [[] for _ in models]
    with torch.inference_mode():
        for model, own_x_of_step in zip(models, inputs, strict=True):
            model.forward(own_x_of_step[0])  # warm up: allocations, connections, code paths
        for round_, step in enumerate(step_R):
            for index in order.permutation(len(models)):
                group.barrier()
                _, stage_s = models[index].forward(inputs[index][step])
                stages[index].append(stage_s)
                own_s_RJ[round_, index] = sum(stage_s.values())
    return MeasuredRun(
        step_s_RJ=np.stack(group.gather(own_s_RJ)).max(axis=0),
        step_R=step_R,
        stage_s_by_deployment=[
            {stage: float(np.median([round_[stage] for round_ in rounds])) for stage in rounds[0]} for rounds in stages
        ],
        probe_s=probe.seconds,
    )

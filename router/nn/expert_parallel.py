"""One rank of a real expert-parallel MoE layer: gate, route, permute, dispatch, experts, combine.

The stages are the simulator's, in its order and under its names, and the policy, the choice of replicas and the
kernels are the very code that the simulator prices. On CPU ranks talk over gloo, on CUDA over NCCL.
"""

import time
from dataclasses import dataclass, field, replace

import torch

from cost_models.microbench.all_to_all import all_to_all
from cost_models.microbench.experts import expert_mlp
from cost_models.microbench.permute import combine, permute, regroup
from cost_models.microbench.ranks import RankGroup
from router.candidates import Candidates
from router.context import RouteContext, State
from router.history import RoutingHistory
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.prices import RoutePrices
from router.replicas import ReplicaChoice, choose_slots
from traces.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEWeights:
    """The routed experts of one layer: gate [E, D], and per expert w_gate and w_up [F, D], w_down [D, F]."""

    gate_ED: torch.Tensor
    w_gate_EFD: torch.Tensor
    w_up_EFD: torch.Tensor
    w_down_EDF: torch.Tensor

    def to(self, device: torch.device) -> "MoEWeights":
        """The same weights on `device`."""
        return MoEWeights(
            gate_ED=self.gate_ED.to(device),
            w_gate_EFD=self.w_gate_EFD.to(device),
            w_up_EFD=self.w_up_EFD.to(device),
            w_down_EDF=self.w_down_EDF.to(device),
        )

    def of_experts(self, expert_S: torch.Tensor) -> "MoEWeights":
        """The same layer with only the experts `expert_S`, in that order: what a rank holds."""
        return MoEWeights(
            gate_ED=self.gate_ED,
            w_gate_EFD=self.w_gate_EFD[expert_S].contiguous(),
            w_up_EFD=self.w_up_EFD[expert_S].contiguous(),
            w_down_EDF=self.w_down_EDF[expert_S].contiguous(),
        )


@dataclass(slots=True)
class Stopwatch:
    """Wall seconds of each stage, summed over layers. A device is waited for at each mark."""

    group: RankGroup
    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def mark(self, stage: str) -> None:
        """The work since the last mark was `stage`."""
        self.group.synchronize()
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def check_runnable(policy: RoutingPolicy, ranks: int) -> None:
    """Raise `InputError` for a policy that only a simulator, which sees all tokens at once, can follow."""
    if policy.capacity is not None and policy.capacity.scope == "global" and ranks > 1:
        raise InputError(
            "capacity.scope global: a real rank knows only its own tokens; use scope source_rank, or simulate only"
        )


class ExpertParallelMoE:
    """The MoE layers of a model as one rank of a group runs them: it holds the experts of its slots.

    It remembers what its policy remembers, layer by layer, from step to step.
    """

    def __init__(
        self,
        *,
        group: RankGroup,
        layers: list[MoEWeights],
        placement: Placement,
        policy: RoutingPolicy,
        replica_choice: ReplicaChoice,
        renormalise: bool,
        history: RoutingHistory | None = None,
        prices: RoutePrices | None = None,
    ) -> None:
        check_runnable(policy, group.ranks)
        self._group = group
        self._placement = placement
        self._policy = policy
        self._replica_choice = replica_choice
        self._context = RouteContext(
            layer=0, ranks=group.ranks, renormalise=renormalise, history=history, prices=prices
        )
        self._states: list[State] = [{} for _ in layers]
        first_slot = group.rank * placement.slots_per_rank
        own_LS = torch.as_tensor(placement.slot_to_expert_LS[:, first_slot : first_slot + placement.slots_per_rank])
        self._layers = [weights.of_experts(expert_S) for weights, expert_S in zip(layers, own_LS, strict=True)]

    def forward(self, x_LTD: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, float]]:
        """Run every layer on its own input [T, D] of this rank: the outputs, and the seconds of each stage."""
        watch = Stopwatch(self._group)
        outputs = [self._layer(layer, x_TD, watch) for layer, x_TD in enumerate(x_LTD)]
        return outputs, watch.seconds

    def _layer(self, layer: int, x_TD: torch.Tensor, watch: Stopwatch) -> torch.Tensor:
        group, placement, weights = self._group, self._placement, self._layers[layer]
        ranks, slots_per_rank = group.ranks, placement.slots_per_rank

        candidates = gate(x_TD, weights.gate_ED, group.rank)
        watch.mark("gate")

        context = replace(self._context, layer=layer)
        assignment, self._states[layer] = self._policy.route(candidates, context, self._states[layer])
        slot_TK = choose_slots(assignment, placement, layer, candidates.source_rank_T, self._replica_choice)
        watch.mark("route")

        rows_ND, pair_N, count_S = permute(x_TD, slot_TK, placement.slots)
        sent_GS = count_S.reshape(ranks, slots_per_rank)
        watch.mark("permute")

        received_GS = all_to_all(sent_GS, [1] * ranks, [1] * ranks).tolist()
        sent = sent_GS.sum(dim=1).tolist()
        received = [sum(counts) for counts in received_GS]
        watch.mark("counts")

        received_ND = all_to_all(rows_ND, sent, received)
        watch.mark("dispatch")

        by_slot_ND = regroup(received_ND, received_GS)
        watch.mark("regroup")

        count_by_slot = [sum(counts) for counts in zip(*received_GS, strict=True)]
        out_ND = expert_mlp(by_slot_ND, count_by_slot, weights.w_gate_EFD, weights.w_up_EFD, weights.w_down_EDF)
        watch.mark("experts")

        by_source_ND = regroup(out_ND, list(zip(*received_GS, strict=True)))
        watch.mark("ungroup")

        returned_ND = all_to_all(by_source_ND, received, sent)
        watch.mark("return")

        out_TD = combine(returned_ND, pair_N, assignment.weights_TK)
        watch.mark("combine")
        return out_TD


def gate(x_TD: torch.Tensor, gate_ED: torch.Tensor, rank: int) -> Candidates:
    """Score all experts for the tokens of one rank."""
    source_rank_T = torch.full((x_TD.shape[0],), rank, dtype=torch.int64, device=x_TD.device)
    return Candidates.from_logits(x_TD @ gate_ED.T, source_rank_T)

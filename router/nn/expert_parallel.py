"""One rank of a real expert-parallel MoE layer: gate, route, permute, dispatch, experts, combine.

The stages are the simulator's, in its order and under its names, and the policy, the choice of replicas and the
kernels are the very code that the simulator prices. On CPU ranks talk over gloo, on CUDA over NCCL.

A capacity that pads sends and computes rows of zeros; a spill sends rows and weights where all ranks, from the same
counts, plan them to go; a choice of replicas by the whole step's counts has all ranks split the same counts. None of
these changes what comes out.
"""

import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from cost_models.microbench.all_to_all import all_to_all
from cost_models.microbench.experts import expert_mlp
from cost_models.microbench.permute import combine, permute, regroup
from cost_models.microbench.ranks import RankGroup
from router.assignment import Assignment
from router.candidates import Candidates
from router.capacity import Capacity, Limit
from router.context import RouteContext, State
from router.history import RoutingHistory
from router.nn.routing import assign, slots_of
from router.padding import check_padding, places_by_scope, places_by_slot
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.prices import RoutePrices
from router.replicas import ReplicaChoice, asks_counts, deal_rows, rows_by_expert
from router.spill import Spill, SpillPlan
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
    for part in policy.parts:
        if getattr(part, "scope", "source_rank") == "global" and ranks > 1:
            field = "capacity" if part.kind == "capacity" else part.name
            raise InputError(
                f"{field}.scope global: a real rank knows only its own tokens; use scope source_rank, or simulate only"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Packed:
    """A rank's rows, ready to be sent, and what it will get.

    `rows_ND` sorted by place, which `pair_N` and, where some are padding, `row_N` tell the pair and the row of;
    `sent_GS` rows by computing rank and place there, `received_GS` by source rank and own place. `guests`: the experts
    of other ranks that this one computes in the places behind its slots.
    """

    rows_ND: torch.Tensor
    pair_N: torch.Tensor
    sent_GS: torch.Tensor
    received_GS: list[list[int]]
    row_N: torch.Tensor | None = None
    guests: MoEWeights | None = None


class ExpertParallelMoE:
    """The MoE layers of a model as one rank of a group runs them: it holds the experts of its slots.

    It remembers what its policy remembers, layer by layer, from step to step. `node_of_G`: which node each rank counts
    as on where near replicas go first; None: all are on one.
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
        top_k: int = 0,
        history: RoutingHistory | None = None,
        prices: RoutePrices | None = None,
        node_of_G: NDArray[np.int64] | None = None,
    ) -> None:
        check_runnable(policy, group.ranks)
        if policy.capacity is not None and policy.capacity.pad:
            check_padding(replica_choice, placement)
        self._group = group
        self._placement = placement
        self._policy = policy
        self._spill = policy.capacity if isinstance(policy.capacity, Spill) else None
        self._replica_choice = replica_choice
        self._node_of_G = node_of_G
        self._context = RouteContext(
            layer=0, ranks=group.ranks, renormalise=renormalise, top_k=top_k, history=history, prices=prices
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
        group, weights = self._group, self._layers[layer]

        candidates = gate(x_TD, weights.gate_ED, group.rank)
        watch.mark("gate")

        context = replace(self._context, layer=layer)
        assignment, self._states[layer] = assign(self._policy, candidates, context, self._states[layer])
        rows_GS = self._dealt_rows(layer, assignment, candidates.source_rank_T, watch)
        slot_TK = slots_of(
            assignment,
            self._placement,
            layer,
            candidates.source_rank_T,
            self._replica_choice,
            node_of_G=self._node_of_G,
            rows_GS=rows_GS,
        )
        watch.mark("route")

        packed = (
            self._pack(layer, x_TD, assignment, slot_TK, rows_GS, watch)
            if self._spill is None
            else self._pack_and_lend(self._spill, layer, x_TD, slot_TK, rows_GS, watch)
        )
        received_GS = packed.received_GS
        sent = packed.sent_GS.sum(dim=1).tolist()
        received = [sum(counts) for counts in received_GS]
        received_ND = all_to_all(packed.rows_ND, sent, received)
        watch.mark("dispatch")

        by_slot_ND = regroup(received_ND, received_GS)
        watch.mark("regroup")

        out_ND = _experts(by_slot_ND, [sum(counts) for counts in zip(*received_GS, strict=True)], weights, packed)
        watch.mark("experts")

        by_source_ND = regroup(out_ND, list(zip(*received_GS, strict=True)))
        watch.mark("ungroup")

        returned_ND = all_to_all(by_source_ND, received, sent)
        watch.mark("return")

        if packed.row_N is not None:
            returned_ND = returned_ND.index_select(0, packed.row_N)
        out_TD = combine(returned_ND, packed.pair_N, assignment.weights_TK)
        watch.mark("combine")
        return out_TD

    def _dealt_rows(
        self, layer: int, assignment: Assignment, source_rank_T: torch.Tensor, watch: Stopwatch
    ) -> NDArray[np.int64] | None:
        """Rows of all ranks by slot, where the choice of replicas depends on their counts; else None.

        Every rank learns all counts of experts and deals the same rows to the same slots.
        """
        if not asks_counts(self._replica_choice, self._placement):
            return None
        own_E = rows_by_expert(assignment, source_rank_T, self._placement)[self._group.rank]
        watch.mark("route")
        rows_GE = self._gather_counts(torch.as_tensor(own_E))
        watch.mark("counts")
        return deal_rows(rows_GE, self._placement, layer, self._replica_choice, node_of_G=self._node_of_G)

    def _gather_counts(self, count_X: torch.Tensor) -> NDArray[np.int64]:
        """What each rank counted, [G, X], on the host."""
        ranks = self._group.ranks
        count_GX = count_X.to(self._group.device).expand(ranks, -1).contiguous()
        gathered: NDArray[np.int64] = all_to_all(count_GX, [1] * ranks, [1] * ranks).cpu().numpy()
        return gathered

    def _pack(
        self,
        layer: int,
        x_TD: torch.Tensor,
        assignment: Assignment,
        slot_TK: torch.Tensor,
        rows_GS: NDArray[np.int64] | None,
        watch: Stopwatch,
    ) -> _Packed:
        """Rows in the order of slots; ranks tell each other how many, unless they know the rows of all, `rows_GS`."""
        ranks, placement, limit = self._group.ranks, self._placement, self._policy.capacity
        rows_ND, pair_N, count_S = permute(x_TD, slot_TK, placement.slots)
        row_N = None
        if limit is not None and limit.pad:
            places = np.array([self._places(limit, assignment)])
            own = np.array([self._group.rank])
            places_1S = places_by_slot(places, placement, layer, own, self._replica_choice, self._node_of_G)
            places_S = torch.as_tensor(places_1S[0], device=count_S.device)
            rows_ND, row_N = _padded(rows_ND, count_S, places_S)
            count_S = places_S
        sent_GS = count_S.reshape(ranks, placement.slots_per_rank)
        watch.mark("permute")

        if rows_GS is None:
            received_GS = all_to_all(sent_GS, [1] * ranks, [1] * ranks).tolist()
            watch.mark("counts")
        else:
            received_GS = rows_GS.reshape(ranks, ranks, -1)[:, self._group.rank].tolist()
        return _Packed(rows_ND=rows_ND, pair_N=pair_N, sent_GS=sent_GS, received_GS=received_GS, row_N=row_N)

    def _places(self, limit: Limit, assignment: Assignment) -> int:
        """The places that this rank's tokens have in every expert; ranks agree on those that depend on all loads."""
        rank, ranks, experts = self._group.rank, self._group.ranks, self._placement.experts
        ids_TK = assignment.ids_TK
        if not (isinstance(limit, Capacity) and limit.asks_loads(0, experts)):
            source_rank_T = torch.full_like(ids_TK[:, 0], rank)
            return int(places_by_scope(limit, assignment, source_rank_T, ranks, experts)[rank])
        tokens, k = ids_TK.shape
        load_P = [
            torch.bincount(of_pass_TX[of_pass_TX >= 0], minlength=experts).max()
            for of_pass_TX in ids_TK.chunk(limit.passes_of(k), dim=1)
        ]
        load_GP = torch.stack(load_P).expand(ranks, -1).contiguous()
        fullest_P = all_to_all(load_GP, [1] * ranks, [1] * ranks).amax(dim=0).tolist()
        return sum(limit.places(tokens, k, experts, fullest_P))

    def _pack_and_lend(
        self,
        spill: Spill,
        layer: int,
        x_TD: torch.Tensor,
        slot_TK: torch.Tensor,
        rows_GS: NDArray[np.int64] | None,
        watch: Stopwatch,
    ) -> _Packed:
        """Every rank learns all counts, plans the same moves, and sends the weights of the experts that it lends."""
        ranks, rank, slots = self._group.ranks, self._group.rank, self._placement.slots
        if rows_GS is None:
            rows_GS = self._gather_counts(torch.bincount(slot_TK.reshape(-1) + 1, minlength=slots + 1)[1:])
            watch.mark("counts")

        plan = spill.plan(rows_GS, ranks)
        place_TK = plan.place_of(slot_TK, torch.full_like(slot_TK[:, 0], rank))
        watch.mark("route")

        guests = _exchange_weights(plan, rank, self._layers[layer]) if plan.moves else None
        watch.mark("spill weights")

        rows_ND, pair_N, count_P = permute(x_TD, place_TK, ranks * plan.places_per_rank)
        watch.mark("permute")
        own_GP = plan.rows_GP.reshape(ranks, ranks, -1)[:, rank]
        return _Packed(
            rows_ND=rows_ND,
            pair_N=pair_N,
            sent_GS=count_P.reshape(ranks, plan.places_per_rank),
            received_GS=own_GP.tolist(),
            guests=guests,
        )


def _padded(rows_ND: torch.Tensor, count_S: torch.Tensor, places_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, sorted by slot, with zeros behind those of each slot up to its places; and where each row now lies, [N].

    `count_S` rows of each slot, at most `places_S`.
    """
    shift_S = (places_S.cumsum(0) - places_S) - (count_S.cumsum(0) - count_S)
    row_N = torch.arange(rows_ND.shape[0], device=rows_ND.device) + shift_S.repeat_interleave(count_S)
    return rows_ND.new_zeros(int(places_S.sum()), rows_ND.shape[1]).index_copy_(0, row_N, rows_ND), row_N


def _exchange_weights(plan: SpillPlan, rank: int, own: MoEWeights) -> MoEWeights | None:
    """Send what `rank` lends; the weights of its guests, by their places, or None if it has none."""
    first_slot = rank * plan.slots_per_rank
    lent = [move.slot - first_slot for move in plan.lent_by(rank)]
    matrices = (own.w_gate_EFD, own.w_up_EFD, own.w_down_EDF)
    weights_ND = torch.cat([matrix[lent].flatten(1) for matrix in matrices], dim=1)
    received_ND = all_to_all(weights_ND, plan.experts_XX[rank].tolist(), plan.experts_XX[:, rank].tolist())
    guests = plan.guests_of(rank)
    if not guests:
        return None
    # They come by the rank that lends them, and from each by the place that they go to.
    order = sorted(range(len(guests)), key=lambda guest: (guests[guest].slot // plan.slots_per_rank, guest))
    by_place = received_ND[[order.index(guest) for guest in range(len(guests))]]
    w_gate, w_up, w_down = (
        part.reshape(len(guests), *matrix.shape[1:])
        for part, matrix in zip(by_place.chunk(3, dim=1), matrices, strict=True)
    )
    return MoEWeights(gate_ED=own.gate_ED, w_gate_EFD=w_gate, w_up_EFD=w_up, w_down_EDF=w_down)


def _experts(by_slot_ND: torch.Tensor, counts: list[int], own: MoEWeights, packed: _Packed) -> torch.Tensor:
    slots = own.w_gate_EFD.shape[0]
    own_rows = sum(counts[:slots])
    out_ND = expert_mlp(by_slot_ND[:own_rows], counts[:slots], own.w_gate_EFD, own.w_up_EFD, own.w_down_EDF)
    if (guests := packed.guests) is None:
        return out_ND
    guests_ND = expert_mlp(by_slot_ND[own_rows:], counts[slots:], guests.w_gate_EFD, guests.w_up_EFD, guests.w_down_EDF)
    return torch.cat([out_ND, guests_ND])


def gate(x_TD: torch.Tensor, gate_ED: torch.Tensor, rank: int) -> Candidates:
    """Score all experts for the tokens of one rank."""
    source_rank_T = torch.full((x_TD.shape[0],), rank, dtype=torch.int64, device=x_TD.device)
    return Candidates.from_logits(x_TD @ gate_ED.T, source_rank_T)

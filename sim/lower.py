"""Lowering: from assignments and a placement to what each rank computes and sends.

One compiled kernel a layer goes through the kept pairs, token by token, and counts rows by slot, by rank pair and by
node. How many bytes that makes follows from the wire protocol: `per_expert`
sends a token once for each expert that computes it, `per_rank` once for each rank that does, `per_node` once to each
node with such a rank, where the rank of the source's own number passes it on.

A capacity that pads adds rows of no token: experts compute them all, and `per_expert` sends them too, for there each
source's places lie fixed in the buffers; the other two send tokens. A spill moves rows, and weights, to guest places.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numba
import numpy as np
from numpy.typing import NDArray

from cost_models.kernels.token_traffic import Direction, bytes_by_tier
from cost_models.ops import Route, TokenExchange
from cost_models.traffic import Traffic
from router.assignment import Assignment
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.replicas import ReplicaChoice, asks_counts, choose_slots
from router.spill import Spill, SpillPlan, rows_by_source
from sim.layout import Layout
from sim.padding import Padder, Padding, by_rank
from traces.context import Context
from traces.errors import InputError
from traces.model import ModelSpec

Protocol = Literal["per_expert", "per_rank", "per_node"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
Mode = Literal["normal", "low_latency"]
MODES: dict[Protocol, Mode] = {"per_expert": "low_latency", "per_rank": "normal", "per_node": "normal"}
_COUNT_BYTES = 8  # rows per slot are exchanged as int64 before the rows


@dataclass(frozen=True, eq=False, kw_only=True)  # no slots: the traffic is counted once and kept
class Work:
    """What one microbatch makes the ranks do in each of L layers.

    `protocol`: how rows travel; `dispatch_dtype`: as what they go out. `tokens_G` tokens that each rank holds, of
    requests as in `context` (None: not known). `rows_LS` rows that each slot computes, padding too; by source and
    computing rank `pairs_LGG` kept pairs and `copies_LGG` tokens with any, counted for each rank of those that share an
    expert; `node_copies_LGN` tokens by source rank and node. `route` the policy's own work; `count_bytes` for each rank
    pair, ahead of the rows; `counts_first`: ahead of the choice where they go too, which depends on all ranks' counts.
    `row_of_layer`: which row of these arrays each of the model's MoE layers takes: where layers are sampled, several
    take one. `padding`: the rows of no token among them; None: none.

    `experts_moved_LGG`: experts, or shares of their widths, whose weights go from rank to rank before the rows do;
    None where the policy does not spill. Where it does, S counts each rank's slots and then its guest places.
    """

    model: ModelSpec
    layout: Layout
    protocol: Protocol
    dispatch_dtype: str
    tokens_G: NDArray[np.int64]
    context: Context | None
    rows_LS: NDArray[np.int64]
    pairs_LGG: NDArray[np.int32]
    copies_LGG: NDArray[np.int32]
    node_copies_LGN: NDArray[np.int32]
    route: Route
    count_bytes: int
    counts_first: bool
    row_of_layer: NDArray[np.int64]
    padding: Padding | None = None
    experts_moved_LGG: NDArray[np.int64] | None = None

    @property
    def ranks(self) -> int:
        """G."""
        return self.layout.ranks

    @property
    def layers(self) -> int:
        """L, as far as they are simulated one by one."""
        return int(self.rows_LS.shape[0])

    @cached_property
    def rows_LGS(self) -> NDArray[np.int64]:
        """`rows_LS` by rank: [L, G, slots of a rank]; ranks that share their experts' widths share the rows."""
        rows_LXS = self.rows_LS.reshape(self.layers, self.layout.expert_groups, -1)
        return np.repeat(rows_LXS, self.layout.expert_tensor, axis=1)

    @cached_property
    def traffic(self) -> Traffic:
        """The rows of the exchange of every layer, as the protocol sends them."""
        by_expert_LGG = self.pairs_LGG if self.padding is None else self.pairs_LGG + self.padding.rows_LGG
        return Traffic(
            rows_XGG=by_expert_LGG if self.protocol == "per_expert" else self.copies_LGG,
            node_rows_XGN=self.node_copies_LGN if self.protocol == "per_node" else None,
            node_of_G=self.layout.node_of_G,
        )

    @cached_property
    def sent_LG(self) -> NDArray[np.integer]:
        """Kept pairs of each rank's own tokens."""
        return np.asarray(self.pairs_LGG.sum(axis=2))

    @cached_property
    def packed_LG(self) -> NDArray[np.integer]:
        """Rows that each rank puts into the order of slots: its kept pairs and its padding."""
        return self.sent_LG if self.padding is None else self.sent_LG + self.padding.rows_LGG.sum(axis=2)

    @property
    def padding_share(self) -> float:
        """Of the rows that slots compute in all of the model's MoE layers, those of no token."""
        if self.padding is None:
            return 0.0
        rows = int(self.rows_LS[self.row_of_layer].sum())
        return int(self.padding.rows_LS[self.row_of_layer].sum()) / rows if rows else 0.0

    @cached_property
    def received_LG(self) -> NDArray[np.integer]:
        """Rows that each rank computes."""
        return np.asarray(self.rows_LGS.sum(axis=2))

    @cached_property
    def routed_LG(self) -> NDArray[np.integer]:
        """Tokens of which each rank computes a pair or more."""
        return np.asarray(self.copies_LGG.sum(axis=1))

    def exchange(self, direction: Direction) -> TokenExchange:
        """The dispatch or the combine of every layer, as a cost model prices it."""
        model = self.model
        return TokenExchange(
            tokens_X=np.full(self.layers, self.tokens_G.max()),
            hidden=model.hidden,
            top_k=self.route.width,
            experts=model.experts,
            ranks_X=np.array(self.ranks),
            nodes_X=np.array(self.layout.nodes),
            direction=direction,
            mode=MODES[self.protocol],
            dtype=self.dispatch_dtype,
            traffic=self.traffic,
        )

    def bytes_by_tier(self) -> dict[str, float]:
        """Bytes that cross each tier of links in dispatch and combine, over all of the model's MoE layers."""
        tiers: dict[str, float] = {}
        for direction in get_args(Direction):
            for tier, bytes_L in bytes_by_tier(self.exchange(direction)).items():
                tiers[tier] = tiers.get(tier, 0.0) + float(bytes_L[self.row_of_layer].sum())
        return tiers


def lower(
    model: ModelSpec,
    assignments: Iterable[Assignment],
    placement: Placement,
    *,
    policy: RoutingPolicy,
    source_rank_T: NDArray[np.int64],
    layout: Layout | None = None,
    context: Context | None = None,
    protocol: Protocol = "per_expert",
    dispatch_dtype: str | None = None,
    replica_choice: ReplicaChoice = "even",
    row_of_layer: NDArray[np.int64] | None = None,
) -> Work:
    """Lower the assignments of one step, one a layer of `placement`, to the work of each rank.

    They may come one by one, so that a large step need not lie in memory at once. `layout` None: ranks of one node,
    nothing shared. Tokens are dispatched in `dispatch_dtype`, with its scales, and come back as activations; None: both
    ways as those. `row_of_layer` None: each layer stands for itself. What the policy's capacity says of padding and of
    spilling is followed. Errors: `InputError` where placement and layout do not fit, or capacity and replica choice.
    """
    layout = layout or Layout.one_node(placement.ranks)
    if placement.ranks != layout.expert_groups:
        raise InputError(
            f"the placement is for {placement.ranks} ranks, the layout spreads experts over {layout.expert_groups} "
            "(ranks / expert_tensor); place for these"
        )
    if model.expert_hidden % layout.expert_tensor:
        raise InputError(
            f"expert_tensor is {layout.expert_tensor}, which does not divide the experts' width {model.expert_hidden}; "
            "use a divisor"
        )
    last_rank = int(source_rank_T.max(initial=0))
    if last_rank >= layout.ranks:
        raise InputError(f"tokens of rank {last_rank}, but the layout has {layout.ranks} ranks; use one with as many")
    groups, tensor, layers = layout.expert_groups, layout.expert_tensor, placement.layers
    node_of_X = layout.node_of_G[::tensor]
    spill = policy.capacity if isinstance(policy.capacity, Spill) else None
    places_per_rank = placement.slots_per_rank + (spill.guests if spill else 0)
    rows_LS = np.zeros((layers, groups * places_per_rank), dtype=np.int64)
    pairs_LGX = np.zeros((layers, layout.ranks, groups), dtype=np.int32)
    copies_LGX = np.zeros_like(pairs_LGX)
    node_copies_LGN = np.zeros((layers, layout.ranks, layout.nodes), dtype=np.int32)
    group_of_slot = np.arange(groups * places_per_rank) // places_per_rank
    padder = None
    if policy.capacity is not None and policy.capacity.pad:
        padder = Padder.of(policy.capacity, placement, layout, source_rank_T, replica_choice)
    plans: list[SpillPlan] = []
    layer = -1
    for layer, assignment in enumerate(assignments):
        if layer == layers:
            raise InputError(f"more layers of assignments than the placement's {layers}; place for these layers")
        slot_TK = choose_slots(
            assignment, placement, layer, source_rank_T // tensor, replica_choice, node_of_G=node_of_X
        )
        if spill:
            rows_GS = rows_by_source(slot_TK, source_rank_T, (layout.ranks, placement.slots))
            plans.append(spill.plan(rows_GS, groups))
            slot_TK = plans[-1].place_of(slot_TK, source_rank_T)
        _count(
            slot_TK,
            source_rank_T,
            group_of_slot,
            node_of_X,
            rows_LS[layer],
            pairs_LGX[layer],
            copies_LGX[layer],
            node_copies_LGN[layer],
        )
        if padder:
            padder.pad(layer, assignment, slot_TK, rows_LS[layer])
    if layer + 1 != layers:
        raise InputError(f"{layer + 1} layers of assignments, but the placement has {layers}; place for these layers")
    tokens_G = np.bincount(source_rank_T, minlength=layout.ranks)
    return Work(
        model=model,
        layout=layout,
        protocol=protocol,
        dispatch_dtype=dispatch_dtype or model.activation_dtype,
        tokens_G=tokens_G,
        context=context,
        rows_LS=rows_LS,
        pairs_LGG=by_rank(pairs_LGX, tensor),
        copies_LGG=by_rank(copies_LGX, tensor),
        node_copies_LGN=node_copies_LGN,
        route=route_operation(policy, placement, tokens_G),
        count_bytes=_COUNT_BYTES * _counts_sent(placement, replica_choice, spill),
        counts_first=spill is not None or asks_counts(replica_choice, placement),
        row_of_layer=np.arange(layers) if row_of_layer is None else row_of_layer,
        padding=padder.padding if padder else None,
        experts_moved_LGG=(
            np.stack([np.kron(plan.experts_XX, np.eye(tensor, dtype=np.int64)) for plan in plans]) if spill else None
        ),
    )


def _counts_sent(placement: Placement, replica_choice: ReplicaChoice, spill: Spill | None) -> int:
    """How many counts each rank tells each other one: those of its own slots, unless the other must know more.

    Who knows the rows of each rank and expert knows those of each slot too, so that a spill needs no counts of its own.
    """
    if asks_counts(replica_choice, placement):
        return placement.experts
    return placement.slots if spill else placement.slots_per_rank


def route_operation(policy: RoutingPolicy, placement: Placement, tokens_G: NDArray[np.int64]) -> Route:
    """What the policy itself costs on each rank."""
    return Route(
        tokens_X=tokens_G,
        width=policy.width,
        parts=(*policy.work, *(["replicas"] if placement.slots > placement.experts else [])),
        passes=sum(part.passes for part in policy.parts),
    )


@numba.njit(cache=True)
def _count(
    slot_TK: Any,
    source_rank_T: Any,
    group_of_slot: Any,
    node_of_group: Any,
    rows_S: Any,
    pairs_GX: Any,
    copies_GX: Any,
    node_copies_GN: Any,
) -> None:
    """Count one layer, by the X groups of ranks that slots belong to.

    Unsigned indices spare a check for negative ones, and groups are looked up rather than divided for: 4 times as fast.
    """
    last_token_X = np.full(pairs_GX.shape[1], -1, dtype=np.int64)
    last_token_N = np.full(node_copies_GN.shape[1], -1, dtype=np.int64)
    for token in range(slot_TK.shape[0]):
        source = np.uintp(source_rank_T[token])
        pairs_X, copies_X, node_copies_N = pairs_GX[source], copies_GX[source], node_copies_GN[source]
        for column in range(slot_TK.shape[1]):
            if slot_TK[token, column] < 0:
                continue
            slot = np.uintp(slot_TK[token, column])
            rows_S[slot] += 1
            group = np.uintp(group_of_slot[slot])
            pairs_X[group] += 1
            if last_token_X[group] != token:
                last_token_X[group] = token
                copies_X[group] += 1
                node = np.uintp(node_of_group[group])
                if last_token_N[node] != token:
                    last_token_N[node] = token
                    node_copies_N[node] += 1

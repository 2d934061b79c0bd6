"""Lowering: from an assignment and a placement to what each rank computes and sends.

One compiled kernel a layer counts rows by slot and by rank pair, token by token. Bytes follow the wire protocol:
`per_expert` sends a token once for each expert that computes it, `per_rank` once for each rank that does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numba
import numpy as np
from numpy.typing import NDArray

from cost_models.kernels.token_traffic import row_bytes
from cost_models.ops import Route
from router.assignment import Assignment
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.replicas import ReplicaChoice, choose_slots
from traces.model import ModelSpec

Protocol = Literal["per_expert", "per_rank"]
_COUNT_BYTES = 8  # rows per slot are exchanged as int64 before the rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One leg of a collective: over the links of `tier`, `bytes_LGG` from source to destination rank."""

    tier: str
    bytes_LGG: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one microbatch makes the ranks do in each of L layers.

    `protocol`: how rows travel; `tokens_G` tokens that each rank holds; `rows_LS` rows that each slot computes;
    `pairs_LGG` kept pairs and `copies_LGG` tokens with any, by source and computing rank; `route` the policy's own
    work; `count_bytes` for each rank pair, ahead of the rows; `dispatch`, in `dispatch_dtype`, and `combine` the hops
    there and back.
    """

    protocol: Protocol
    tokens_G: NDArray[np.int64]
    rows_LS: NDArray[np.int64]
    pairs_LGG: NDArray[np.int64]
    copies_LGG: NDArray[np.int64]
    route: Route
    count_bytes: int
    dispatch_dtype: str
    dispatch: tuple[Hop, ...]
    combine: tuple[Hop, ...]

    @property
    def ranks(self) -> int:
        """G."""
        return int(self.tokens_G.size)

    @property
    def rows_LGS(self) -> NDArray[np.int64]:
        """`rows_LS` by rank: [L, G, slots of a rank]."""
        return self.rows_LS.reshape(self.rows_LS.shape[0], self.ranks, -1)


def lower(
    model: ModelSpec,
    assignments: Sequence[Assignment],
    placement: Placement,
    *,
    policy: RoutingPolicy,
    source_rank_T: NDArray[np.int64],
    protocol: Protocol = "per_expert",
    dispatch_dtype: str | None = None,
    replica_choice: ReplicaChoice = "even",
) -> Work:
    """Lower the assignments of one step, one a layer, to the work of each rank.

    Tokens are dispatched in `dispatch_dtype`, with its scales, and come back as activations; None: both ways as those.
    """
    ranks, slots = placement.ranks, placement.slots
    rows_LS = np.zeros((len(assignments), slots), dtype=np.int64)
    pairs_LGG = np.zeros((len(assignments), ranks, ranks), dtype=np.int64)
    copies_LGG = np.zeros_like(pairs_LGG)
    for layer, assignment in enumerate(assignments):
        slot_TK = choose_slots(assignment, placement, layer, source_rank_T, replica_choice)
        _count(slot_TK, source_rank_T, placement.slots_per_rank, rows_LS[layer], pairs_LGG[layer], copies_LGG[layer])
    rows_LGG = pairs_LGG if protocol == "per_expert" else copies_LGG
    back_LGG = rows_LGG.swapaxes(1, 2).astype(np.float64) * model.row_bytes
    out_bytes = (
        model.row_bytes if dispatch_dtype is None else float(row_bytes(model.hidden, dispatch_dtype, "dispatch"))
    )
    tokens_G = np.bincount(source_rank_T, minlength=ranks)
    return Work(
        protocol=protocol,
        tokens_G=tokens_G,
        rows_LS=rows_LS,
        pairs_LGG=pairs_LGG,
        copies_LGG=copies_LGG,
        route=route_operation(policy, placement, tokens_G),
        count_bytes=_COUNT_BYTES * placement.slots_per_rank,
        dispatch_dtype=dispatch_dtype or "bfloat16",
        dispatch=(Hop(tier="all", bytes_LGG=rows_LGG.astype(np.float64) * out_bytes),),
        combine=(Hop(tier="all", bytes_LGG=back_LGG),),
    )


def route_operation(policy: RoutingPolicy, placement: Placement, tokens_G: NDArray[np.int64]) -> Route:
    """What the policy itself costs on each rank."""
    return Route(
        tokens_X=tokens_G,
        width=policy.selection.width,
        dynamic=policy.selection.name != "top_k",
        capacity=None if policy.capacity is None else policy.capacity.drop,
        replicas=placement.slots > placement.experts,
    )


@numba.njit(cache=True)
def _count(slot_TK: Any, source_rank_T: Any, slots_per_rank: int, rows_S: Any, pairs_GG: Any, copies_GG: Any) -> None:
    last_token_G = np.full(pairs_GG.shape[0], -1, dtype=np.int64)
    for token in range(slot_TK.shape[0]):
        source = source_rank_T[token]
        for slot in slot_TK[token]:
            if slot < 0:
                continue
            rank = slot // slots_per_rank
            rows_S[slot] += 1
            pairs_GG[source, rank] += 1
            if last_token_G[rank] != token:
                last_token_G[rank] = token
                copies_GG[source, rank] += 1

"""Padding of a step: the rows of no token that fill the places of a capacity that pads."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.assignment import Assignment
from router.capacity import Limit
from router.padding import check_padding, places_by_scope, places_by_slot
from router.placement.base import Placement
from router.replicas import ReplicaChoice
from router.spill import rows_by_source
from sim.layout import Layout


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Padding:
    """Rows of no token, which fill experts' places: `rows_LS` by slot; `rows_LGG` by source and computing rank.

    The latter are none where places are counted over all ranks and so belong to no source.
    """

    rows_LS: NDArray[np.int64]
    rows_LGG: NDArray[np.int32]


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Padder:
    """Fills places, layer by layer: what it has added is in `rows_LS` by slot and `rows_LGX` by source and group."""

    limit: Limit
    placement: Placement
    layout: Layout
    source_rank_T: NDArray[np.int64]
    choice: ReplicaChoice
    rows_LS: NDArray[np.int64]
    rows_LGX: NDArray[np.int32]

    @classmethod
    def of(
        cls,
        limit: Limit,
        placement: Placement,
        layout: Layout,
        source_rank_T: NDArray[np.int64],
        choice: ReplicaChoice,
    ) -> "Padder":
        """Of a step of tokens that are held by `source_rank_T`. Errors: as `check_padding`."""
        check_padding(choice, placement)
        return cls(
            limit=limit,
            placement=placement,
            layout=layout,
            source_rank_T=source_rank_T,
            choice=choice,
            rows_LS=np.zeros((placement.layers, placement.slots), dtype=np.int64),
            rows_LGX=np.zeros((placement.layers, layout.ranks, placement.ranks), dtype=np.int32),
        )

    def pad(self, layer: int, assignment: Assignment, slot_TK: NDArray[np.int64], rows_S: NDArray[np.int64]) -> None:
        """Add a layer's padding to its `rows_S`."""
        placement, ranks = self.placement, self.layout.ranks
        places_Z = places_by_scope(self.limit, assignment, self.source_rank_T, ranks, placement.experts)
        if places_Z.size == ranks:
            rows_GS = rows_by_source(slot_TK, self.source_rank_T, (ranks, placement.slots))
            group_of_G = np.arange(ranks) // self.layout.expert_tensor
            node_of_X = self.layout.node_of_G[:: self.layout.expert_tensor]
            places_GS = places_by_slot(places_Z, placement, layer, group_of_G, self.choice, node_of_X)
            # A rank can have more than its places here: those that share their experts take replicas in turn together,
            # and one of two microbatches can have most of what the capacity let pass in both.
            padding_GS = np.maximum(places_GS - rows_GS, 0)
            self.rows_LGX[layer] = padding_GS.reshape(ranks, placement.ranks, -1).sum(axis=2)
            self.rows_LS[layer] = padding_GS.sum(axis=0)
        else:
            places_1S = places_by_slot(places_Z, placement, layer, np.zeros(1, dtype=np.int64), "even")
            self.rows_LS[layer] = np.maximum(places_1S[0] - rows_S, 0)
        rows_S += self.rows_LS[layer]

    @property
    def padding(self) -> Padding:
        """What it has added."""
        return Padding(rows_LS=self.rows_LS, rows_LGG=by_rank(self.rows_LGX, self.layout.expert_tensor))


def by_rank(count_LGX: NDArray[np.int32], tensor: int) -> NDArray[np.int32]:
    """Counts by group of `tensor` ranks, as counts by rank: all of a group's have the same."""
    return count_LGX if tensor == 1 else np.repeat(count_LGX, tensor, axis=2)

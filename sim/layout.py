"""Layout: how the ranks of a cluster share the model."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models.cluster import Cluster
from traces.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """G ranks: experts are spread over all of them, tokens too.

    `node_of_G`: the node of each rank, neighbours together. `attention_tensor`: so many neighbours hold a share of the
    heads each and work on the same requests (1: data-parallel attention). `expert_tensor`: so many neighbours hold a
    share of each of their experts' widths (1: experts are whole), so that experts are spread over G / expert_tensor
    groups of ranks.
    """

    node_of_G: NDArray[np.int64]
    attention_tensor: int = 1
    expert_tensor: int = 1

    def __post_init__(self) -> None:
        sizes = {"attention_tensor": self.attention_tensor, "expert_tensor": self.expert_tensor}
        for name, size in sizes.items():
            if size < 1 or self.ranks % size:
                raise InputError(f"{name} is {size}, which does not divide {self.ranks} ranks; use a divisor of them")
            groups_XR = self.node_of_G.reshape(-1, size)
            if (groups_XR != groups_XR[:, :1]).any():
                raise InputError(
                    f"{name} is {size}, but then some ranks that work together lie on different nodes; "
                    f"use a divisor of {np.gcd.reduce(np.bincount(self.node_of_G))}"
                )

    @property
    def ranks(self) -> int:
        """G."""
        return int(self.node_of_G.size)

    @property
    def nodes(self) -> int:
        """N."""
        return int(self.node_of_G[-1]) + 1

    @property
    def expert_groups(self) -> int:
        """Groups of ranks that a slot can belong to: the ranks of a `Placement`."""
        return self.ranks // self.expert_tensor

    @classmethod
    def one_node(cls, ranks: int) -> "Layout":
        """Ranks of one node, nothing shared."""
        return cls(node_of_G=np.zeros(ranks, dtype=np.int64))

    @classmethod
    def on(cls, cluster: Cluster, *, attention_tensor: int = 1, expert_tensor: int = 1) -> "Layout":
        """On a cluster's ranks."""
        return cls(node_of_G=cluster.node_of_G, attention_tensor=attention_tensor, expert_tensor=expert_tensor)

"""The operations of a MoE layer, as a cost model prices them: arrays of them at once.

X is any leading shape (steps, layers, ranks, …); scalars are allowed. Each names the work, not how it is done;
the widths that do not vary inside a model are plain numbers.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Router logits, softmax and the sorted candidates of `tokens_X` tokens."""

    tokens_X: Array
    hidden: int
    experts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A policy at work on `tokens_X` tokens: selection of up to `width` experts, capacity, choice of replicas.

    `dynamic`: the number of experts differs from token to token; `capacity`: how pairs are dropped, if at all.
    """

    tokens_X: Array
    width: int
    dynamic: bool
    capacity: Literal["position", "probs"] | None
    replicas: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Permute:
    """Sort `pairs_X` (token, expert) pairs by slot and gather the rows of the `rows_X` kept ones."""

    pairs_X: Array
    rows_X: Array
    row_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Regroup:
    """Reorder `rows_X` received rows that lie in `segments` runs (source rank × slot), once."""

    rows_X: Array
    segments: int
    row_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Expert MLPs of one rank: `rows_XS` rows for each of its S slots, every slot with rows reads its weights.

    `matrices` is 3 for gated MLPs; `weight_bytes` is bytes an element of the weights.
    """

    rows_XS: Array
    hidden: int
    expert_hidden: int
    matrices: int
    weight_bytes: float
    row_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Combine:
    """Add `rows_X` weighted expert outputs into `tokens_X` tokens."""

    rows_X: Array
    tokens_X: Array
    row_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCopy:
    """Copy `bytes_X` bytes inside a rank's memory."""

    bytes_X: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class AllToAll:
    """Move `bytes_XGG` from source to destination rank; the diagonal stays on its rank. One time for all ranks."""

    bytes_XGG: Array


Operation = Gate | Route | Permute | Regroup | Experts | Combine | MemoryCopy | AllToAll


class CostModel(Protocol):
    """Anything that says what operations take."""

    @property
    def name(self) -> str:
        """Where the figures come from, in a few words for reports."""

    def seconds(self, operation: Operation) -> NDArray[np.float64]:
        """Seconds for each operation of the array: shape X."""

"""What every family of kernels gives: its tables, the operations in them, their physics and what a learner may see."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cost_models.boosting import Boosting
from cost_models.description import Description
from cost_models.devices import Device
from cost_models.ops import Operation
from cost_models.units import US

Columns = Mapping[str, NDArray[Any]]
FOLDS = 5
LAUNCH_S = 5 * US  # of a kernel, roughly; its price is fitted
_DISTURBED = 2.0  # times longer than more work took


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The rows and the column that hold the time of one operation.

    `unit_s`: seconds in the column's unit. `after`: a column in the same unit of what goes before and counts too, if
    any. `where`: the values of other columns that pick the operation's rows.
    """

    column: str
    unit_s: float
    after: str | None = None
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableKind:
    """One kind of measured table.

    `name`: its files are `<gpu>_<name>.parquet`. `package_file`: what the file is called in aiconfigurator-core.
    `keys`: the columns that tell rows apart. `timings`: for each operation where its time stands. `dtype_column`: the
    column that splits it into fits of their own; without one, all rows are of `dtype`. `size`: the column along which
    a plot shows it. `added`: columns that early versions lack, with what held for all their rows.
    """

    name: str
    framework: str
    kernel: "Kernel"
    keys: Sequence[str]
    timings: Mapping[str, Timing]
    dtype_column: str | None = None
    dtype: str = "bfloat16"
    package_file: str = ""
    size: str
    added: Mapping[str, Any] = field(default_factory=dict)


class Kernel(Protocol):
    """One family of kernels. N rows of a table."""

    @property
    def boosting(self) -> Boosting:
        """How to grow the residual's trees."""

    def describe_table(self, columns: Columns, *, op: str, dtype: str, device: Device) -> Description:
        """What physics and the learner see of the rows of a table that time `op`, shape [N]."""

    def serves(self, operation: Operation, *, op: str) -> bool:
        """Whether the timings of `op` in a table of this family are timings of such an operation."""

    def describe(self, operation: Any, device: Device) -> Description:
        """The same of operations of any shape."""

    def holdouts(self, columns: Columns, *, op: str) -> Mapping[str, NDArray[np.int64]]:
        """The ways to hold rows out: for each the fold of every row, -1 for rows that are never held out."""

    def suspects(self, columns: Columns, seconds_N: NDArray[np.float64], *, op: str) -> NDArray[np.bool_]:
        """The rows that a stated rule finds to be wrong: reported, not fitted."""

    def tokens(self, columns: Columns) -> NDArray[np.int64] | None:
        """Tokens of the step each row belongs to; None where a table has none."""


def hashed_folds(columns: Columns, names: Sequence[str]) -> NDArray[np.int64]:
    """Fold of every row: sha256 of its values in `names`, joined by commas, modulo five.

    >>> hashed_folds({"n": np.array([512, 1024]), "k": np.array([512, 512])}, ["n", "k"]).tolist()
    [0, 2]
    """
    groups = [",".join(map(str, row)) for row in zip(*(columns[name].tolist() for name in names), strict=True)]
    folds = {group: int(hashlib.sha256(group.encode()).hexdigest(), 16) % FOLDS for group in set(groups)}
    return np.array([folds[group] for group in groups], dtype=np.int64)


def leave_one_out(values_N: NDArray[Any]) -> NDArray[np.int64]:
    """Fold of every row where each distinct value is a fold of its own.

    >>> leave_one_out(np.array([8, 2, 8, 4])).tolist()
    [2, 0, 2, 1]
    """
    return np.unique(values_N, return_inverse=True)[1].astype(np.int64)


def outlasts_larger(
    sizes_N: NDArray[Any], seconds_N: NDArray[np.float64], others: Sequence[NDArray[Any]]
) -> NDArray[np.bool_]:
    """The rows that took over twice as long as some larger one that is the same in all `others`: disturbed.

    >>> outlasts_larger(np.array([1, 2, 4]), np.array([17.7, 7.0, 7.6]), []).tolist()
    [True, False, False]
    """
    groups: dict[Any, list[int]] = {}
    for row, key in enumerate(zip(*(values.tolist() for values in others), strict=True) if others else sizes_N):
        groups.setdefault(key if others else (), []).append(row)
    suspect_N = np.zeros(len(seconds_N), dtype=bool)
    for rows in groups.values():
        ascending = np.array(rows)[np.argsort(sizes_N[rows], kind="stable")]
        shortest = np.minimum.accumulate(seconds_N[ascending][::-1])[::-1]
        suspect_N[ascending] = seconds_N[ascending] > _DISTURBED * shortest
    return suspect_N

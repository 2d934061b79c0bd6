"""All-to-all: rows to the ranks that compute them, with uneven splits, as torch.distributed does it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from cost_models.microbench.ranks import RankGroup
from cost_models.microbench.timer import Clock
from cost_models.ops import AllToAll, Operation


def all_to_all(rows_ND: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
    """Send `sent[g]` rows, which lie in rank order, to each rank g; return the `received[g]` rows of each, in order."""
    out_ND = rows_ND.new_empty(sum(received), rows_ND.shape[1])
    dist.all_to_all_single(out_ND, rows_ND, list(received), list(sent))
    return out_ND


@dataclass(frozen=True, slots=True, kw_only=True)
class AllToAllBenchmark:
    """`all_to_all` of rows of `row_bytes`, the same number from every rank to every rank, itself included."""

    ranks: int
    row_bytes: int
    clock: Clock = "wall"

    def cases(self) -> list[Operation]:
        """1 to 8192 rows a rank pair, half powers of two apart, then uneven ones."""
        rows_axis = sorted({round(2 ** (half / 2)) for half in range(27)})
        even = [np.full((self.ranks, self.ranks), rows) for rows in rows_axis]
        source = np.arange(self.ranks)[:, None]
        uneven = [np.broadcast_to(rows * (source + 1), (self.ranks, self.ranks)) for rows in (96, 192, 384, 768)]
        return [AllToAll(bytes_XGG=rows_GG * self.row_bytes) for rows_GG in even + uneven]

    def prepare(self, case: Operation, group: RankGroup) -> Callable[[], object]:
        """Rows of float32."""
        assert isinstance(case, AllToAll)
        rows_GG = case.bytes_XGG // self.row_bytes
        sent, received = rows_GG[group.rank].tolist(), rows_GG[:, group.rank].tolist()
        rows_ND = torch.randn(sum(sent), self.row_bytes // 4, device=group.device)
        return lambda: all_to_all(rows_ND, sent, received)

"""Experts: the gated MLPs of the slots that one rank holds, each on its own rows."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import silu

from cost_models.microbench.ranks import RankGroup
from cost_models.microbench.timer import Clock
from cost_models.ops import Experts, Operation


def expert_mlp(
    rows_ND: torch.Tensor,
    counts: list[int],
    w_gate_SFD: torch.Tensor,
    w_up_SFD: torch.Tensor,
    w_down_SDF: torch.Tensor,
) -> torch.Tensor:
    """Run each slot's SwiGLU MLP, down(silu(gate(x)) * up(x)), on its rows: [N, D].

    `rows_ND` is sorted by slot and `counts` says how many rows each slot has; slots without rows do no work.
    """
    out_ND = torch.empty_like(rows_ND)
    first = 0
    for slot, count in enumerate(counts):
        if count == 0:
            continue
        x_ND = rows_ND.narrow(0, first, count)
        hidden_NF = silu(x_ND @ w_gate_SFD[slot].T) * (x_ND @ w_up_SFD[slot].T)
        torch.mm(hidden_NF, w_down_SDF[slot].T, out=out_ND.narrow(0, first, count))
        first += count
    return out_ND


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsBenchmark:
    """`expert_mlp` over distinct weights: rows a slot × number of slots, even and uneven.

    One warm expert under-predicts, so the number of distinct experts is an axis of its own.
    """

    hidden: int
    expert_hidden: int
    most_slots: int
    row_bytes: int
    clock: Clock = "compute"

    def cases(self) -> list[Operation]:
        """Sizes in order; the uneven ones have rows in the ratio 1 : 2 : 3 : …."""
        slots_axis = sorted({1, max(self.most_slots // 4, 1), max(self.most_slots // 2, 1), self.most_slots})
        cases = [[rows] * slots for slots in slots_axis for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)]
        cases += [
            [rows * (slot + 1) * 2 // (slots + 1) for slot in range(slots)]
            for slots in slots_axis[-2:]
            for rows in (48, 96, 192, 384)
        ]
        return [
            Experts(
                rows_XS=np.array(rows_S),
                hidden=self.hidden,
                expert_hidden=self.expert_hidden,
                matrices=3,
                weight_bytes=4,
                row_bytes=self.row_bytes,
            )
            for rows_S in cases
        ]

    def prepare(self, case: Operation, group: RankGroup) -> Callable[[], object]:
        """Random rows and weights of the scale that keeps activations finite."""
        assert isinstance(case, Experts)
        counts = [int(count) for count in case.rows_XS]
        scale = float(self.hidden) ** -0.5

        def weights(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(len(counts), rows, columns, device=group.device).mul_(scale)

        rows_ND = torch.randn(sum(counts), self.hidden, device=group.device)
        w_gate_SFD, w_up_SFD = weights(self.expert_hidden, self.hidden), weights(self.expert_hidden, self.hidden)
        w_down_SDF = weights(self.hidden, self.expert_hidden)
        return lambda: expert_mlp(rows_ND, counts, w_gate_SFD, w_up_SFD, w_down_SDF)

"""Permute, regroup and combine: moving token rows to the order of slots and back.

Pairs are sorted by slot, slots lie rank by rank, so the rows for each rank are one run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cost_models.microbench.ranks import RankGroup
from cost_models.microbench.timer import Clock
from cost_models.ops import Combine, Operation, Permute, Regroup


def permute(x_TD: torch.Tensor, slot_TK: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gather a row for each kept pair, sorted by slot: (rows [N, D], pairs [N], counts [S]).

    `slot_TK` is -1 where a pair is not computed. `pairs` indexes the flattened [T * K].
    """
    slot_P = slot_TK.reshape(-1)
    counts = torch.bincount(slot_P + 1, minlength=slots + 1)
    pair_N = torch.argsort(slot_P, stable=True)[int(counts[0]) :]
    return x_TD.index_select(0, pair_N // slot_TK.shape[1]), pair_N, counts[1:]


def regroup(rows_ND: torch.Tensor, counts_AB: Sequence[Sequence[int]]) -> torch.Tensor:
    """Reorder runs of rows from A-major to B-major order: `counts_AB[a][b]` rows lie in run (a, b)."""
    runs = torch.split(rows_ND, [count for row in counts_AB for count in row])
    width = len(counts_AB[0])
    return torch.cat([runs[a * width + b] for b in range(width) for a in range(len(counts_AB))])


def combine(rows_ND: torch.Tensor, pair_N: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """Add each pair's row, times its weight, into its token: [T, D]."""
    tokens, k = weights_TK.shape
    weighted_ND = rows_ND * weights_TK.reshape(-1).index_select(0, pair_N)[:, None]
    return rows_ND.new_zeros(tokens, rows_ND.shape[1]).index_add_(0, pair_N // k, weighted_ND)


_TOKENS = (64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True, slots=True, kw_only=True)
class PermuteBenchmark:
    """`permute` at several tokens, k and shares of kept pairs."""

    hidden: int
    slots: int
    row_bytes: int
    clock: Clock = "compute"

    def cases(self) -> list[Operation]:
        """Sizes in order; a share of 0.6 stands for dropped and unused pairs."""
        return [
            Permute(pairs_X=np.array(tokens * k), rows_X=np.array(int(tokens * k * share)), row_bytes=self.row_bytes)
            for k, share in ((4, 1.0), (1, 1.0), (8, 0.6))
            for tokens in _TOKENS
        ]

    def prepare(self, case: Operation, group: RankGroup) -> Callable[[], object]:
        """Pairs with random slots."""
        assert isinstance(case, Permute)
        pairs, rows = int(case.pairs_X), int(case.rows_X)
        slot_P = torch.randint(self.slots, (pairs,), device=group.device)
        slot_P[torch.randperm(pairs, device=group.device)[rows:]] = -1
        x_TD = torch.randn(pairs, self.hidden, device=group.device)
        slot_TK = slot_P.reshape(-1, 1)
        return lambda: permute(x_TD, slot_TK, self.slots)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegroupBenchmark:
    """`regroup` at several numbers of rows, over the segments that `ranks` ranks and their slots make."""

    hidden: int
    slots_per_rank: int
    row_bytes: int
    clock: Clock = "compute"

    def cases(self) -> list[Operation]:
        """Sizes in order, for two numbers of segments."""
        return [
            Regroup(rows_X=np.array(tokens * 4), segments=2 * slots, row_bytes=self.row_bytes)
            for slots in (self.slots_per_rank, 2 * self.slots_per_rank)
            for tokens in _TOKENS
        ]

    def prepare(self, case: Operation, group: RankGroup) -> Callable[[], object]:
        """Equal runs from two sources."""
        assert isinstance(case, Regroup)
        rows = int(case.rows_X)
        half = case.segments // 2
        counts_AB = [[rows // case.segments] * half for _ in range(2)]
        rows_ND = torch.randn(sum(map(sum, counts_AB)), self.hidden, device=group.device)
        return lambda: regroup(rows_ND, counts_AB)


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineBenchmark:
    """`combine` at several tokens and k."""

    hidden: int
    row_bytes: int
    clock: Clock = "compute"

    def cases(self) -> list[Operation]:
        """Sizes in order."""
        return [
            Combine(rows_X=np.array(tokens * k), tokens_X=np.array(tokens), row_bytes=self.row_bytes)
            for k in (4, 1)
            for tokens in _TOKENS
        ]

    def prepare(self, case: Operation, group: RankGroup) -> Callable[[], object]:
        """Rows in a random order of pairs."""
        assert isinstance(case, Combine)
        rows, tokens = int(case.rows_X), int(case.tokens_X)
        rows_ND = torch.randn(rows, self.hidden, device=group.device)
        pair_N = torch.randperm(rows, device=group.device)
        weights_TK = torch.rand(tokens, rows // tokens, device=group.device)
        return lambda: combine(rows_ND, pair_N, weights_TK)

"""Memory: copying bytes inside a rank's own memory."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from cost_models.microbench.ranks import RankGroup
from cost_models.microbench.timer import Clock
from cost_models.ops import MemoryCopy, Operation


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBenchmark:
    """A copy between two buffers of 64 KB to 32 MB."""

    clock: Clock = "compute"

    def cases(self) -> list[Operation]:
        """Sizes in order, doubling."""
        return [MemoryCopy(bytes_X=np.array(2**power)) for power in range(16, 26)]

    def prepare(self, case: Operation, group: RankGroup) -> Callable[[], object]:
        """Two buffers, written once."""
        assert isinstance(case, MemoryCopy)
        source = torch.ones(int(case.bytes_X) // 4, device=group.device)
        target = torch.zeros_like(source)
        return lambda: target.copy_(source)

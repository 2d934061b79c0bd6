"""Memory: what a rank must hold, and whether its device can."""

from dataclasses import dataclass

from router.placement.base import Placement
from traces.model import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes on the fullest rank; `capacity_bytes` is None where the device's size is unknown."""

    expert_bytes: float
    other_weight_bytes: float
    kv_cache_bytes: float
    buffer_bytes: float
    capacity_bytes: float | None

    @property
    def total_bytes(self) -> float:
        """All of it."""
        return self.expert_bytes + self.other_weight_bytes + self.kv_cache_bytes + self.buffer_bytes

    @property
    def fits(self) -> bool:
        """Whether the device holds it (true where its size is unknown)."""
        return self.capacity_bytes is None or self.total_bytes <= self.capacity_bytes


def memory_use(
    model: ModelSpec,
    placement: Placement,
    *,
    tokens_per_rank: int,
    width: int,
    kv_tokens_per_rank: int,
    capacity_bytes: float | None,
) -> MemoryUse:
    """The memory of one rank: its experts, a copy of everything else, its KV cache, and dispatch buffers.

    Attention is data-parallel, so attention, embeddings and shared experts stand whole on every rank. Buffers hold the
    rows of one layer, `width` a token, as sent and as received when rows spread evenly.
    """
    shared_parameters = model.layers * model.shared_parameters
    other_bytes = model.weight_bytes if model.weight_bytes >= 1 else 2.0  # 4-bit models keep the rest in bf16
    return MemoryUse(
        expert_bytes=placement.slots_per_rank * placement.layers * model.expert_bytes,
        other_weight_bytes=(model.other_parameters + shared_parameters) * other_bytes,
        kv_cache_bytes=float(kv_tokens_per_rank * model.kv_bytes_per_token),
        buffer_bytes=2.0 * tokens_per_rank * width * model.row_bytes,
        capacity_bytes=capacity_bytes,
    )

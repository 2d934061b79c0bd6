"""Memory: what a rank must hold, and whether its device can."""

from dataclasses import dataclass

from cost_models.devices import DTYPE_BYTES
from cost_models.kernels.token_traffic import row_bytes
from router.placement.base import Placement
from sim.layout import Layout
from sim.lower import Protocol
from traces.model import ModelSpec

_LOW_LATENCY_BUFFERS = 2  # DeepEP's low-latency mode sends from one while it receives into the other


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
    layout: Layout,
    *,
    tokens_per_rank: int,
    width: int,
    kv_tokens_per_rank: float,
    protocol: Protocol,
    dispatch_dtype: str,
    kv_dtype: str = "bfloat16",
    capacity_bytes: float | None,
) -> MemoryUse:
    """The memory of one rank: its experts, its share of everything else, its KV cache, and dispatch buffers.

    Where a part of its experts stays in the host's memory, it has room for the others and for one more expert, through
    which those that a layer uses come one after another.
    Embeddings, dense layers and shared experts stand whole on every rank; attention does where it is data-parallel,
    else ranks share its heads: grouped key-value heads are split, as far as they go round, a latent cache is not. The
    cache holds `kv_tokens_per_rank` tokens of the requests that a rank works on. Buffers: `per_expert`, room for every
    rank's tokens at every expert, dispatched and combined, twice (DeepEP's low-latency mode); else the rows of one
    layer, `width` a token, as sent and as received when rows spread evenly.
    """
    tensor = layout.attention_tensor
    resident = placement.resident_slots_of_rank
    expert_places = resident + (resident < placement.layers * placement.slots_per_rank)
    whole_parameters = model.other_parameters - model.attention_parameters + model.layers * model.shared_parameters
    kv_share = 1 if model.attention == "latent" else min(tensor, max(model.kv_heads, 1))
    if protocol == "per_expert":
        rows = _LOW_LATENCY_BUFFERS * placement.slots * layout.expert_tensor * tokens_per_rank
        both_ways = row_bytes(model.hidden, dispatch_dtype, "dispatch") + row_bytes(
            model.hidden, dispatch_dtype, "combine"
        )
        buffer_bytes = rows * float(both_ways)
    else:
        buffer_bytes = (1.0 + layout.expert_tensor) * tokens_per_rank * width * model.row_bytes
    return MemoryUse(
        expert_bytes=expert_places * model.expert_bytes / layout.expert_tensor,
        other_weight_bytes=(whole_parameters + model.attention_parameters / tensor) * model.other_weight_bytes,
        kv_cache_bytes=kv_tokens_per_rank * model.kv_bytes_per_token * DTYPE_BYTES.get(kv_dtype, 2.0) / 2 / kv_share,
        buffer_bytes=buffer_bytes,
        capacity_bytes=capacity_bytes,
    )

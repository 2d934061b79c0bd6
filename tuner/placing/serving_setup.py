"""Serving setup: what the steps of a trace run on, and how."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cost_models.cluster import Cluster, gpu_cluster
from cost_models.degrade import degrade
from cost_models.devices import device
from cost_models.kernel_costs import KernelCosts
from cost_models.kernel_profile import shipped_profiles
from cost_models.ops import CostModel
from cost_models.roofline import Roofline
from router.replicas import ReplicaChoice
from sim.lower import Protocol
from traces.batching import Phase
from traces.errors import InputError

DATASHEET = "datasheet"
_PREFERRED = ("sglang", "trtllm", "vllm", "nccl")  # SGLang's tables have DeepEP's exchanges
# Decode sends each row as soon as it is ready, prefill a token once to each rank, as DeepEP's two modes do.
_PROTOCOLS: dict[Phase, Protocol] = {"decode": "per_expert", "prefill": "per_rank"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSetup:
    """How steps run: `gpu` by its datasheet's name; `costs` frameworks of measured kernels, or `datasheet` (none: all).

    `weights`: their format, where they do not run in the model's own. `tokens_per_rank` and `protocol` None: chosen by
    the trace and by the phase. `kv_tokens_per_rank`: cached tokens of a rank (0: what recorded positions say).
    """

    gpu: str = "h100_sxm"
    costs: Sequence[str] = ()
    weights: str | None = None
    phase: Phase = "decode"
    tokens_per_rank: int | None = None
    kv_tokens_per_rank: int = 0
    protocol: Protocol | None = None
    replica_choice: ReplicaChoice = "even"

    def __post_init__(self) -> None:
        if self.kv_tokens_per_rank < 0:
            raise InputError(f"kv_tokens_per_rank is {self.kv_tokens_per_rank}; it must be 0 or more")

    @property
    def sends(self) -> Protocol:
        """The protocol."""
        return self.protocol or _PROTOCOLS[self.phase]

    def cluster(self, *, ranks: int, nodes: int, gone: int | None) -> Cluster:
        """The ranks, evenly on so many nodes, but for the one that is gone."""
        whole = gpu_cluster(replace(device(self.gpu), ranks_per_node=ranks // nodes), ranks)
        return whole if gone is None else degrade(whole, [f"rank{gone}=lost"])

    def cost_model(self, cluster: Cluster) -> CostModel:
        """The costs that are asked for, or all measured kernels of the GPU, or where there are none its datasheet."""
        if list(self.costs) == [DATASHEET]:
            return Roofline(cluster)
        if self.costs:
            return KernelCosts.shipped(cluster, *self.costs)
        assert cluster.device is not None
        try:
            there = shipped_profiles(cluster.device.measured_as)
        except InputError:
            return Roofline(cluster)
        return KernelCosts.shipped(cluster, *(name for name in _PREFERRED if name in there))


def default_nodes(gpu: str, ranks: int) -> int:
    """The fewest equal nodes of at most as many GPUs as one of the kind has.

    >>> default_nodes("h100_sxm", 32), default_nodes("h100_sxm", 9), default_nodes("gb200", 36)
    (4, 3, 1)
    """
    most = device(gpu).ranks_per_node
    return next((nodes for nodes in range(1, ranks + 1) if ranks % nodes == 0 and ranks // nodes <= most), 1)

"""Execution: how a serving engine runs a step, around the kernels that a cost model prices."""

from dataclasses import dataclass
from typing import Literal

from traces.errors import InputError

Overlap = Literal["none", "single_batch", "two_batch"]
Extent = Literal["moe", "whole"]

# The batch sizes for which engines capture CUDA graphs when they are not told others (vLLM and SGLang: 1, 2, 4, then
# multiples of 8).
GRAPH_BUCKETS = (1, 2, 4, *range(8, 513, 8))


# Kernels and collectives beside one another share caches and memory: with multiprocessors divided between them, 42% of
# the ideal speed-up is reached on average (arXiv 2412.14335: eight MI300X, products beside all-gather and all-to-all).
# Two that take equally long then run at (1 + 0.42) / 2 of their speeds on average; with 20 of 132 multiprocessors for
# the exchange that is 0.77 for its own and 0.77 * 112 / 132 for the other.
OVERLAP_PACE = 0.77


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """What belongs to a step and how its parts overlap.

    `extent`: the MoE layers alone (`moe`), or the `whole` step with attention, dense layers, LM head, sampling and the
    host's gap. `overlap`: `two_batch` halves each rank's tokens, so that one half computes while the other
    communicates; `single_batch` runs the experts' down product and the shared expert beside the return (else the shared
    expert runs beside the dispatch). `graph_buckets`: token counts of captured CUDA graphs, to the next of which a
    decode step is padded; empty: no graphs, and every kernel takes at least the `launch_s` seconds of its launch.
    `host_gap_s`: seconds a step in which the host keeps all ranks waiting. `comm_sms`: multiprocessors that a
    normal-mode exchange takes from what is computed beside it; `overlap_pace`: the pace at which both run on what is
    left. `kv_dtype` of cached keys and values; `attention_dtype` of attention's projections (None: the model's own).
    """

    extent: Extent = "whole"
    overlap: Overlap = "none"
    graph_buckets: tuple[int, ...] = GRAPH_BUCKETS
    launch_s: float = 5e-6
    host_gap_s: float = 0.0
    comm_sms: int = 20
    overlap_pace: float = OVERLAP_PACE
    kv_dtype: str = "bfloat16"
    attention_dtype: str | None = None

    def __post_init__(self) -> None:
        if any(bucket < 1 for bucket in self.graph_buckets):
            raise InputError(f"graph_buckets are {list(self.graph_buckets)}; each must be at least 1")
        for name in ("launch_s", "host_gap_s", "comm_sms"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.comm_sms < 1:
            raise InputError(
                "comm_sms is 0; a normal-mode exchange runs on at least 1 multiprocessor (DeepEP takes 20)"
            )
        if not 0 < self.overlap_pace <= 1:
            raise InputError(f"overlap_pace is {self.overlap_pace}; it must be above 0 and at most 1")

    def bucket(self, tokens: int) -> int | None:
        """The captured size that a decode step of `tokens` on its fullest rank runs in; None: it runs without a graph.

        >>> Execution(graph_buckets=(8, 16)).bucket(9), Execution(graph_buckets=(8, 16)).bucket(17)
        (16, None)
        """
        return min((bucket for bucket in self.graph_buckets if bucket >= tokens), default=None)

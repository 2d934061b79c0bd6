"""The operations of a model's step, as a cost model prices them: arrays of them at once.

X is any leading shape (steps, layers, ranks, …); scalars are allowed. Each names the work, not how it is done;
the widths that do not vary inside a model are plain numbers. A `kernel` picks one of the kernels that a profile has
for an operation, by the name that its measured table gives it; empty: the profile's own choice.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from cost_models.traffic import Traffic

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Router logits, softmax and the sorted candidates of `tokens_X` tokens."""

    tokens_X: Array
    hidden: int
    experts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A policy at work on `tokens_X` tokens, which choose up to `width` experts each.

    `parts`: what it does one after another, what it does twice twice, by the names under which a calibration times them
    (`top_k`, `capacity probs`, `replicas`, …); `passes`: how often they go over what tokens may choose, together.
    """

    tokens_X: Array
    width: int
    parts: tuple[str, ...]
    passes: int = 1


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

    `expert_hidden` is one width or one a slot, `matrices` is 3 for gated MLPs and 2 for others; `weight_bytes` is bytes
    an element of the weights, `dtype` the arithmetic where a profile tells several apart. `routed_tokens_X`: tokens
    that the kernel sees, those with no row on this rank too; None: every row is a token of its own. `top_k`: experts
    that each of them chose, on other ranks too; 0: those of this rank alone. `mode`: how rows arrived, as in
    `TokenExchange`, which some kernels are made for; empty: by none of its modes.
    """

    rows_XS: Array
    hidden: int
    expert_hidden: int | Array
    matrices: int
    weight_bytes: float
    row_bytes: int
    routed_tokens_X: Array | int | None = None
    top_k: int = 0
    mode: Literal["normal", "low_latency", ""] = ""
    dtype: str = "bfloat16"
    kernel: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMlp:
    """A dense MLP, a shared expert say, on `rows_X` rows; fields as in `Experts`."""

    rows_X: Array
    hidden: int
    mlp_hidden: int
    matrices: int
    weight_bytes: float
    row_bytes: int
    dtype: str = "bfloat16"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CountExchange(AllToAll):
    """Tell every rank how many rows it will get from each other, ahead of the rows themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CountGather(CountExchange):
    """Counts that all ranks need before they choose where rows go: no exchange of rows does that beside its own work.

    Cost models price it as a `CountExchange`, also where those are `included` in their kernels.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTransfer(AllToAll):
    """Send weights of experts from rank to rank, as copies from memory to memory, over nodes too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenExchange:
    """Dispatch of tokens to the ranks of their experts, or the combine on their way back. One time for all ranks.

    `tokens_X` tokens of each rank, each sent to `top_k` of `experts` experts chosen evenly over `ranks_X` ranks on
    `nodes_X` nodes; where the real `traffic` is known, its busiest rank counts instead.
    `mode`: `normal` sends a token once to each destination rank (once to each node, then inside it), `low_latency` once
    for each expert. `dtype` of what is dispatched. `sms_X`: multiprocessors that the kernel may use; 0: its own choice.
    """

    tokens_X: Array
    hidden: int | Array
    top_k: int | Array
    experts: int | Array
    ranks_X: Array
    nodes_X: Array
    direction: Literal["dispatch", "combine"]
    mode: Literal["normal", "low_latency"]
    dtype: str = "bfloat16"
    sms_X: Array | int = 0
    traffic: Traffic | None = None
    kernel: str = ""

    def at(self, row: int) -> "TokenExchange":
        """One exchange of several, X being one axis: still an array of one."""
        assert self.traffic is not None
        return replace(self, tokens_X=np.asarray(self.tokens_X)[row : row + 1], traffic=self.traffic.at(row))

    def empty(self) -> "TokenExchange":
        """The same exchanges with nothing to send."""
        assert self.traffic is not None
        return replace(self, tokens_X=np.zeros_like(self.tokens_X), traffic=self.traffic.nothing())


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """A collective of `ranks_X` ranks inside one node over a buffer of `bytes_X`, counted as nccl-tests count it.

    That is the whole buffer of a rank: the input of an all-reduce, a reduce-scatter and an all-to-all, the output of an
    all-gather.
    """

    kind: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
    bytes_X: Array
    ranks_X: Array
    dtype: str = "bfloat16"
    kernel: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm:
    """Dense products of [rows, inner] by [inner, columns]; `dtype` of the weights and inputs."""

    rows_X: Array
    columns_X: Array | int
    inner_X: Array | int
    dtype: str = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Attention of `batch_X` requests of `new_tokens_X` tokens each that look back on `cached_tokens_X` more.

    Causal; `heads_X` query and `kv_heads_X` key-value heads of this rank (as many: MHA, fewer: GQA), `head_dim` wide.
    Decode is one new token. The kernel alone, without the projections around it.
    """

    batch_X: Array
    new_tokens_X: Array | int
    cached_tokens_X: Array | int
    heads_X: Array | int
    kv_heads_X: Array | int
    head_dim: int
    phase: Literal["prefill", "decode"]
    kv_dtype: str = "bfloat16"
    dtype: str = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mla:
    """Multi-head latent attention of DeepSeek-V3's widths, for `batch_X` requests as in `Attention`.

    `heads_X` heads of this rank. `part`: the attention `kernel` alone, or the whole `block` with its projections, whose
    products are in `gemm_dtype`.
    """

    batch_X: Array
    new_tokens_X: Array | int
    cached_tokens_X: Array | int
    heads_X: Array | int
    phase: Literal["prefill", "decode"]
    part: Literal["kernel", "block"]
    kv_dtype: str = "bfloat16"
    gemm_dtype: str = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaProjection:
    """The absorbed products of latent attention at decode: `rows_X` tokens by `heads_X` small matrices.

    `step`: `pre` brings queries into the latent space (128 to 512 wide), `post` brings results back (512 to 128).
    """

    rows_X: Array
    heads_X: Array | int
    step: Literal["pre", "post"]
    dtype: str = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostToDevice:
    """Load `bytes_X` bytes of weights (an expert, say) from the host's memory."""

    bytes_X: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Start `kernels_X` kernels one after another, without a graph."""

    kernels_X: Array


Operation = (
    Gate
    | Route
    | Permute
    | Regroup
    | Experts
    | DenseMlp
    | Combine
    | MemoryCopy
    | AllToAll
    | CountExchange
    | WeightTransfer
    | TokenExchange
    | Collective
    | Gemm
    | Attention
    | Mla
    | MlaProjection
    | HostToDevice
    | Launch
)


def busiest_remote_bytes(bytes_XGG: Array, *, full_duplex: bool = True) -> NDArray[np.float64]:
    """What the busiest rank exchanges with the others, shape X.

    The larger of bytes sent and received if its link is `full_duplex`, else their mean. What a rank sends to
    itself does not count.
    """
    remote_XGG = np.array(bytes_XGG, dtype=np.float64)
    diagonal = np.arange(remote_XGG.shape[-1])
    remote_XGG[..., diagonal, diagonal] = 0
    sent_XG, received_XG = remote_XGG.sum(axis=-1), remote_XGG.sum(axis=-2)
    busy_XG = np.maximum(sent_XG, received_XG) if full_duplex else (sent_XG + received_XG) / 2
    return np.asarray(busy_XG.max(axis=-1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What operations take, shape X, and how sure that is.

    `low_s_X` and `high_s_X`: between them lie 90% of what was measured of operations held out of the fit; None where
    the model has no such measurements. `extrapolated_X`: the operation lies beyond what was measured.
    """

    seconds_X: NDArray[np.float64]
    low_s_X: NDArray[np.float64] | None
    high_s_X: NDArray[np.float64] | None
    extrapolated_X: NDArray[np.bool_]

    def then(self, other: "Prediction") -> "Prediction":
        """Of both, one after the other; with an interval where both have one."""
        return Prediction(
            seconds_X=self.seconds_X + other.seconds_X,
            low_s_X=_sum_of(self.low_s_X, other.low_s_X),
            high_s_X=_sum_of(self.high_s_X, other.high_s_X),
            extrapolated_X=self.extrapolated_X | other.extrapolated_X,
        )

    def read_only(self) -> "Prediction":
        """The same, whose arrays nobody can write to: for answers that are kept."""
        for array_X in (self.seconds_X, self.low_s_X, self.high_s_X, self.extrapolated_X):
            if isinstance(array_X, np.ndarray):
                array_X.setflags(write=False)
        return self

    @classmethod
    def unmeasured(cls, seconds_X: NDArray[np.float64]) -> "Prediction":
        """Of a model that stands on no measurements: no intervals, and nothing to lie beyond."""
        nowhere_X = np.zeros(np.shape(seconds_X), dtype=bool)
        return cls(seconds_X=seconds_X, low_s_X=None, high_s_X=None, extrapolated_X=nowhere_X)


def _sum_of(one_X: NDArray[np.float64] | None, other_X: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    return None if one_X is None or other_X is None else one_X + other_X


class CostModel(Protocol):
    """Anything that says what operations take."""

    @property
    def name(self) -> str:
        """Where the figures come from, in a few words for reports."""

    @property
    def included(self) -> frozenset[type]:
        """Operations that happen inside others of this model, so that nobody pays for them twice."""

    def predict(self, operation: Operation) -> Prediction:
        """Seconds for each operation of the array, shape X; `InputError` for operations that the model cannot price."""

    def seconds(self, operation: Operation) -> NDArray[np.float64]:
        """The seconds alone."""

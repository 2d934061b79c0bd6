"""Expert MLPs of one rank: grouped products over the rows of its experts, with the routing that their kernel does.

Axes: X any leading shape, N table rows, S slots of a rank. Measured facts that the physics rests on (NVIDIA
AIConfigurator's tables): time is a launch floor, a little for each slot whether it has rows or not, the weights of the
experts that have rows at memory speed, their rows in tiles at the peak, and the traffic of rows and routed tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from cost_models.boosting import Boosting
from cost_models.description import Description
from cost_models.devices import DEVICES, Device, dtype_bytes
from cost_models.kernels.base import LAUNCH_S, Columns, TableKind, Timing, hashed_folds, leave_one_out
from cost_models.kernels.expert_load import ExpertLoad, LeftOver, expected_load, load_of_rows
from cost_models.ops import Array, Experts, Operation
from cost_models.units import MS, US

Style = Literal["trtllm", "sglang", "wideep_trtllm", "wideep_context", "wideep_generation"]

# The kernel that a framework runs unless told otherwise; for two matrices instead of three TRT-LLM's is another.
_DEFAULT_SOURCE: Mapping[Style, str] = {
    "trtllm": "moe_torch_flow_cutlass",
    "sglang": "sglang_fused_moe_triton",
    "wideep_trtllm": "wideep_compute_cutlass",
    "wideep_context": "deepepmoe",
    "wideep_generation": "deepepmoe",
}
_MODE: Mapping[Style, str] = {"wideep_context": "normal", "wideep_generation": "low_latency"}
_NONGATED_SOURCE = "moe_torch_flow_nongated"
# Kernels so unlike the rest of their tables that some of their prices are their own.
_OTHER_KERNELS = ("min_latency", "flashinfer")
_OWN_STAGES = ("launch", "rows", "products")

_CONFIG = ("kernel_source", "hidden_size", "inter_size", "num_experts", "topk")
_SLICE = (*_CONFIG, "moe_tp_size", "moe_ep_size", "distribution")
_SUSPECT_TOKENS = 512  # up to here the weights read decide the time
_SUSPECT_RATIO = 1.5
_MOST_SUSPECTS = 0.25  # of a dtype's rows: where more seem wrong, it is the physics that is
# The rules of older collectors and the GPUs whose tables of that style and version they made. No table says which; its
# rows of fewest tokens tell. By `smallest` a token on 32 ranks takes as long as eight experts' weights and on 64 ranks
# as four's, by the latest rule as one's on both. Context tables have no such rows: none is known to be older.
_LEFT_OVER: Mapping[tuple[Style, str], tuple[LeftOver, tuple[str, ...]]] = {
    ("trtllm", "1.0.0"): ("largest", tuple(DEVICES)),
    ("wideep_generation", "0.5.6.post2"): ("largest", ("h100_sxm", "h200_sxm")),
    ("wideep_generation", "0.5.10"): ("smallest", ("h200_sxm", "b200_sxm")),
    ("wideep_trtllm", "1.3.0rc10"): ("smallest", ("h100_sxm", "h200_sxm", "b200_sxm", "gb200", "b300_sxm", "gb300")),
}
# Roughly; prices are fitted: seconds of the kernels (sort, two products, add) to launch, of one for each slot, and of a
# tile for each element of the inner dimension.
_LAUNCHES_S, _SLOT_S, _STEP_S = 4 * LAUNCH_S, 0.5 * US, 3e-9
_ROW_BYTES = 2  # bf16 between layers, whatever the products are in


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What there is to do, from a table or an operation; arrays broadcast to X.

    `tokens`: those that the kernel sees; `pairs`: their (token, expert) pairs, with those of other ranks.
    """

    load: ExpertLoad
    tokens: Array
    pairs: Array
    hidden: Array | int
    slots: Array | int
    matrices: Array | int
    weight_bytes: float
    dtype: str
    source: Array | str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsKernel:
    """The grouped products of one framework; `style` says what its timed rank was given."""

    style: Style
    boosting: Boosting = field(default_factory=Boosting)

    def describe_table(self, columns: Columns, *, op: str, dtype: str, device: Device) -> Description:
        """The rows of an expert table: the expected load of the rank that was timed."""
        slots_N = columns.get("num_slots", columns["num_experts"])
        load = expected_load(
            tokens_N=columns["num_tokens"],
            topk_N=columns["topk"],
            experts_N=columns["num_experts"],
            slots_N=slots_N,
            ranks_N=columns["moe_ep_size"],
            distribution_N=columns["distribution"],
            near_tokens_N=columns.get("rank0_num_tokens"),
            width_N=columns["inter_size"] / columns["moe_tp_size"],
            left_over=self._left_over(columns, device),
        )
        source_N = columns["kernel_source"].astype(str)
        # A TRT-LLM rank sees all tokens, as does SGLang's after a normal dispatch; the others only those with rows.
        all_seen = self.style in ("trtllm", "wideep_context")
        tokens_N = columns["num_tokens"].astype(np.float64) if all_seen else load.tokens
        return self._describe(
            _Work(
                load=load,
                tokens=tokens_N,
                pairs=tokens_N * columns["topk"],
                hidden=columns["hidden_size"].astype(np.float64),
                slots=slots_N / columns["moe_ep_size"],
                matrices=np.where(np.char.find(source_N, "nongated") >= 0, 2, 3),
                weight_bytes=dtype_bytes(dtype),
                dtype=dtype,
                source=source_N,
            ),
            device,
        )

    def _left_over(self, columns: Columns, device: Device) -> LeftOver:
        """The collector's rule for the pairs that rounding left over."""
        version = str(columns.get("version", np.array([""]))[0])
        rule, gpus = _LEFT_OVER.get((self.style, version), ("ranks", ()))
        return rule if device.name in gpus else "ranks"

    def serves(self, operation: Operation, *, op: str) -> bool:
        """Expert MLPs; those of SGLang's wide expert parallelism if their rows came in the mode that they are for."""
        return isinstance(operation, Experts) and self.made_for in ("", operation.mode)

    @property
    def made_for(self) -> str:
        """The mode in which its rows must have come; empty: any."""
        return _MODE.get(self.style, "")

    def describe(self, operation: Experts, device: Device) -> Description:
        """The same of operations. Their kernel is the framework's own choice unless they name one."""
        load = load_of_rows(operation.rows_XS, operation.expert_hidden)
        routed = operation.routed_tokens_X
        tokens = np.asarray(load.tokens if routed is None else routed, dtype=np.float64)
        usual = _NONGATED_SOURCE if operation.matrices == 2 and self.style == "trtllm" else _DEFAULT_SOURCE[self.style]
        return self._describe(
            _Work(
                load=load,
                tokens=tokens,
                pairs=tokens * operation.top_k if operation.top_k else load.rows,
                hidden=operation.hidden,
                slots=operation.rows_XS.shape[-1],
                matrices=operation.matrices,
                weight_bytes=operation.weight_bytes,
                dtype=operation.dtype,
                source=operation.kernel or usual,
            ),
            device,
        )

    def _describe(self, work: _Work, device: Device) -> Description:
        load, hidden, width, slots = work.load, work.hidden, work.load.width, work.slots
        bandwidth = device.memory_bandwidth
        expert_elements = work.matrices * hidden * width
        row_s = 2 * expert_elements / device.peak(dtype_bytes(work.dtype))
        weights_s = load.active * expert_elements * work.weight_bytes / bandwidth
        tiles_s = row_s * 64 * load.tiles_64
        element = dtype_bytes(work.dtype)
        stages: dict[str, dict[str, Array]] = {
            "launch": {"calls": np.full((), _LAUNCHES_S)},
            "slots": {"turns": np.asarray(slots * _SLOT_S)},
            # Steps along the inner dimension that follow one another however few the rows.
            "steps up": {"inner": np.asarray(hidden * _STEP_S)},
            "steps down": {"inner": np.asarray(width * _STEP_S)},
            "tokens": {"traffic": work.tokens * hidden * (element + 2 * _ROW_BYTES) / bandwidth},
            "rows": {"traffic": load.rows * hidden * (element + _ROW_BYTES) / bandwidth},
            "activation": {"traffic": load.rows * width * (_ROW_BYTES * (work.matrices - 1) + element) / bandwidth},
            "busiest": {"compute": row_s * 128 * np.ceil(load.busiest / 128)},
            "products": {"compute": tiles_s, "memory": weights_s},
        }
        if self.style == "sglang":  # Triton's kernel passes over the pairs of other ranks' experts too
            stages["pairs"] = {"traffic": work.pairs * (hidden + width * work.matrices) * _ROW_BYTES / bandwidth}
            stages["all pairs"] = {"compute": row_s * work.pairs}
        rows, active, tokens = (np.maximum(x, 0.5) for x in (load.rows, load.active, work.tokens))
        blocks = np.ceil(width * (work.matrices - 1) / 128)
        features = {
            "log rows per expert": np.log2(rows / active),
            "log experts": np.log2(active),
            "log tokens": np.log2(tokens),
            "tile fill": rows / np.maximum(64 * load.tiles_64, 1),
            "log weights per cache": _log(weights_s * (bandwidth / device.l2_bytes)),
            "log waves": _log(load.tiles_128 * blocks / device.sms),
            "log column blocks": _log(load.active * width / (128 * device.sms)),
            "log intensity": _log(tiles_s) - _log(weights_s),
        }
        if self.style == "sglang":
            features["log tokens per slot"] = np.log2(tokens / slots)
            features["log local share"] = np.log2(rows / np.maximum(work.pairs, 0.5))
        else:
            features["log rows per token"] = np.log2(rows / tokens)
            if work.dtype != "nvfp4":  # measured: there it does not carry over to new shapes
                features["log hidden"] = np.log2(hidden)
        if work.dtype == "fp8_block":  # nothing tunes these kernels, so that finer differences carry over to new shapes
            features["log slots"] = np.log2(slots)
            features["log width"] = np.log2(width)
        return Description(
            bound_s=np.maximum(row_s * load.rows, weights_s + load.rows * hidden * 2 * _ROW_BYTES / bandwidth),
            stages=_with_other_kernels(stages, work.source),
            features=features,
            increasing=frozenset({"log tokens", "log rows per expert"}),
            source=work.source,
        )

    def holdouts(self, columns: Columns, *, op: str) -> Mapping[str, NDArray[np.int64]]:
        """Whole model configurations; of the wide-EP tables whole expert-parallel sizes."""
        config_N, size_N = hashed_folds(columns, _CONFIG), leave_one_out(columns["moe_ep_size"])
        if self.style == "wideep_trtllm":
            return {"config": config_N, "ep_size": size_N}
        return {"ep_size": size_N} if self.style.startswith("wideep") else {"config": config_N}

    def suspects(self, columns: Columns, seconds_N: NDArray[np.float64], *, op: str) -> NDArray[np.bool_]:
        """TRT-LLM slices that ran a wrong tactic: all rows of one configuration, parallel sizes and distribution.

        The rule: the median over a slice's rows of up to 512 tokens is more than 1.5 times what the physical model
        says, its terms added up at prices that fit all rows of the dtype but those far off. There the same weights are
        read whatever the distribution, and whole slices, balanced ones too, take 1.5 to 6 times as long as their
        neighbours at every token count; block-scaled fp8, which is not tuned, has none. Kernels whose routing limits
        tokens to groups of experts are left out: their loads are not known well enough for such a verdict.
        """
        suspect_N = np.zeros(len(seconds_N), dtype=bool)
        if self.style != "trtllm":
            return suspect_N
        for dtype in np.unique(columns["moe_dtype"].astype(str)):
            rows_N = columns["moe_dtype"] == dtype
            rows = {name: values[rows_N] for name, values in columns.items()}
            # Prices are fitted, so that any device's datasheet serves here.
            description = self.describe_table(rows, op=op, dtype=str(dtype), device=DEVICES["b200_sxm"])
            ratio_N = seconds_N[rows_N] / _summed(description, seconds_N[rows_N])
            codes_N = np.stack([np.unique(rows[name], return_inverse=True)[1].ravel() for name in _SLICE], axis=1)
            slice_N = np.unique(codes_N, axis=0, return_inverse=True)[1].ravel()
            few_N = rows["num_tokens"] <= _SUSPECT_TOKENS
            order = np.argsort(slice_N[few_N], kind="stable")
            ids, starts = np.unique(slice_N[few_N][order], return_index=True)
            medians = np.zeros(slice_N.max() + 1)
            medians[ids] = [np.median(part) for part in np.split(ratio_N[few_N][order], starts[1:])]
            found_N = (medians[slice_N] > _SUSPECT_RATIO) & ~_of_other_kernel(rows["kernel_source"])
            suspect_N[rows_N] = found_N & (found_N.mean() < _MOST_SUSPECTS)
        return suspect_N

    def tokens(self, columns: Columns) -> NDArray[np.int64] | None:
        """Tokens of all ranks together."""
        return columns["num_tokens"]


def _log(values: Array) -> NDArray[np.float64]:
    return np.log2(np.maximum(values, 1e-9))


def _of_other_kernel(source: Array | str) -> NDArray[np.bool_]:
    names, which_X = np.unique(np.asarray(source), return_inverse=True)
    return np.array([any(part in name for part in _OTHER_KERNELS) for name in names.tolist()])[which_X]


def _with_other_kernels(stages: Mapping[str, Mapping[str, Array]], source: Array | str) -> dict[str, dict[str, Array]]:
    """Stages of the usual kernels under their names, some of the others' under names of their own."""
    other_X = _of_other_kernel(source)
    split: dict[str, dict[str, Array]] = {}
    for stage, terms in stages.items():
        if stage in _OWN_STAGES and other_X.any():
            split[stage + " of the other kernel"] = {term: values * other_X for term, values in terms.items()}
        if stage not in _OWN_STAGES or not other_X.all():
            alone = stage not in _OWN_STAGES or not other_X.any()
            split[stage] = {term: values if alone else values * ~other_X for term, values in terms.items()}
    return split


def _summed(description: Description, seconds_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Seconds by terms that add up, at prices ≥ 0 of least squared relative error without the rows that are far off."""
    terms = [term for stage in description.stages.values() for term in stage.values()]
    relative_NT = np.stack([np.broadcast_to(term, seconds_N.shape) for term in terms], axis=1) / seconds_N[:, None]
    relative_NT /= relative_NT.max(axis=0, initial=1e-300)  # counts and seconds on one scale; prices take it up
    near_N = np.ones(len(seconds_N), dtype=bool)
    for _ in range(4):
        orthogonal_NT, upper_TT = np.linalg.qr(relative_NT[near_N])
        share_N = relative_NT @ nnls(upper_TT, orthogonal_NT.sum(axis=0))[0]
        near_N = np.abs(np.log(np.maximum(share_N, 1e-9))) < np.log(_SUSPECT_RATIO)
    return share_N * seconds_N


_KEYS = ("moe_dtype", "num_tokens", *_SLICE)
_SMALL = Boosting(trees=60, depth=4, learning_rate=0.1)


def _table(name: str, framework: str, package_file: str, kernel: ExpertsKernel, *more_keys: str) -> TableKind:
    return TableKind(
        name=name,
        framework=framework,
        kernel=kernel,
        keys=(*_KEYS, *more_keys),
        timings={"expert_mlp": Timing(column="latency", unit_s=MS)},
        dtype_column="moe_dtype",
        package_file=package_file,
        size="num_tokens",
    )


# In order of preference where several lie as near: kernels made for one way of dispatch go first.
TABLES = (
    _table("moe_trtllm", "trtllm", "moe_perf.parquet", ExpertsKernel(style="trtllm")),
    _table(
        "moe_wideep_trtllm",
        "trtllm",
        "wideep_moe_perf.parquet",
        ExpertsKernel(style="wideep_trtllm", boosting=_SMALL),
        "num_slots",
    ),
    _table(
        "moe_wideep_context_sglang",
        "sglang",
        "wideep_context_moe_perf.parquet",
        ExpertsKernel(style="wideep_context", boosting=_SMALL),
    ),
    _table(
        "moe_wideep_generation_sglang",
        "sglang",
        "wideep_generation_moe_perf.parquet",
        ExpertsKernel(style="wideep_generation", boosting=_SMALL),
    ),
    _table("moe_sglang", "sglang", "moe_perf.parquet", ExpertsKernel(style="sglang")),
)

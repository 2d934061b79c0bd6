"""Dispatch of tokens to the ranks of their experts and the combine of their results, by the libraries that do both.

DeepEP in its normal and low-latency modes (alone, in TensorRT-LLM and in vLLM) and TensorRT-LLM's all-to-all inside an
NVLink domain. X is any shape of operations, G ranks, N nodes, L ranks of a node.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cost_models.boosting import Boosting
from cost_models.description import Description
from cost_models.devices import Device
from cost_models.kernels.base import Columns, TableKind, Timing, hashed_folds, leave_one_out, outlasts_larger
from cost_models.kernels.token_traffic import (
    Chance,
    Floats,
    balanced_chance,
    chance_in_models,
    chance_in_tests,
    even_chance,
    expected_load,
    measured_load,
    row_bytes,
    sizes_of,
)
from cost_models.ops import Array, Operation, TokenExchange
from cost_models.units import GB, MS, US

Mode = Literal["normal", "low_latency"]

# What a term costs before it is fitted: the order of what was measured on H100, so that what a table cannot tell
# (synchronising nodes, where it has one) keeps a plausible price.
_CALL_S = 20 * US
_PEER_S = 0.5 * US
_NODE_S: Mapping[Mode, float] = {"normal": 10 * US, "low_latency": 1.5 * US}
_EXPERT_S = 0.1 * US
_TURN_S = 0.2 * US
_SM_BANDWIDTH = 15 * GB
_OWN_SMS = 20  # multiprocessors that DeepEP's normal mode takes unless told (its `Buffer.num_sms`)
_TRAY_RANKS = {"gb200": 4}  # GPUs on one board, where the NVLink domain has several
_FEW_SHAPES, _MANY_ROWS = Boosting(trees=100, depth=3), Boosting(trees=150, depth=5)
_SIX_SHAPES = Boosting(trees=60, depth=3)
_FEATURES = ("log tokens", "log copies", "log row bytes", "log sms", "log ranks", "log nodes", "log experts")
# Of six shapes at most, copies, multiprocessors and experts a rank would tell the trees little but which shape it is,
# and its own deviation (runs of one combine differ by 2-11%, median) is not that of an unseen one. Ranks and nodes
# never vary there, and so only say how far beyond the table an operation lies.
_FEATURES_OF_SIX = ("log tokens", "log row bytes", "log ranks", "log nodes")
_SLOWER_THAN_BYTES = 1.25  # see `outlasts_bytes`


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a library's tables call their columns; an empty name: not recorded. `{op}` stands for the operation."""

    tokens: str
    top_k: str
    experts: str = "num_experts"
    hidden: str = "hidden_size"
    nodes: str = "node_num"
    ranks: str = ""
    sms: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeKernel:
    """A launch, synchronising, a turn for each token of a channel, then rows through multiprocessors and links at once.

    `sources`: the kernels of a table by the names that it gives them, each in its mode; the first of a mode is taken
    where an operation names none. `together`: the columns that make a shape, all of whose rows are held out at once.
    `routing`: how the tokens of the tables chose, as the chances that a rank and a node get a copy of a token, from
    hidden width, experts, top k, ranks and nodes. `waits_for`: what a call takes longer for, local experts (DeepEP
    counts rows for each), ranks that get copies, or nothing that the table's shapes can tell. `learns_from`: what the
    residual may depend on. Operations that name no traffic choose evenly.
    """

    layout: Layout
    sources: Mapping[str, Mode]
    together: tuple[str, ...]
    routing: Callable[[Array, Array, Array, Array, Array], Chance] = even_chance
    waits_for: Literal["experts", "peers", "nothing"] = "experts"
    learns_from: tuple[str, ...] = _FEATURES
    boosting: Boosting = _FEW_SHAPES

    def describe_table(self, columns: Columns, *, op: str, dtype: str, device: Device) -> Description:
        """The rows of a table, each as its kernel would be described."""
        layout = self.layout
        source_N = self._sources_of(columns, op)
        ranks_N, nodes_N = self._places_of(columns, device)
        sms_N = columns[layout.sms.format(op=op)] if layout.sms else np.zeros(len(source_N))
        chance_N = self._chance_of(columns, ranks_N, nodes_N)
        parts = []
        for source, mode in self.sources.items():
            operation = TokenExchange(
                tokens_X=columns[layout.tokens],
                hidden=columns[layout.hidden],
                top_k=columns[layout.top_k],
                experts=columns[layout.experts],
                ranks_X=ranks_N,
                nodes_X=nodes_N,
                direction="combine" if op == "combine" else "dispatch",
                mode=mode,
                dtype=dtype,
                sms_X=sms_N,
                kernel=source,
            )
            parts.append((source_N == source, self._describe(operation, device, chance_N)))
        first = parts[0][1]
        return Description(
            bound_s=np.select([rows for rows, _ in parts], [part.bound_s for _, part in parts]),
            stages={
                stage: {name: np.where(rows, term, 0.0) for name, term in terms.items()}
                for rows, part in parts
                for stage, terms in part.stages.items()
            },
            features={
                name: np.select([rows for rows, _ in parts], [part.features[name] for _, part in parts])
                for name in first.features
            },
            source=source_N,
        )

    def serves(self, operation: Operation, *, op: str) -> bool:
        """An exchange in a direction that was timed, in the mode of one of the kernels: of the one it names, if any."""
        if not isinstance(operation, TokenExchange) or operation.direction != op:
            return False
        if operation.kernel in self.sources and operation.kernel:
            return self.sources[operation.kernel] == operation.mode
        return operation.mode in self.sources.values()

    def describe(self, operation: TokenExchange, device: Device) -> Description:
        """What physics and the learner see: real traffic looks like an even exchange of so many more tokens."""
        _, top_k, experts, ranks, nodes = sizes_of(operation)
        return self._describe(operation, device, even_chance(operation.hidden, experts, top_k, ranks, nodes))

    def _describe(self, operation: TokenExchange, device: Device, chance: Chance) -> Description:
        source = operation.kernel
        if source not in self.sources:
            source = next(name for name, mode in self.sources.items() if mode == operation.mode)
        low_precision = source.endswith("LowPrecision")
        row = row_bytes(operation.hidden, "fp4" if low_precision else operation.dtype, operation.direction)
        load = expected_load(operation, row, chance)
        tokens, top_k, experts, ranks, nodes = sizes_of(operation)
        if operation.traffic is not None:
            even, load = load, measured_load(operation, row)
            tokens = tokens * load.rows / np.maximum(even.rows, 1e-300)
        if operation.mode == "normal":
            sms = np.asarray(operation.sms_X, dtype=np.float64)
            sms = np.where(sms > 0, sms, _OWN_SMS)
            channels = np.maximum(sms // 2, 1)  # one multiprocessor sends, one receives
            copies = ranks * chance.rank
        else:
            # As many as there are experts, or an equal share of the experts for each (DeepEP's `num_warp_groups`).
            sms = channels = np.ceil(experts / np.ceil(experts / device.sms))
            copies = top_k
        turns = np.ceil(tokens / channels)
        ones = np.ones(np.broadcast_shapes(*(np.shape(x) for x in (tokens, row, top_k, experts, ranks, nodes, sms))))
        up_s, out_s = load.up / device.scale_up * ones, load.out / device.scale_out * ones
        waits = {
            "experts": {"local": experts / ranks * _EXPERT_S * ones},
            "peers": {"ranks": copies * (1 - 1 / ranks) * _PEER_S * ones},
        }
        stages: dict[str, dict[str, Floats]] = {
            "call": {"launch": _CALL_S * ones},
            **{name: terms for name, terms in waits.items() if name == self.waits_for},
            "nodes": {"sync": (nodes - 1) * _NODE_S[operation.mode] * ones},
            "turns": {"tokens": turns * _TURN_S * ones, "rows": turns * copies * _TURN_S * ones},
            "move": {
                "turns": turns * row / _SM_BANDWIDTH * ones,
                "sms": load.rows / channels / _SM_BANDWIDTH * ones,
                "up": up_s,
                "out": out_s,
                "host": _CALL_S * ones,
                "pairs": tokens * top_k * row / device.memory_bandwidth * ones,
            },
        }
        features = (np.maximum(tokens, 1), copies, row, sms, ranks, nodes, experts / ranks)
        return Description(
            bound_s=np.maximum(up_s, out_s),
            stages={f"{source} {stage}".strip(): terms for stage, terms in stages.items()},
            features={
                name: np.log2(values) * ones
                for name, values in zip(_FEATURES, features, strict=True)
                if name in self.learns_from
            },
            source=source,
        )

    def holdouts(self, columns: Columns, *, op: str) -> Mapping[str, NDArray[np.int64]]:
        """Whole shapes; numbers of nodes too, where there are several."""
        folds = {"shape": hashed_folds(columns, self.together)}
        nodes = self.layout.nodes
        if nodes and len(np.unique(columns[nodes])) > 1:
            folds["nodes"] = leave_one_out(columns[nodes])
        return folds

    def suspects(self, columns: Columns, seconds_N: NDArray[np.float64], *, op: str) -> NDArray[np.bool_]:
        """Rows that took over twice as long as more tokens did, or than half as many nodes and bytes explain."""
        layout = self.layout
        same = [columns[name] for name in (layout.hidden, layout.top_k, layout.experts, layout.ranks) if name]
        same.append(columns[layout.sms.format(op=op)] if layout.sms else np.zeros(len(seconds_N)))
        same.append(self._sources_of(columns, op))
        ranks_N, nodes_N = self._places_of(columns)
        copies_N = (nodes_N - 1) * self._chance_of(columns, ranks_N, nodes_N).node
        tokens_N = columns[layout.tokens]
        return outlasts_larger(tokens_N, seconds_N, [*same, nodes_N]) | outlasts_bytes(
            nodes_N, seconds_N, copies_N, [*same, tokens_N]
        )

    def tokens(self, columns: Columns) -> NDArray[np.int64] | None:
        """Tokens of a rank."""
        return columns[self.layout.tokens]

    def _places_of(self, columns: Columns, device: Device | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
        """Ranks and nodes of every row; eight ranks a node where neither the table nor the device says otherwise."""
        layout, size = self.layout, len(columns[self.layout.tokens])
        nodes_N = columns[layout.nodes] if layout.nodes else np.ones(size, dtype=np.int64)
        tray = 8 if device is None else _TRAY_RANKS.get(device.name, 8)
        return columns[layout.ranks] if layout.ranks else nodes_N * tray, nodes_N

    def _chance_of(self, columns: Columns, ranks_N: NDArray[Any], nodes_N: NDArray[Any]) -> Chance:
        layout = self.layout
        return self.routing(columns[layout.hidden], columns[layout.experts], columns[layout.top_k], ranks_N, nodes_N)

    def _sources_of(self, columns: Columns, op: str) -> NDArray[np.str_]:
        if not self.layout.source:
            return np.full(len(columns[self.layout.tokens]), next(iter(self.sources)))
        source_N = columns[self.layout.source].astype(str)
        low_N = np.char.endswith(columns["op_name"].astype(str), "low_precision")
        return np.where(low_N, np.char.add(source_N, "LowPrecision"), source_N)


def outlasts_bytes(
    nodes_N: NDArray[Any], seconds_N: Floats, copies_N: Floats, others: Sequence[NDArray[Any]]
) -> NDArray[np.bool_]:
    """The rows that took over 1.25 times longer than on half the nodes than the `copies_N` to other nodes grew by.

    So DeepEP's normal mode on 8 nodes of H100s: up to 3.6 times slower than on 4, for 1.3 times the bytes.

    >>> outlasts_bytes(np.array([2, 4, 8]), np.array([10.0, 30.0, 80.0]), np.array([1.0, 2.7, 4.6]), []).tolist()
    [False, False, True]
    """
    keys = list(zip(nodes_N.tolist(), *(values.tolist() for values in others), strict=True))
    row_of = {key: row for row, key in enumerate(keys)}
    suspect_N = np.zeros(len(seconds_N), dtype=bool)
    for row, (nodes, *rest) in enumerate(keys):
        half = row_of.get((nodes // 2, *rest))
        if nodes >= 4 and half is not None:  # one node sends nothing to others
            growth = max(copies_N[row] / copies_N[half], 1.0)
            suspect_N[row] = seconds_N[row] / seconds_N[half] > _SLOWER_THAN_BYTES * growth
    return suspect_N


_DEEPEP = Layout(tokens="num_token", top_k="num_topk", sms="{op}_sms")
_DEEPEP_LL = Layout(tokens="num_token", top_k="num_topk")
_MOE_A2A = Layout(tokens="num_tokens", top_k="topk", ranks="ep_size", sms="sms", source="comm_backend")
_TRTLLM = Layout(tokens="num_tokens", top_k="topk", nodes="", ranks="moe_ep_size", source="kernel_source")
_SHAPE = ("hidden_size", "num_topk", "num_experts", "node_num")


def _deepep(where: str, mode: Mode) -> TableKind:
    """DeepEP's own tests dispatch FP8, and so their dtype; results come back in BF16."""
    short = "normal" if mode == "normal" else "ll"
    column = "{op}_transmit_us" if mode == "normal" else "{op}_avg_t_us"
    layout = _DEEPEP if mode == "normal" else _DEEPEP_LL
    boosting = _MANY_ROWS if mode == "normal" or where == "multinode" else _FEW_SHAPES
    routing = chance_in_tests if mode == "normal" and where == "multinode" else even_chance
    together = _SHAPE if where == "1node" else ("node_num", "num_token")
    return TableKind(
        name=f"deepep_{short}_{where}",
        framework="sglang",
        kernel=ExchangeKernel(layout=layout, sources={"": mode}, together=together, routing=routing, boosting=boosting),
        keys=("node_num", "hidden_size", "num_token", "num_topk", "num_experts")
        + (("dispatch_sms", "combine_sms") if mode == "normal" else ()),
        timings={
            op: Timing(
                column=column.format(op=op),
                unit_s=US,
                after=f"{op}_notify_us" if mode == "normal" else None,
            )
            for op in ("dispatch", "combine")
        },
        dtype="fp8",
        package_file=f"wideep_deepep_{short}_perf.parquet",
        size="num_token",
    )


def _moe_a2a(framework: str, sources: Mapping[str, Mode], dtype_column: str | None) -> TableKind:
    """DeepEP inside a serving engine, of six shapes at most, with 32 or 48 experts a rank (64 or 96 of four ranks).

    A price for each would be fitted to how those few shapes happen to differ: the median held-out error, on average
    over all parts of these tables, is 5.6% with it and all features, 5.4% with it and 4.8% with neither.
    """
    return TableKind(
        name=f"moe_a2a_{framework}",
        framework=framework,
        kernel=ExchangeKernel(
            layout=_MOE_A2A,
            routing=chance_in_models,
            waits_for="nothing",
            learns_from=_FEATURES_OF_SIX,
            sources=sources,
            together=("hidden_size", "topk", "num_experts", "ep_size", "node_num"),
            boosting=_SIX_SHAPES,
        ),
        keys=("comm_backend", "phase", "comm_dtype", "ep_size", "hidden_size", "topk", "num_experts", "num_tokens"),
        timings={op: Timing(column="latency", unit_s=US, where={"phase": (op,)}) for op in ("dispatch", "combine")},
        dtype_column=dtype_column,
        package_file="moe_a2a_perf.parquet",
        size="num_tokens",
    )


TABLES = (
    _deepep("1node", "normal"),
    _deepep("1node", "low_latency"),
    _deepep("multinode", "normal"),
    _deepep("multinode", "low_latency"),
    _moe_a2a("trtllm", {"trtllm_deepep_ht": "normal", "trtllm_deepep_ll": "low_latency"}, "comm_dtype"),
    _moe_a2a(
        "vllm",
        {
            "deepep_ht": "normal",
            "deepep_ll": "low_latency",
            "deepep_v2_context": "normal",
            "deepep_v2_generation": "normal",
        },
        None,
    ),
    TableKind(
        name="trtllm_alltoall_ep2_64",
        framework="trtllm",
        kernel=ExchangeKernel(
            layout=_TRTLLM,
            routing=balanced_chance,
            waits_for="peers",
            sources={"NVLinkTwoSided": "normal", "NVLinkOneSided": "normal", "NVLinkTwoSidedLowPrecision": "normal"},
            together=("hidden_size", "topk", "num_experts", "moe_ep_size"),
        ),
        keys=("op_name", "kernel_source", "moe_dtype", "num_tokens", "moe_ep_size"),
        timings={
            op: Timing(column="latency", unit_s=MS, where={"op_name": names})
            for op, names in (
                ("dispatch", ("alltoall_dispatch",)),
                ("combine", ("alltoall_combine", "alltoall_combine_low_precision")),
                ("all_to_all", ("alltoall_prepare",)),
            )
        },
        dtype_column="moe_dtype",
        package_file="trtllm_alltoall_perf.parquet",
        size="num_tokens",
    ),
)

"""Loads of experts and the physics of their kernels, on numbers that a person can check."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cost_models.description import Description
from cost_models.devices import DEVICES
from cost_models.kernels.base import Columns
from cost_models.kernels.expert_load import (
    ExpertLoad,
    LeftOver,
    _correct,
    _fill_smallest,
    _spread,
    expected_load,
    load_of_rows,
)
from cost_models.kernels.experts import TABLES, ExpertsKernel, Style
from cost_models.ops import Experts
from cost_models.physics import Physics

H100 = DEVICES["h100_sxm"]
DATA = Path(__file__).parents[3] / "cost_models" / "data"
GATED = "moe_torch_flow_cutlass"


def _drawn(
    tokens: int,
    topk: int,
    experts: int,
    ranks: int,
    distribution: str,
    slots: int = 0,
    left_over: LeftOver = "ranks",
) -> ExpertLoad:
    return expected_load(
        tokens_N=np.array([tokens]),
        topk_N=np.array([topk]),
        experts_N=np.array([experts]),
        slots_N=np.array([slots or experts]),
        ranks_N=np.array([ranks]),
        distribution_N=np.array([distribution]),
        width_N=np.array([1.0]),
        left_over=left_over,
    )


def _table(source: Any = GATED, **columns: Any) -> dict[str, NDArray[Any]]:
    row = {
        "kernel_source": source,
        "moe_dtype": "bfloat16",
        "num_tokens": 64,
        "hidden_size": 1024,
        "inter_size": 512,
        "topk": 8,
        "num_experts": 32,
        "moe_tp_size": 1,
        "moe_ep_size": 4,
        "distribution": "balanced",
    } | columns
    size = max(np.size(value) for value in row.values())
    return {name: np.broadcast_to(np.asarray(value), size) for name, value in row.items()}


def _experts(rows_XS: object, **changes: Any) -> Experts:
    settings = {"hidden": 1024, "expert_hidden": 512, "matrices": 3, "weight_bytes": 2.0, "row_bytes": 2048} | changes
    return Experts(rows_XS=np.asarray(rows_XS), **settings)


def _same(ours: Description, theirs: Description) -> None:
    def check(some: Mapping[str, Any], others: Mapping[str, Any]) -> None:
        assert some.keys() == others.keys()
        for name, values in some.items():
            mine, yours = np.broadcast_arrays(np.ravel(values), np.ravel(others[name]))
            np.testing.assert_allclose(mine, yours, err_msg=name)

    check(ours.features, theirs.features)
    assert ours.stages.keys() == theirs.stages.keys()
    for stage, terms in ours.stages.items():
        check(terms, theirs.stages[stage])
    np.testing.assert_allclose(np.ravel(ours.bound_s), np.ravel(theirs.bound_s))
    assert np.unique(ours.source) == np.unique(theirs.source)


def test_rows_are_counted_in_tiles() -> None:
    load = load_of_rows(np.array([0, 1, 64, 65, 130]), 512)
    assert [float(x) for x in (load.rows, load.active, load.busiest, load.width)] == [260, 4, 130, 512]
    assert load.tiles_64 == 1 + 1 + 2 + 3
    assert load.tiles_128 == 1 + 1 + 1 + 2


def test_widths_weigh_what_is_read_and_multiplied() -> None:
    load = load_of_rows(np.array([[10, 30, 0], [0, 0, 0]]), np.array([100, 200, 600]))
    assert np.asarray(load.width).tolist() == [(10 * 100 + 30 * 200) / 40, 300]
    assert (load.active * load.width).tolist() == [100 + 200, 0]  # columns of weights read
    assert (load.rows * load.width).tolist() == [10 * 100 + 30 * 200, 0]


def test_one_width_a_slot_is_the_same_as_one_for_all() -> None:
    rows_XS = np.array([[3, 0, 70], [1, 1, 1]])
    kernel = ExpertsKernel(style="trtllm")
    _same(
        kernel.describe(_experts(rows_XS), H100),
        kernel.describe(_experts(rows_XS, expert_hidden=np.full(3, 512)), H100),
    )


def test_balanced_tokens_take_every_stride_th_expert() -> None:
    assert _drawn(1, 8, 128, 1, "balanced").active == 8
    assert _drawn(1, 8, 128, 16, "balanced").active == 1  # experts 0, 16, 32, …: one of the first eight
    full = _drawn(64, 8, 32, 4, "balanced")
    assert [x.item() for x in (full.rows, full.active, full.busiest)] == [128, 8, 16]  # 64 × 8 / 32 = 16 rows an expert
    assert full.tokens == 64  # each token has two of its eight experts here


def test_a_lone_token_of_a_power_law_has_distinct_experts() -> None:
    assert _drawn(1, 8, 256, 1, "power_law_1.2").active == 8
    assert _drawn(1, 8, 256, 64, "power_law_1.2").rows == 1  # one a rank in turn


@pytest.mark.parametrize("tokens", [3, 40, 1000])
@pytest.mark.parametrize("distribution", ["balanced", "power_law_1.01", "power_law_1.2_eplb"])
def test_one_rank_has_all_pairs_and_at_most_one_a_token(tokens: int, distribution: str) -> None:
    load = _drawn(tokens, 4, 32, 1, distribution)
    assert load.rows == tokens * 4
    assert load.tokens == tokens
    assert load.busiest <= tokens


def test_first_tables_gave_what_was_left_over_to_the_largest() -> None:
    """Two tokens of eight: 16 pairs; the few experts that round to one row get a second before others get a first."""
    first, later = (_drawn(2, 8, 128, 1, "power_law_1.2", left_over=rule) for rule in ("largest", "ranks"))
    assert first.rows == later.rows == 16
    assert first.active < later.active


@pytest.mark.parametrize(
    ("tokens", "ranks", "active"),
    [(1, 8, 8), (1, 32, 8), (1, 64, 4), (1, 128, 2), (2, 16, 16), (2, 32, 8), (8, 256, 1)],
)
def test_the_next_tables_gave_it_to_the_last_rank(tokens: int, ranks: int, active: int) -> None:
    """No expert of 256 rounds to a row of 8 or 16 pairs: all go to the last ones, on the last rank if it has them."""
    load = _drawn(tokens, 8, 256, ranks, "power_law_0.6", left_over="smallest")
    assert load.active == active
    planned = _drawn(tokens, 8, 256, ranks, "power_law_0.6_eplb", left_over="smallest")
    assert planned.active == -(-tokens * 8 // ranks)  # placement spreads them over the ranks


def test_what_is_beyond_the_cap_fills_the_smallest() -> None:
    counts_E = np.array([9, 2, 0, 1])
    _fill_smallest(counts_E, 4)  # 5 are beyond: 4 to the third, 1 to the fourth
    assert counts_E.tolist() == [4, 2, 4, 2]


def test_correcting_by_hand() -> None:
    def corrected(short: int, largest_first: bool) -> list[int]:
        counts_E = np.array([3, 0, 1, 0])
        _correct(counts_E, short, largest_first, 3)
        return counts_E.tolist()

    assert corrected(2, True) == [3, 1, 2, 0]  # the first is full; of equal ones the first
    assert corrected(2, False) == [3, 1, 1, 1]  # of equal ones the last, then the one before
    assert corrected(6, False) == [3, 2, 3, 2]  # round and round: 1 + 1 + 1, 1 + 1 + 1
    assert corrected(-2, False) == [1, 0, 1, 0]  # in place of those that have none the largest gives


@given(st.lists(st.integers(0, 9), min_size=6, max_size=6), st.integers(-60, 60), st.booleans())
def test_correcting_keeps_the_sum_and_the_bounds(counts: list[int], short: int, largest_first: bool) -> None:
    short = max(short, -sum(counts))
    counts_E = np.array(counts)
    _correct(counts_E, short, largest_first, 9)
    assert counts_E.sum() == min(sum(counts) + short, 6 * 9)
    assert 0 <= counts_E.min() <= counts_E.max() <= 9


@given(st.lists(st.integers(0, 30), min_size=6, max_size=6), st.integers(5, 30))
def test_filling_keeps_the_sum_and_the_cap(counts: list[int], bound: int) -> None:
    counts_E = np.array(counts)
    _fill_smallest(counts_E, bound)
    assert counts_E.sum() == min(sum(counts), 6 * bound)
    assert counts_E.max() <= bound


@pytest.mark.parametrize(
    ("style", "gpu", "version", "active"),
    [
        ("wideep_trtllm", "h100_sxm", "1.3.0rc10", 8),
        ("wideep_generation", "h200_sxm", "0.5.10", 8),
        ("wideep_generation", "h100_sxm", "0.5.10", 1),
        ("trtllm", "h200_sxm", "1.3.0rc20", 1),
        ("sglang", "h100_sxm", "0.5.14", 1),
    ],
)
def test_a_lone_token_lies_where_its_table_drew_it(style: Style, gpu: str, version: str, active: float) -> None:
    """One token of eight experts on eight ranks of 32: on one rank, or one on each."""
    row = _table(num_tokens=1, num_experts=256, moe_ep_size=8, distribution="power_law_0.6", version=version)
    description = ExpertsKernel(style=style).describe_table(row, op="expert_mlp", dtype="bfloat16", device=DEVICES[gpu])
    assert 2 ** np.ravel(description.features["log experts"]) == pytest.approx(active)


def test_planned_placement_unloads_the_busiest_rank() -> None:
    plain, planned = (_drawn(4096, 8, 256, 16, f"power_law_1.2{end}") for end in ("", "_eplb"))
    replicas = _drawn(4096, 8, 256, 16, "power_law_1.2_eplb", slots=288)
    even = 4096 * 8 / 16
    assert even <= replicas.rows <= planned.rows < plain.rows
    assert replicas.busiest < planned.busiest


@given(st.lists(st.integers(0, 9), min_size=6, max_size=6), st.integers(-60, 60))
def test_spreading_keeps_the_sum_and_the_bounds(counts: list[int], short: int) -> None:
    counts_RS = np.array(counts).reshape(2, 3)
    _spread(counts_RS, short, 9)
    assert counts_RS.sum() == min(max(sum(counts) + short, 0), 6 * 9)
    assert counts_RS.min() >= 0
    assert counts_RS.max() <= 9


def test_terms_by_hand() -> None:
    stages = ExpertsKernel(style="trtllm").describe(_experts([[16] * 8], routed_tokens_X=64), H100).stages
    elements = 3 * 1024 * 512
    assert stages["products"]["memory"] == pytest.approx(8 * elements * 2 / 3.35e12)
    assert stages["products"]["compute"] == pytest.approx(2 * 8 * 64 * elements / 989e12)  # a tile of 64 each
    assert stages["busiest"]["compute"] == pytest.approx(2 * 128 * elements / 989e12)
    assert stages["tokens"]["traffic"] == pytest.approx(64 * 1024 * (2 + 2 + 2) / 3.35e12)
    assert stages["rows"]["traffic"] == pytest.approx(128 * 1024 * (2 + 2) / 3.35e12)
    assert stages["activation"]["traffic"] == pytest.approx(128 * 512 * (4 + 2) / 3.35e12)  # two in, one out
    assert stages["slots"]["turns"] == pytest.approx(8 * 0.5e-6)


@pytest.mark.parametrize("style", ["trtllm", "wideep_trtllm", "wideep_context", "wideep_generation"])
def test_an_operation_looks_like_its_table_row(style: Style) -> None:
    kernel = ExpertsKernel(style=style)
    source = kernel.describe(_experts([1]), H100).source
    row = kernel.describe_table(_table(str(source)), op="expert_mlp", dtype="bfloat16", device=H100)
    _same(row, kernel.describe(_experts([[16] * 8], routed_tokens_X=64), H100))


def test_a_triton_operation_looks_like_its_table_row_where_top_k_is_known() -> None:
    kernel = ExpertsKernel(style="sglang")
    row = kernel.describe_table(_table("sglang_fused_moe_triton"), op="expert_mlp", dtype="bfloat16", device=H100)
    operation = Experts(
        rows_XS=np.full((1, 8), 16),
        hidden=1024,
        expert_hidden=512,
        matrices=3,
        weight_bytes=2.0,
        row_bytes=2048,
        routed_tokens_X=64,
        top_k=8,
    )
    _same(row, kernel.describe(operation, H100))


@pytest.mark.parametrize("source", ["moe_torch_flow_min_latency", "moe_torch_flow_nongated"])
def test_the_named_kernel_looks_like_its_table_row(source: str) -> None:
    kernel = ExpertsKernel(style="trtllm")
    row = kernel.describe_table(_table(source), op="expert_mlp", dtype="bfloat16", device=H100)
    matrices = 2 if source.endswith("nongated") else 3
    _same(row, kernel.describe(_experts([[16] * 8], routed_tokens_X=64, kernel=source, matrices=matrices), H100))


def test_two_matrices_run_the_nongated_kernel() -> None:
    kernel = ExpertsKernel(style="trtllm")
    assert kernel.describe(_experts([1], matrices=2), H100).source == "moe_torch_flow_nongated"
    assert kernel.describe(_experts([1]), H100).source == GATED


def test_rows_of_other_kernels_have_prices_of_their_own() -> None:
    both = _table(np.array([GATED, "moe_torch_flow_min_latency"]))
    stages = ExpertsKernel(style="trtllm").describe_table(both, op="expert_mlp", dtype="nvfp4", device=H100).stages
    assert np.asarray(stages["launch"]["calls"]).tolist() == pytest.approx([20e-6, 0])
    assert np.asarray(stages["launch of the other kernel"]["calls"]).tolist() == pytest.approx([0, 20e-6])


def _bound_prices(description: Description) -> Physics:
    return Physics(
        prices={stage: dict.fromkeys(terms, 1.0) for stage, terms in description.stages.items()},
        overlap=dict.fromkeys(description.stages, 4.0),
    )


@given(st.lists(st.integers(0, 300), min_size=4, max_size=4), st.integers(0, 3), st.integers(1, 200))
def test_physics_never_falls_with_more_rows(rows: list[int], slot: int, more: int) -> None:
    kernel = ExpertsKernel(style="sglang")
    rows_XS = np.array([rows, rows])
    rows_XS[1, slot] += more
    description = kernel.describe(_experts(rows_XS), H100)
    before, after = _bound_prices(description).seconds(description).tolist()
    assert after >= before


def test_any_leading_shape() -> None:
    kernel = ExpertsKernel(style="trtllm")
    rows_XS = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    description = kernel.describe(_experts(rows_XS, expert_hidden=np.array([64, 128, 256, 512])), H100)
    assert _bound_prices(description).seconds(description).shape == (2, 3)
    alone = kernel.describe(_experts(rows_XS[1, 2], expert_hidden=np.array([64, 128, 256, 512])), H100)
    for name, values in alone.features.items():
        assert np.broadcast_to(description.features[name], (2, 3))[1, 2] == pytest.approx(float(values))


def test_no_rows_at_all_is_finite() -> None:
    for table in TABLES:
        description = table.kernel.describe(_experts(np.zeros((2, 4), dtype=int)), H100)
        assert all(np.isfinite(values).all() for values in description.features.values())


def _timed(kernel: ExpertsKernel, table: Columns) -> NDArray[np.float64]:
    description = kernel.describe_table(table, op="expert_mlp", dtype="bfloat16", device=H100)
    return 2e-5 + _bound_prices(description).seconds(
        Description(bound_s=description.bound_s, stages={"products": description.stages["products"]}, features={})
    )


def test_only_the_slice_that_is_slow_throughout_is_suspect() -> None:
    kernel = ExpertsKernel(style="trtllm")
    tokens, sizes = np.meshgrid(2 ** np.arange(13), [1, 2, 4, 8, 16])
    table = _table(num_tokens=tokens.ravel(), moe_ep_size=sizes.ravel(), hidden_size=4096, inter_size=2048)
    seconds_N = _timed(kernel, table)
    slow_N = table["moe_ep_size"] == 4
    lone_N = (table["moe_ep_size"] == 1) & (table["num_tokens"] == 16)  # one slow row makes no slow slice
    measured_N = seconds_N * np.where(slow_N, 4.0, np.where(lone_N, 3.0, 1.0))
    np.testing.assert_array_equal(kernel.suspects(table, measured_N, op="expert_mlp"), slow_N)
    # Where half of the slices seem slow, it is the physics that does not fit.
    many_N = table["moe_ep_size"] <= 2
    half_N = seconds_N * np.where(many_N, 4.0, 1.0)
    assert not kernel.suspects(table, half_N, op="expert_mlp").any()


def test_holdouts_are_whole_configurations_and_whole_sizes() -> None:
    table = _table(moe_ep_size=np.array([2, 8, 2]), hidden_size=np.array([1024, 1024, 2048]))
    names: Mapping[Style, list[str]] = {
        "trtllm": ["config"],
        "sglang": ["config"],
        "wideep_trtllm": ["config", "ep_size"],
        "wideep_context": ["ep_size"],
        "wideep_generation": ["ep_size"],
    }
    for style, expected in names.items():
        held_out = ExpertsKernel(style=style).holdouts(table, op="expert_mlp")
        assert list(held_out) == expected
        if "ep_size" in held_out:
            assert held_out["ep_size"].tolist() == [0, 1, 0]
        if "config" in held_out:
            assert held_out["config"][0] == held_out["config"][1]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_measured_tables_can_be_described(table: Any) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(DATA / f"h100_sxm_{table.name}.parquet").slice(0, 200)
    columns = {name: rows[name].to_numpy() for name in rows.column_names}
    assert set(table.keys) <= set(columns)
    dtype = str(columns["moe_dtype"][0])
    described = table.kernel.describe_table(columns, op="expert_mlp", dtype=dtype, device=H100)
    for values in described.features.values():
        assert np.isfinite(np.broadcast_to(values, 200)).all()

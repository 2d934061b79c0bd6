from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cost_models.devices import DEVICES
from cost_models.kernels.mla import TABLES, MlaKernel
from cost_models.kernels.mla_projections import MlaProjectionKernel
from cost_models.ops import Mla, MlaProjection

TOY = replace(DEVICES["h100_sxm"], peak_flops={2: 1e14, 1: 2e14}, memory_bandwidth=1e12, sms=100, l2_bytes=1e6)
MLA_TABLES = [(kind, kind.kernel) for kind in TABLES if isinstance(kind.kernel, MlaKernel)]
KERNELS = {(kernel.phase, kernel.part): kernel for _, kernel in MLA_TABLES if not kernel.without_down}
WIDE_EP = {kernel.phase: kernel for _, kernel in MLA_TABLES if kernel.without_down}
PROJECTION = MlaProjectionKernel()


def mla(**changes: Any) -> Mla:
    given: dict[str, Any] = {
        "batch_X": np.array(2),
        "new_tokens_X": 1,
        "cached_tokens_X": 99,
        "heads_X": 16,
        "phase": "decode",
        "part": "kernel",
    }
    return Mla(**given | changes)


def describe(**changes: Any) -> Any:
    operation = mla(**changes)
    return KERNELS[operation.phase, operation.part].describe(operation, TOY)


def test_decode_reads_one_latent_key_for_all_heads() -> None:
    # cache: 2 requests, 100 tokens, 512 + 64 elements of 2 bytes: 230,400 bytes;
    # queries of 512 + 64 and results of 512, 2 requests, 16 heads, 2 bytes: 69,632 bytes
    assert float(describe().stages["attention"]["memory"]) == pytest.approx(300_032e-12)
    assert float(describe(kv_dtype="fp8").stages["attention"]["memory"]) == pytest.approx(184_832e-12)


def test_decode_multiplies_absorbed_widths_for_whole_groups_of_heads() -> None:
    # 2 * (512 + 64 + 512) FLOPs for each of 2 * 100 keys; 16 heads fill a tile of 64
    assert float(describe().stages["attention"]["compute"]) == pytest.approx(2 * 1088 * 200 * 64 / 1e14)
    assert float(describe(heads_X=64).stages["attention"]["compute"]) == pytest.approx(2 * 1088 * 200 * 64 / 1e14)
    assert float(describe(heads_X=128).stages["attention"]["compute"]) == pytest.approx(2 * 1088 * 200 * 128 / 1e14)


def test_prefill_multiplies_the_widths_of_each_head_in_whole_tiles() -> None:
    # 200 tokens: 3 of 4 tile pairs of 128; 2 * (128 + 64 + 128) FLOPs a pair, 2 requests of 16 heads
    given = describe(phase="prefill", new_tokens_X=200, cached_tokens_X=0)
    assert float(given.stages["attention"]["compute"]) == pytest.approx(3 * 128**2 * 640 * 32 / 1e14)


def test_an_8_bit_cache_has_prices_of_its_own() -> None:
    wide, narrow = describe().stages["attention"], describe(kv_dtype="fp8").stages["attention"]
    assert float(wide["8-bit compute"]) == 0
    assert float(narrow["compute"]) == 0
    assert float(narrow["8-bit compute"]) == float(wide["compute"])


def test_a_block_at_decode_reads_its_weights() -> None:
    # down 7168 * (1536 + 512 + 64), up 1536 * 16 * 192, absorbed 2 * 16 * 128 * 512, out 16 * 128 * 7168
    weights = 7168 * 2112 + 1536 * 3072 + 2 * 16 * 128 * 512 + 2048 * 7168
    block, kernel = describe(part="block"), describe()
    assert float(block.bound_s) > float(kernel.bound_s) + 2 * weights / 1e12
    assert float(block.bound_s) < float(kernel.bound_s) + 2.02 * weights / 1e12


def test_wide_ep_tables_are_of_sglang_and_tell_the_block_after_its_latents() -> None:
    wide = {kind.name: kind.framework for kind, kernel in MLA_TABLES if kernel.without_down}
    assert wide == {"mla_wideep_context_sglang": "sglang", "mla_wideep_generation_sglang": "sglang"}


def test_a_wide_ep_block_reads_all_weights_but_those_of_the_latents() -> None:
    operation = mla(part="block")
    whole, wide = (kernel.describe(operation, TOY) for kernel in (KERNELS["decode", "block"], WIDE_EP["decode"]))
    # 7168 x 2112 weights, and 2 tokens' inputs and results, of 2 bytes each
    assert float(whole.bound_s - wide.bound_s) == pytest.approx(2 * (7168 * 2112 + 2 * (7168 + 2112)) / 1e12)
    # What the kernel inside does is the same.
    assert wide.stages["attention"] == whole.stages["attention"]


def test_a_wide_ep_block_at_prefill_multiplies_all_but_the_latents() -> None:
    operation = mla(part="block", phase="prefill", batch_X=np.array(1), new_tokens_X=1024, cached_tokens_X=0)
    whole, wide = (kernel.describe(operation, TOY) for kernel in (KERNELS["prefill", "block"], WIDE_EP["prefill"]))
    # 1,024 tokens by 7168 x 2112 at 2 FLOPs and 1e14 FLOP/s: 310 us
    assert float(whole.bound_s - wide.bound_s) == pytest.approx(2 * 1024 * 7168 * 2112 / 1e14)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_what_wide_ep_tables_call_an_8_bit_cache_is_bfloat16(phase: Any) -> None:
    columns = {
        "kernel_source": np.array(["default"], dtype=object),
        "batch_size": np.array([32]),
        "isl": np.array([100]),
        "step": np.array([0]),
        "num_heads": np.array([16]),
        "kv_cache_dtype": np.array(["fp8"], dtype=object),
    }
    row = WIDE_EP[phase].describe_table(columns, op="mla", dtype="fp8_block", device=TOY)
    assert row.features["log element"].tolist() == [1.0]  # 2 bytes
    assert row.stages["attention"]["8-bit compute"].tolist() == [0.0]
    # TensorRT-LLM's tables mean what they say.
    other = KERNELS[phase, "block"].describe_table(columns, op="mla", dtype="fp8_block", device=TOY)
    assert other.features["log element"].tolist() == [0.0]
    assert other.stages["attention"]["compute"].tolist() == [0.0]
    # An operation with an 8-bit cache is still one: it lies beyond what was measured.
    operation = mla(part="block", phase=phase, kv_dtype="fp8", gemm_dtype="fp8_block")
    assert float(WIDE_EP[phase].describe(operation, TOY).features["log element"]) == 0.0


def test_prefill_brings_up_what_is_cached_too() -> None:
    fresh = describe(phase="prefill", part="block", new_tokens_X=1000, cached_tokens_X=0)
    after = describe(phase="prefill", part="block", new_tokens_X=1000, cached_tokens_X=1000)
    # 2 requests of 1,000 tokens more by 512 * 16 * (128 + 128), at 2 FLOPs and 1e14 FLOP/s: 83.9 us at the least
    assert float(after.stages["products"]["slowest"] - fresh.stages["products"]["slowest"]) > 83.8e-6


@pytest.mark.parametrize("part", ["kernel", "block"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_more_work_has_no_smaller_bound(phase: str, part: str) -> None:
    sizes = np.array([1, 2, 8, 64, 128])
    for name in ("batch_X", "heads_X", "cached_tokens_X"):
        assert (np.diff(describe(phase=phase, part=part, **{name: sizes}).bound_s) > 0).all()


@pytest.mark.parametrize("kernel", [kernel for _, kernel in MLA_TABLES], ids=[kind.name for kind, _ in MLA_TABLES])
def test_a_row_of_a_table_and_the_operation_are_described_alike(kernel: MlaKernel) -> None:
    prefill = kernel.phase == "prefill"
    columns = {
        "kernel_source": np.array(["default", "default"], dtype=object),
        "batch_size": np.array([1, 32]),
        "isl": np.array([16, 3000]) if prefill else np.array([1, 1]),
        "step": np.array([0, 100]),
        "num_heads": np.array([4, 128]),
        "kv_cache_dtype": np.array(["bfloat16", "fp8"], dtype=object),
    }
    table = kernel.describe_table(columns, op="mla", dtype="fp8_block", device=TOY)
    for row in range(2):
        one = kernel.describe(
            mla(
                phase=kernel.phase,
                part=kernel.part,
                batch_X=np.full((3, 1), columns["batch_size"][row]),
                new_tokens_X=int(columns["isl"][row]),
                cached_tokens_X=int(columns["step"][row] + (0 if prefill else columns["isl"][row])),
                heads_X=int(columns["num_heads"][row]),
                kv_dtype=kernel.cache or str(columns["kv_cache_dtype"][row]),
                gemm_dtype="fp8_block",
            ),
            TOY,
        )
        assert one.bound_s.shape == (3, 1)
        for name, values in one.features.items():
            assert values == pytest.approx(table.features[name][row]), name
        for stage, terms in one.stages.items():
            for name, values in terms.items():
                assert values == pytest.approx(table.stages[stage][name][row]), name


def test_a_pair_of_batch_and_length_is_held_out_whole() -> None:
    heads, batch, isl = (x.ravel() for x in np.meshgrid([1, 16, 128], [1, 2, 4], [64, 128], indexing="ij"))
    columns = {"num_heads": heads, "batch_size": batch, "isl": isl, "step": 0 * isl}
    fold_N = KERNELS["prefill", "kernel"].holdouts(columns, op="mla")["batch_length"]
    for pair in set(zip(batch.tolist(), isl.tolist(), strict=True)):
        assert len(set(fold_N[(batch == pair[0]) & (isl == pair[1])].tolist())) == 1


def test_a_row_slower_than_twice_what_more_heads_take_is_suspect() -> None:
    columns = {
        "kernel_source": np.full(5, "default", dtype=object),
        "num_heads": np.array([1, 2, 4, 128, 4]),
        "batch_size": np.array([8, 8, 8, 8, 16]),
        "isl": np.full(5, 1),
        "step": np.full(5, 127),
    }
    # 90 is over twice the 20 of 128 heads; 19 is under; the row of another batch has nothing to compare with
    seconds_N = np.array([10.0, 90.0, 19.0, 20.0, 500.0]) * 1e-6
    suspect_N = KERNELS["decode", "kernel"].suspects(columns, seconds_N, op="mla")
    assert suspect_N.tolist() == [False, True, False, False, False]


def test_absorbed_products_read_a_matrix_for_each_head() -> None:
    # 16 heads: a matrix of 128 x 512, inputs of 3 x 128 and results of 3 x 512, of 2 bytes, at 1e12 bytes/s
    pre = PROJECTION.describe(MlaProjection(rows_X=np.array(3), heads_X=16, step="pre"), TOY)
    assert float(pre.bound_s) == pytest.approx(2 * 16 * (128 * 512 + 3 * 128 + 3 * 512) / 1e12)
    post = PROJECTION.describe(MlaProjection(rows_X=np.array(3), heads_X=16, step="post"), TOY)
    assert float(post.bound_s) == pytest.approx(float(pre.bound_s))
    assert float(post.stages["inputs"]["memory"]) == pytest.approx(4 * float(pre.stages["inputs"]["memory"]))


def test_absorbed_products_of_a_table_and_of_operations_are_described_alike() -> None:
    columns = {
        "op_name": np.array(["mla_gen_pre", "mla_gen_post"], dtype=object),
        "num_tokens": np.array([1, 300]),
        "num_heads": np.array([128, 8]),
    }
    table = PROJECTION.describe_table(columns, op="mla", dtype="fp8", device=TOY)
    for row, step in enumerate(("pre", "post")):
        rows, heads = np.array([columns["num_tokens"][row]]), int(columns["num_heads"][row])
        one = PROJECTION.describe(MlaProjection(rows_X=rows, heads_X=heads, step=step, dtype="fp8"), TOY)  # type: ignore[arg-type]
        for name, values in one.features.items():
            assert values.item() == pytest.approx(table.features[name][row]), name
        assert one.bound_s.item() == pytest.approx(table.bound_s[row])


def test_each_operation_is_served_by_one_kind_of_kernel() -> None:
    for (phase, part), kernel in KERNELS.items():
        served = [key for key, other in KERNELS.items() if other.serves(mla(phase=phase, part=part), op="mla")]
        assert served == [(phase, part)]
        assert not kernel.serves(MlaProjection(rows_X=np.array(1), heads_X=1, step="pre"), op="mla")
    assert PROJECTION.serves(MlaProjection(rows_X=np.array(1), heads_X=1, step="pre"), op="mla")


@pytest.mark.parametrize("part", ["kernel", "block"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_no_requests_cost_what_one_does(phase: str, part: str) -> None:
    given = describe(phase=phase, part=part, batch_X=np.array([0, 1]))
    for values in (given.bound_s, *given.features.values(), *given.stages["attention"].values()):
        assert np.isfinite(values).all()
        assert values[0] == values[1]

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cost_models.devices import DEVICES
from cost_models.kernels.attention import TABLES, AttentionKernel, causal_pairs, dtype_bytes_of, key_splits
from cost_models.ops import Attention
from traces.errors import InputError

TOY = replace(DEVICES["h100_sxm"], peak_flops={2: 1e14}, memory_bandwidth=1e12, sms=100, l2_bytes=1e6)
PREFILL = AttentionKernel(phase="prefill")
DECODE = AttentionKernel(phase="decode")


def attention(**changes: Any) -> Attention:
    given: dict[str, Any] = {
        "batch_X": np.array(2),
        "new_tokens_X": 1,
        "cached_tokens_X": 99,
        "heads_X": 8,
        "kv_heads_X": 4,
        "head_dim": 128,
        "phase": "decode",
    }
    return Attention(**given | changes)


@pytest.mark.parametrize(
    ("new", "cached", "window", "pairs"),
    [
        (1, 0, np.inf, 1),
        (4, 0, np.inf, 10),  # 1 + 2 + 3 + 4
        (3, 10, np.inf, 36),  # 11 + 12 + 13
        (3, 10, 12, 35),  # 11 + 12 + 12
        (3, 10, 5, 15),  # 5 + 5 + 5
    ],
)
def test_pairs_of_a_causal_mask(new: float, cached: float, window: float, pairs: float) -> None:
    assert causal_pairs(np.array(new), np.array(cached), window) == pairs


def test_prefill_computes_whole_tiles() -> None:
    # 200 tokens are 2 tiles of 128, so 3 of the 4 tile pairs; 4 * 128 FLOPs a pair, 2 requests of 8 heads, 1e14 FLOP/s
    given = PREFILL.describe(attention(phase="prefill", new_tokens_X=200, cached_tokens_X=0), TOY)
    assert float(given.stages["attention"]["compute"]) == pytest.approx(3 * 128**2 * 512 * 16 / 1e14)
    # what the mask asks for is 200 * 201 / 2 pairs
    assert float(given.features["log tile loss"]) == pytest.approx(np.log2(3 * 128**2 / 20100))


def test_decode_reads_its_cache() -> None:
    # keys and values of 2 requests, 100 tokens, 4 heads, 128 wide, 2 bytes: 409,600 bytes;
    # queries and results of 2 requests, 8 heads, 128 wide, 2 bytes: 8,192 bytes
    assert float(DECODE.describe(attention(), TOY).bound_s) == pytest.approx(417_792e-12)
    # an 8-bit cache is half as large
    assert float(DECODE.describe(attention(kv_dtype="fp8"), TOY).bound_s) == pytest.approx(212_992e-12)


def test_a_group_too_large_for_the_grouped_kernel_is_read_head_by_head() -> None:
    grouped = DECODE.describe(attention(heads_X=32, kv_heads_X=1), TOY).stages["attention"]
    one_by_one = DECODE.describe(attention(heads_X=64, kv_heads_X=1), TOY).stages["attention"]
    assert float(one_by_one["reads"]) == pytest.approx(64 * float(grouped["reads"]))


def test_idle_multiprocessors_share_the_keys() -> None:
    blocks, keys = np.array([1, 10, 60, 1]), np.array([1e6, 1e6, 1e6, 600])
    # 100 / 1, 100 / 10, 100 / 60 rounded down; 600 keys have two parts of at least 256
    assert key_splits(blocks, keys, TOY).tolist() == [100, 10, 1, 2]


@pytest.mark.parametrize("kernel", [PREFILL, DECODE])
def test_more_work_has_no_smaller_terms(kernel: AttentionKernel) -> None:
    tokens = np.array([1, 16, 100, 1000, 10_000])
    new = tokens if kernel is PREFILL else 1
    cached = 0 if kernel is PREFILL else tokens
    longer = kernel.describe(attention(phase=kernel.phase, new_tokens_X=new, cached_tokens_X=cached), TOY)
    larger = kernel.describe(
        attention(phase=kernel.phase, batch_X=tokens, new_tokens_X=64 if new is tokens else 1), TOY
    )
    for given in (longer, larger):
        assert (np.diff(given.bound_s) > 0).all()
        for terms in given.stages["attention"].values():
            assert (np.diff(terms) >= 0).all()


@pytest.mark.parametrize("kernel", [PREFILL, DECODE])
def test_a_row_of_a_table_and_the_operation_are_described_alike(kernel: AttentionKernel) -> None:
    prefill = kernel is PREFILL
    columns = {
        "batch_size": np.array([1, 32]),
        "isl": np.array([16, 3000]) if prefill else np.array([1, 1]),
        "step": np.array([0, 0]) if prefill else np.array([1, 4095]),
        "num_heads": np.array([4, 64]),
        "num_key_value_heads": np.array([4, 1]),
        "head_dim": np.array([128, 128]),
        "window_size": np.array([0, 0]),
        "attn_dtype": np.array(["bfloat16", "bfloat16"], dtype=object),
        "kv_cache_dtype": np.array(["bfloat16", "fp8"], dtype=object),
    }
    table = kernel.describe_table(columns, op="attention", dtype="bfloat16", device=TOY)
    for row in range(2):
        one = kernel.describe(
            attention(
                phase=kernel.phase,
                batch_X=np.full((3, 1), columns["batch_size"][row]),
                new_tokens_X=int(columns["isl"][row]),
                cached_tokens_X=0 if prefill else int(columns["isl"][row] + columns["step"][row]),
                heads_X=int(columns["num_heads"][row]),
                kv_heads_X=int(columns["num_key_value_heads"][row]),
                kv_dtype=str(columns["kv_cache_dtype"][row]),
            ),
            TOY,
        )
        assert one.bound_s.shape == (3, 1)
        for name, values in one.features.items():
            assert values == pytest.approx(table.features[name][row]), name
        for stage, terms in one.stages.items():
            for name, values in terms.items():
                assert values == pytest.approx(table.stages[stage][name][row]), name


def test_a_window_limits_what_decode_reads() -> None:
    columns = {
        "batch_size": np.array([1, 1]),
        "isl": np.array([1, 1]),
        "step": np.array([9999, 999]),
        "num_heads": np.array([8, 8]),
        "num_key_value_heads": np.array([8, 8]),
        "head_dim": np.array([128, 128]),
        "window_size": np.array([1001, 0]),
        "kv_cache_dtype": np.array(["bfloat16", "bfloat16"], dtype=object),
    }
    bound_N = DECODE.describe_table(columns, op="attention", dtype="bfloat16", device=TOY).bound_s
    assert bound_N[0] == bound_N[1]


def test_head_counts_are_held_out_whole() -> None:
    heads, batch = (x.ravel() for x in np.meshgrid([4, 8, 16, 32, 64], [1, 2, 4, 8]))
    dtype = np.full(len(heads), "bfloat16", dtype=object)
    columns = {
        "num_heads": heads,
        "num_key_value_heads": heads,
        "attn_dtype": dtype,
        "kv_cache_dtype": dtype,
        "batch_size": batch,
    }
    fold_N = DECODE.holdouts(columns, op="attention")["heads"]
    assert all(len(set(fold_N[heads == count].tolist())) == 1 for count in set(heads.tolist()))


def test_each_phase_has_its_table() -> None:
    assert [kind.name for kind in TABLES] == ["attention_context", "attention_generation"]
    assert DECODE.serves(attention(), op="attention")
    assert not PREFILL.serves(attention(), op="attention")


def test_unknown_cache_dtypes_are_refused() -> None:
    assert dtype_bytes_of(np.array(["fp8", "bfloat16"], dtype=object)).tolist() == [1.0, 2.0]
    with pytest.raises(InputError, match="int3"):
        dtype_bytes_of(np.array(["int3"], dtype=object))


@pytest.mark.parametrize("kernel", [PREFILL, DECODE])
def test_no_requests_cost_what_one_does(kernel: AttentionKernel) -> None:
    given = kernel.describe(attention(phase=kernel.phase, batch_X=np.array([0, 1])), TOY)
    for values in (given.bound_s, *given.features.values(), *given.stages["attention"].values()):
        assert np.isfinite(values).all()
        assert values[0] == values[1]

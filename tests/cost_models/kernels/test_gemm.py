from dataclasses import replace

import numpy as np
import pytest

from cost_models.devices import DEVICES
from cost_models.kernels.gemm import TABLES, GemmKernel, products_of, tiled_compute_s
from cost_models.ops import Gemm, Launch

# 1e14 FLOP/s on 100 multiprocessors: 1e12 FLOP/s each; 1e12 bytes/s.
TOY = replace(DEVICES["h100_sxm"], peak_flops={2: 1e14, 1: 2e14}, memory_bandwidth=1e12, sms=100)
KERNEL = GemmKernel()


def seconds(m: float, n: float, k: float) -> float:
    return float(tiled_compute_s(np.array(m), np.array(n), np.array(k), 1e14, TOY))


def test_one_tile_is_split_over_idle_multiprocessors() -> None:
    # 4 tiles of 64 x 64 in 8 parts each: 32 blocks, one wave. A tile takes 2*64*64*1000 / (0.5 * 1e12) = 16.384 us,
    # a part an eighth: 2.048 us; partial sums pass through memory: 8 parts * 8 bytes * 128 * 128 / 1e12 = 1.048576 us.
    assert seconds(128, 128, 1000) == pytest.approx(3.096576e-6)


def test_a_full_wave_runs_at_the_peak_and_one_tile_more_takes_longer() -> None:
    # 100 tiles of 128 x 256 fill 100 multiprocessors: 2 * 128 * 25600 * 1000 / 1e14
    assert seconds(128, 25600, 1000) == pytest.approx(65.536e-6)
    assert seconds(128, 25601, 1000) > 1.2 * 65.536e-6


def test_tiled_arithmetic_never_falls_with_size_and_never_beats_the_peak() -> None:
    sizes = np.unique(np.geomspace(1, 20000, 60).round())
    m, n, k = np.meshgrid(sizes, sizes, sizes, indexing="ij")
    tiled_MNK = tiled_compute_s(m, n, k, 1e14, TOY)
    for axis in range(3):
        assert (np.diff(tiled_MNK, axis=axis) >= -1e-15).all()
    assert (tiled_MNK >= 2 * m * n * k / 1e14 * (1 - 1e-12)).all()


def test_one_row_is_bound_by_the_weights() -> None:
    # bf16: (1000*1000 + 1000 + 1000) elements of 2 bytes at 1e12 bytes/s; the 2e6 FLOPs take 0.02 us
    one = KERNEL.describe(Gemm(rows_X=np.array(1), columns_X=1000, inner_X=1000), TOY)
    assert float(one.bound_s) == pytest.approx(2.004e-6)
    # fp8: weights and inputs of 1 byte, outputs of 2
    one = KERNEL.describe(Gemm(rows_X=np.array(1), columns_X=1000, inner_X=1000, dtype="fp8"), TOY)
    assert float(one.bound_s) == pytest.approx(1.003e-6)


def test_only_inputs_for_narrow_weights_are_quantised() -> None:
    wide = KERNEL.describe(Gemm(rows_X=np.array(10), columns_X=512, inner_X=1000), TOY)
    narrow = KERNEL.describe(Gemm(rows_X=np.array(10), columns_X=512, inner_X=1000, dtype="fp8"), TOY)
    assert "quantise" not in wide.stages
    # 10 * 1000 inputs: 2 bytes read, 1 written
    assert float(narrow.stages["quantise"]["memory"]) == pytest.approx(30e-9)


def test_products_side_by_side_add_up_bytes_and_share_waves() -> None:
    shared = products_of([(100, 128, 256, 1000)], 2.0, TOY, ())
    # 100 tiles of 128 x 256 fill 100 multiprocessors: 2 * 128 * 256 * 100 * 1000 / 1e14
    assert float(shared.compute_s) == pytest.approx(65.536e-6)
    # 100 * (256*1000 + 128*1000 + 128*256) elements of 2 bytes
    assert float(shared.memory_s) == pytest.approx(83.3536e-6)


def test_a_row_of_a_table_and_the_operation_are_described_alike() -> None:
    columns = {name: np.array(values) for name, values in (("m", [1, 300]), ("n", [512, 7168]), ("k", [2048, 1536]))}
    table = KERNEL.describe_table(columns, op="gemm", dtype="fp8", device=TOY)
    for row in range(2):
        m, n, k = (int(columns[name][row]) for name in ("m", "n", "k"))
        one = KERNEL.describe(Gemm(rows_X=np.array([[m]]), columns_X=n, inner_X=k, dtype="fp8"), TOY)
        assert one.bound_s.shape == (1, 1)
        for name, values in one.features.items():
            assert values.item() == pytest.approx(table.features[name][row])
        for stage, terms in one.stages.items():
            for name, values in terms.items():
                assert values.item() == pytest.approx(table.stages[stage][name][row])


def test_no_rows_cost_what_one_does() -> None:
    given = KERNEL.describe(Gemm(rows_X=np.array([0, 1]), columns_X=512, inner_X=512), TOY)
    for values in (*given.features.values(), *given.stages["product"].values()):
        assert np.isfinite(values).all()
        assert values[0] == values[1]


def test_a_weight_shape_is_held_out_whole() -> None:
    m, n, k = (x.ravel() for x in np.meshgrid([1, 8, 64], [512, 1024, 2048, 4096], [512, 1024, 2048], indexing="ij"))
    fold_N = KERNEL.holdouts({"m": m, "n": n, "k": k}, op="gemm")["shape"]
    folds = {shape: set(fold_N[(n == shape[0]) & (k == shape[1])].tolist()) for shape in zip(n, k, strict=True)}
    assert all(len(of_shape) == 1 for of_shape in folds.values())
    assert len(set(fold_N.tolist())) > 1


def test_it_serves_dense_products_alone() -> None:
    assert KERNEL.serves(Gemm(rows_X=np.array(1), columns_X=1, inner_X=1), op="gemm")
    assert not KERNEL.serves(Launch(kernels_X=np.array(1)), op="gemm")
    assert [kind.name for kind in TABLES] == ["gemm_trtllm"]

import numpy as np
import pytest

from cost_models.devices import DEVICES
from cost_models.kernels.base import TableKind, outlasts_larger
from cost_models.kernels.collectives import (
    TABLES,
    CustomAllReduceKernel,
    NcclKernel,
    alternate_sizes,
    wire_bytes,
)
from cost_models.ops import Collective

H100 = DEVICES["h100_sxm"]
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
MIB = 2.0**20


def collective(kind: str = "all_reduce", size: float = 1000.0, ranks: int = 4, kernel: str = "") -> Collective:
    return Collective(kind=kind, bytes_X=np.array(size), ranks_X=np.array(ranks), kernel=kernel)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all_gather", 750), ("reduce_scatter", 750), ("all_to_all", 750), ("all_reduce", 1500)],
)
def test_a_rank_sends_all_but_its_own_quarter_and_twice_to_reduce_everywhere(kind: str, sent: float) -> None:
    assert wire_bytes(collective(kind)) == sent


def test_the_bound_is_the_wire_at_the_datasheet() -> None:
    # 2 * 3/4 * 900 MB at 450 GB/s: 3 ms
    assert NcclKernel().describe(collective(size=900e6), H100).bound_s == pytest.approx(3e-3)


@pytest.mark.parametrize(("kind", "steps"), [("all_gather", 7), ("all_reduce", 14), ("all_to_all", 3)])
def test_steps_of_eight_ranks(kind: str, steps: int) -> None:
    # a ring passes 7 times, and 7 more to spread the sum; an all-to-all sends to all at once
    stages = NcclKernel().describe(collective(kind, ranks=8), H100).stages
    assert stages["steps"]["steps"] == pytest.approx(steps * 1e-6)


def test_only_the_first_bytes_pay_the_price_of_small_messages() -> None:
    stages = NcclKernel().describe(collective("all_gather", size=8 * MIB, ranks=2), H100).stages
    # 4 MiB go over the wire: all of them within the first 4 and 16 MiB, a quarter within the first 1 MiB
    seconds = {name: float(terms["wire"]) * 450e9 / MIB for name, terms in stages.items() if "wire" in terms}
    assert seconds == pytest.approx(
        {"first 256 KiB": 0.25, "first 1 MiB": 1, "first 4 MiB": 4, "first 16 MiB": 4, "move": 4}
    )


@pytest.mark.parametrize("kernel", [NcclKernel(), CustomAllReduceKernel()])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_nccl_terms_never_fall_with_bytes(kernel: NcclKernel, ranks: int) -> None:
    sizes = Collective(kind="all_reduce", bytes_X=2.0 ** np.arange(8, 31), ranks_X=np.array(ranks))
    description = NcclKernel().describe(sizes, H100)
    for terms in description.stages.values():
        for term in terms.values():
            assert np.all(np.diff(np.broadcast_to(term, 23)) >= 0)
    assert np.all(np.diff(kernel.describe(sizes, H100).bound_s) > 0)


@pytest.mark.parametrize(
    ("size", "ranks", "moved"),
    [
        (0.25 * MIB, 4, 0.75 * MIB),  # below 512 KiB four ranks read three buffers each
        (1 * MIB, 4, 1.5 * MIB),  # above, parts of them, and share the sums: 2 * 3/4
        (1 * MIB, 2, 1 * MIB),  # two ranks always read the other's buffer
        (0.25 * MIB, 8, 2 * 7 / 8 * 0.25 * MIB),  # eight turn at 256 KiB
        (64 * MIB, 8, 0),  # left to NCCL
    ],
)
def test_one_shot_two_shots_or_nccl(size: float, ranks: int, moved: float) -> None:
    stages = CustomAllReduceKernel().describe(collective(size=size, ranks=ranks), H100).stages
    assert stages["move"]["wire"] * 450e9 == pytest.approx(moved)


def test_large_buffers_go_over_nccl_and_earlier_on_a100() -> None:
    kernel = CustomAllReduceKernel()
    of_16_mib = collective(size=16 * MIB)
    assert kernel.describe(of_16_mib, H100).stages["move"]["wire of NCCL"] == 0
    assert kernel.describe(of_16_mib, DEVICES["a100_sxm"]).stages["move"]["wire of NCCL"] > 0


def test_every_other_size_is_held_out_but_the_ends_stay() -> None:
    assert alternate_sizes(np.array([1, 2, 4, 8, 16])).tolist() == [-1, 0, -1, 0, -1]
    assert alternate_sizes(np.array([16, 2, 4, 8, 1, 32, 2])).tolist() == [-1, 0, -1, 0, -1, -1, 0]


def test_disturbed_rows_took_over_twice_as_long_as_more_work() -> None:
    ranks = np.array([2, 2, 2, 4])
    assert outlasts_larger(np.array([4, 1, 2, 8]), np.array([7.0, 17.0, 13.0, 1.0]), [ranks]).tolist() == [
        False,  # nothing larger of two ranks
        True,  # 17 > 2 * 7
        False,  # 13 < 2 * 7
        False,
    ]


@pytest.mark.parametrize("kind", TABLES, ids=lambda kind: kind.name)
def test_a_row_and_an_operation_of_the_same_work_look_the_same(kind: TableKind) -> None:
    for op in kind.timings:
        columns = {
            "message_size": np.array([512, 1 << 22, 1 << 26]),
            "num_gpus": np.array([2, 4, 8]),
            "kernel_source": np.array(["SGLang_CustomAllReduce_eager"] * 3),
        }
        dtype = "half" if kind.dtype_column else "bfloat16"
        rows = kind.kernel.describe_table(columns, op=op, dtype=dtype, device=H100)
        operation = Collective(
            kind=op,  # type: ignore[arg-type]
            bytes_X=2.0 * columns["message_size"],
            ranks_X=columns["num_gpus"],
            dtype=dtype,
            kernel="SGLang_CustomAllReduce_eager",
        )
        assert kind.kernel.serves(operation, op=op)
        same = kind.kernel.describe(operation, H100)
        assert same.stages.keys() == rows.stages.keys()
        for stage, terms in rows.stages.items():
            for name, term in terms.items():
                np.testing.assert_allclose(same.stages[stage][name], term)
        for name, values in rows.features.items():
            np.testing.assert_allclose(same.features[name], values)
        assert set(np.unique(same.source)) == set(np.unique(rows.source))


@pytest.mark.parametrize("kernel", [NcclKernel(), CustomAllReduceKernel()])
def test_any_leading_shape(kernel: NcclKernel) -> None:
    operation = Collective(kind="all_reduce", bytes_X=np.array([[1e3], [1e6], [1e9]]), ranks_X=np.array([[2, 4, 8, 8]]))
    description = kernel.describe(operation, H100)
    for terms in description.stages.values():
        for term in terms.values():
            assert np.broadcast_shapes(np.shape(term), (3, 4)) == (3, 4)
    assert np.broadcast_shapes(*(np.shape(v) for v in description.features.values())) == (3, 4)
    assert np.all(np.isfinite(description.bound_s))

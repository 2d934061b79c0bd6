"""The datasheet bound by hand: FLOPs over peak against bytes over memory bandwidth."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.cluster import cpu_box, gpu_cluster
from cost_models.devices import DEVICES, Device
from cost_models.ops import AllToAll, Combine, Experts, Gate, MemoryCopy, Permute, Regroup, Route
from cost_models.roofline import Roofline
from traces.errors import InputError

# 1000 FLOP/s in bf16, 2000 in fp8, 100 bytes/s of memory, 10 bytes/s between ranks.
SMALL = Device(
    name="small",
    memory_bytes=1e3,
    memory_bandwidth=100.0,
    peak_flops={2: 1000.0, 1: 2000.0},
    scale_up=10.0,
    scale_out=10.0,
    ranks_per_node=8,
    sms=4,
    l2_bytes=10.0,
    host_bandwidth=5.0,
)
SMALL_COSTS = Roofline(gpu_cluster(SMALL, 2))


def experts(rows_XS: Any, *, weight_bytes: float = 2, row_bytes: int = 8) -> Experts:
    """Experts of 3 * 4 * 8 = 96 parameters."""
    return Experts(
        rows_XS=np.array(rows_XS),
        hidden=4,
        expert_hidden=8,
        matrices=3,
        weight_bytes=weight_bytes,
        row_bytes=row_bytes,
    )


def test_a_decode_step_reads_the_weights_of_its_active_experts() -> None:
    # Two active experts of 96 * 2 bytes, two rows of 8 bytes read and written: (384 + 32) / 100 s; FLOPs 384 / 1000 s.
    assert SMALL_COSTS.seconds(experts([1, 1, 0])) == pytest.approx(4.16)
    # The same rows in one expert: (192 + 32) / 100.
    assert SMALL_COSTS.seconds(experts([2, 0, 0])) == pytest.approx(2.24)


def test_while_memory_bound_rows_cost_only_their_own_bytes() -> None:
    few, more = SMALL_COSTS.seconds(experts([[1, 1], [4, 2]]))
    assert more - few == pytest.approx(2 * 4 * 8 / 100)  # 4 rows more, 8 bytes in and out
    one, many = SMALL_COSTS.seconds(experts([[1, 1], [4, 4]], row_bytes=0))
    assert one == many == pytest.approx(2 * 96 * 2 / 100)


def test_on_an_h100_eight_tokens_an_expert_cost_what_one_does() -> None:
    costs = Roofline(gpu_cluster(DEVICES["h100_sxm"], 8))
    rows_XS = np.array([[1] * 32, [8] * 32])  # DeepSeek-V3: 44 MB an expert in fp8
    deepseek = Experts(rows_XS=rows_XS, hidden=7168, expert_hidden=2048, matrices=3, weight_bytes=1, row_bytes=2 * 7168)
    one, eight = costs.seconds(deepseek)
    assert one == pytest.approx(32 * (3 * 7168 * 2048 + 2 * 2 * 7168) / 3.35e12)
    assert one < eight < 1.01 * one


def test_many_rows_are_bound_by_flops() -> None:
    # 1000 rows: 2 * 1000 * 96 FLOP at 1000 FLOP/s; bytes would take (192 + 16000) / 100 = 162 s.
    assert SMALL_COSTS.seconds(experts([1000])) == pytest.approx(192.0)
    # In fp8 the peak is twice that; then bytes, (96 + 16000) / 100, are the larger part.
    assert SMALL_COSTS.seconds(experts([1000], weight_bytes=1)) == pytest.approx(160.96)


def test_an_idle_rank_takes_no_time() -> None:
    assert SMALL_COSTS.seconds(experts([[0, 0], [1, 0]])).tolist() == [0.0, pytest.approx(2.08)]


def test_the_other_operations_by_hand() -> None:
    tokens = np.array(5)
    # 2 * 5 * 4 * 6 = 240 FLOP: .24 s; 2 * 5 * (4 + 6) + 2 * 4 * 6 = 148 bytes: 1.48 s.
    assert SMALL_COSTS.seconds(Gate(tokens_X=tokens, hidden=4, experts=6)) == pytest.approx(1.48)
    # 5 tokens * 2 scores of 4 bytes, read and written: 80 bytes.
    route = Route(tokens_X=tokens, width=2, parts=("top_k",))
    assert SMALL_COSTS.seconds(route) == pytest.approx(0.8)
    # 3 rows of 8 bytes, read and written: 48 bytes.
    assert SMALL_COSTS.seconds(Permute(pairs_X=tokens, rows_X=np.array(3), row_bytes=8)) == pytest.approx(0.48)
    assert SMALL_COSTS.seconds(Regroup(rows_X=np.array(3), segments=4, row_bytes=8)) == pytest.approx(0.48)
    # 3 rows read and 5 tokens written: 64 bytes.
    assert SMALL_COSTS.seconds(Combine(rows_X=np.array(3), tokens_X=tokens, row_bytes=8)) == pytest.approx(0.64)
    assert SMALL_COSTS.seconds(MemoryCopy(bytes_X=np.array(50))) == pytest.approx(1.0)


def test_an_all_to_all_is_priced_on_the_links() -> None:
    bytes_LGG = np.array([[[9, 20], [10, 9]], [[0, 0], [0, 0]]])
    assert SMALL_COSTS.seconds(AllToAll(bytes_XGG=bytes_LGG)).tolist() == [2.0, 0.0]
    assert SMALL_COSTS.seconds(AllToAll(bytes_XGG=bytes_LGG[0])) == 2.0


@given(
    rows_S=st.lists(st.integers(0, 5000), min_size=1, max_size=4),
    more_S=st.lists(st.integers(0, 50), min_size=4, max_size=4),
)
def test_more_rows_never_take_less(rows_S: list[int], more_S: list[int]) -> None:
    rows = np.array(rows_S)
    before, after = SMALL_COSTS.seconds(experts([rows, rows + np.array(more_S)[: rows.size]]))
    assert after >= before


def test_a_cluster_without_a_datasheet_is_refused() -> None:
    with pytest.raises(InputError) as refused:
        Roofline(cpu_box(2))
    assert str(refused.value) == "2 x cpu has no datasheet; calibrate it and name the profile"


def test_its_name_says_that_it_is_a_bound() -> None:
    assert SMALL_COSTS.name == "datasheet bound of small"

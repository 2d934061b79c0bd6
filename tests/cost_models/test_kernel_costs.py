"""Measured kernels that come with moeroute: what they say, how sure they are, and what they refuse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cost_models.cluster import cpu_box, gpu_cluster
from cost_models.devices import DEVICES
from cost_models.kernel_costs import KernelCosts
from cost_models.kernel_profile import SHIPPED, KernelProfile, shipped_profile
from cost_models.ops import (
    AllToAll,
    Attention,
    Collective,
    Combine,
    DenseMlp,
    Experts,
    Gate,
    Gemm,
    Permute,
    Regroup,
    Route,
    TokenExchange,
)
from cost_models.roofline import Roofline
from cost_models.tables import find_tables, read_parts
from cost_models.traffic import Traffic
from traces.errors import InputError

H100S = gpu_cluster(DEVICES["h100_sxm"], 8)
TRTLLM = KernelCosts.shipped(H100S, "trtllm", "nccl")
SGLANG = KernelCosts.shipped(H100S, "sglang", "trtllm")
TABLES = Path(__file__).parents[2] / "cost_models" / "data"

# DeepSeek-V3's experts on one of 8 ranks, 16 rows each.
EXPERTS = Experts(
    rows_XS=np.full((1, 32), 16),
    hidden=7168,
    expert_hidden=2048,
    matrices=3,
    weight_bytes=1,
    row_bytes=2 * 7168,
    routed_tokens_X=np.array([512]),
    top_k=8,
    dtype="fp8_block",
)


def exchange(**changes: Any) -> TokenExchange:
    return replace(
        TokenExchange(
            tokens_X=np.array([128]),
            hidden=7168,
            top_k=8,
            experts=256,
            ranks_X=np.array(8),
            nodes_X=np.array(1),
            direction="dispatch",
            mode="low_latency",
            dtype="fp8",
        ),
        **changes,
    )


def test_every_gpu_of_the_tables_has_its_profiles_and_they_are_small() -> None:
    gpus = {file.device.name for file in find_tables(TABLES)}
    assert gpus == {"a100_sxm", "h100_sxm", "h200_sxm", "b200_sxm", "gb200"}
    for gpu in gpus:
        for framework in ("trtllm", "sglang", "nccl"):
            assert shipped_profile(gpu, framework).exists()
    for path in SHIPPED.glob("*.json"):
        assert path.stat().st_size <= 300_000
        profile = KernelProfile.read(path)
        assert profile.file_name == path.name
        assert {kernel.framework for kernel in profile.kernels} == {profile.framework}


@pytest.mark.parametrize(("name", "median_error"), [("h100_sxm_moe_trtllm", 0.05), ("h100_sxm_gemm_trtllm", 0.05)])
def test_a_shipped_fit_stands_on_its_table(name: str, median_error: float) -> None:
    file = next(file for file in find_tables(TABLES) if file.name == name)
    profile = KernelProfile.read(shipped_profile("h100_sxm", "trtllm"))
    for part in read_parts(file):
        fitted = next(k for k in profile.kernels if (k.table, k.op, k.dtype) == (name, part.op, part.dtype))
        predicted_N, beyond_N = fitted.fit.predict(part.describe())
        sound_N = ~part.kind.kernel.suspects(part.columns, part.seconds_N, op=part.op)
        assert np.median(np.abs(predicted_N / part.seconds_N - 1)[sound_N]) < median_error
        assert (beyond_N[sound_N] == 0).all()


def test_what_was_measured_is_no_extrapolation_and_has_an_interval() -> None:
    prediction = TRTLLM.predict(EXPERTS)
    assert not prediction.extrapolated_X.any()
    assert prediction.low_s_X is not None
    assert prediction.high_s_X is not None
    assert prediction.low_s_X[0] < prediction.seconds_X[0] < prediction.high_s_X[0]
    # 32 experts of 3 x 7168 x 2048 bytes at 3.35 TB/s are 421 us: no kernel reaches that, none is half as good.
    assert 421e-6 < prediction.seconds_X[0] < 2 * 421e-6


def test_far_beyond_what_was_measured_it_says_so_and_is_less_sure() -> None:
    near, far = TRTLLM.predict(EXPERTS), TRTLLM.predict(replace(EXPERTS, hidden=65536))
    assert far.extrapolated_X.all()
    width_near, width_far = (np.log(p.high_s_X / p.low_s_X)[0] for p in (near, far))  # type: ignore[operator]
    assert width_far > width_near
    bound_s = Roofline(H100S).seconds(replace(EXPERTS, hidden=65536))
    assert 0.5 < far.seconds_X[0] / bound_s[0] < 3  # physics is left, and it is near the datasheet for large work


def test_two_frameworks_have_their_own_kernels() -> None:
    assert TRTLLM.kernel_for(EXPERTS).framework == "trtllm"
    assert SGLANG.kernel_for(EXPERTS).framework == "sglang"
    assert SGLANG.kernel_for(Gemm(rows_X=np.array(8), columns_X=4096, inner_X=4096)).framework == "trtllm"
    assert SGLANG.name == "h100_sxm kernels of sglang, then trtllm"


@pytest.mark.parametrize(
    ("mode", "kind"), [("normal", "moe_wideep_context_sglang"), ("low_latency", "moe_wideep_generation_sglang")]
)
def test_sglang_runs_the_experts_that_its_dispatch_is_made_for(mode: Any, kind: str) -> None:
    assert SGLANG.kernel_for(replace(EXPERTS, mode=mode)).kind == kind
    assert SGLANG.kernel_for(EXPERTS).kind == "moe_sglang"


def test_a_kernel_can_be_named_by_its_source_or_its_table() -> None:
    b200 = KernelCosts.shipped(gpu_cluster(DEVICES["b200_sxm"], 8), "trtllm")
    experts = replace(EXPERTS, dtype="nvfp4", weight_bytes=0.5625)
    usual, latency = (b200.seconds(replace(experts, kernel=k)) for k in ("", "moe_torch_flow_min_latency"))
    assert usual[0] != latency[0]
    assert b200.kernel_for(replace(experts, kernel="moe_wideep_trtllm")).kind == "moe_wideep_trtllm"
    with pytest.raises(InputError, match=r"have no Experts by the name 'magic'; known are .*moe_torch_flow_cutlass"):
        b200.seconds(replace(experts, kernel="magic"))


def test_gates_and_shared_experts_are_products() -> None:
    tokens_X = np.array([64, 256])
    gate = TRTLLM.seconds(Gate(tokens_X=tokens_X, hidden=7168, experts=256))
    np.testing.assert_array_equal(gate, TRTLLM.seconds(Gemm(rows_X=tokens_X, columns_X=256, inner_X=7168)))
    shared = TRTLLM.seconds(
        DenseMlp(rows_X=tokens_X, hidden=4096, mlp_hidden=2048, matrices=3, weight_bytes=2, row_bytes=8192)
    )
    up = TRTLLM.seconds(Gemm(rows_X=tokens_X, columns_X=2 * 2048, inner_X=4096))
    down = TRTLLM.seconds(Gemm(rows_X=tokens_X, columns_X=4096, inner_X=2048))
    np.testing.assert_allclose(shared, up + down)


def test_traffic_that_is_uneven_takes_longer() -> None:
    even_GG = np.full((8, 8), 128)  # 8 experts a token, one of them on each rank
    skewed_GG = even_GG.copy()
    skewed_GG[:, 0] *= 4
    even, skewed = (SGLANG.seconds(exchange(traffic=Traffic.of(rows_GG[None]))) for rows_GG in (even_GG, skewed_GG))
    assert skewed[0] > 2 * even[0]
    # Even traffic given as rows is the same exchange as without.
    np.testing.assert_allclose(even, SGLANG.seconds(exchange()), rtol=0.02)


def test_an_engine_without_an_exchange_uses_the_collective_library() -> None:
    a100 = KernelCosts.shipped(gpu_cluster(DEVICES["a100_sxm"], 8), "trtllm", "nccl")
    bytes_XGG = np.full((1, 8, 8), 1e6)
    as_exchange = a100.seconds(exchange(dtype="bfloat16", hidden=5000, traffic=Traffic.of(np.full((1, 8, 8), 100))))
    # 7 MB leave each rank, as in an all-to-all of buffers of 8 MB.
    even = Collective(kind="all_to_all", bytes_X=np.array([8e6]), ranks_X=np.array(8))
    np.testing.assert_allclose(as_exchange, a100.seconds(even))
    np.testing.assert_allclose(as_exchange, a100.seconds(AllToAll(bytes_XGG=bytes_XGG)))
    two_nodes = KernelCosts.shipped(gpu_cluster(DEVICES["a100_sxm"], 16), "trtllm", "nccl")
    with pytest.raises(InputError, match="no all-to-all between nodes"):
        two_nodes.seconds(AllToAll(bytes_XGG=np.ones((1, 16, 16))))


def test_a_gpu_of_the_same_silicon_runs_the_measured_kernels_over_its_own_links() -> None:
    h800 = KernelCosts.shipped(gpu_cluster(DEVICES["h800_sxm"], 8), "sglang", "trtllm")
    assert h800.name == "h800_sxm kernels of sglang, then trtllm, measured on h100_sxm"
    np.testing.assert_array_equal(h800.seconds(EXPERTS), SGLANG.seconds(EXPERTS))
    assert not h800.predict(EXPERTS).extrapolated_X.any()
    measured, elsewhere = SGLANG.predict(exchange()), h800.predict(exchange())
    assert elsewhere.seconds_X[0] > 1.3 * measured.seconds_X[0]  # 200 instead of 450 GB/s of NVLink
    assert elsewhere.extrapolated_X.all()
    assert not measured.extrapolated_X.any()


def test_a_slower_link_takes_at_least_what_is_reached_of_it() -> None:
    h800 = KernelCosts.shipped(gpu_cluster(DEVICES["h800_sxm"], 16), "sglang")
    # A token in BF16 goes to both nodes and to 4 of the 16 ranks, passed on inside its node by the rank of its
    # source's number: 4096 x 4 rows arrive at each rank, 7 of 8 from others, 14,336 bytes each.
    over_nvlink_s = 4096 * 4 * 7 / 8 * 14336 / (0.7 * 200e9)  # 1.468 ms
    over_network_s = 4096 * 14336 / 50e9  # 1.174 ms
    traffic = exchange(
        tokens_X=np.array([4096]),
        ranks_X=np.array(16),
        nodes_X=np.array(2),
        mode="normal",
        direction="combine",
        sms_X=24,
        traffic=Traffic.of(np.full((1, 16, 16), 4096 * 4 / 16), nodes=2, node_rows_XGN=np.full((1, 16, 2), 4096.0)),
    )
    assert h800.seconds(traffic)[0] >= over_nvlink_s > over_network_s


def test_what_kernels_do_inside_others_is_named() -> None:
    assert {Permute, Regroup, Combine, Route} <= TRTLLM.included
    assert Route not in SGLANG.included


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (replace(EXPERTS, dtype="nvfp4"), "have no Experts in dtype 'nvfp4'; known are bfloat16, fp8, fp8_block"),
        (exchange(dtype="bfloat16", mode="low_latency", kernel="magic"), "by the name 'magic'"),
    ],
)
def test_what_was_not_measured_is_named_with_what_was(operation: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TRTLLM.seconds(operation)


def test_an_operation_of_no_profile_names_those_there_are() -> None:
    nccl = KernelCosts.shipped(H100S, "nccl")
    attention = Attention(
        batch_X=np.array(1),
        new_tokens_X=1,
        cached_tokens_X=9,
        heads_X=8,
        kv_heads_X=8,
        head_dim=128,
        phase="decode",
    )
    with pytest.raises(InputError, match=r"h100_sxm kernels of nccl have no Attention .* add a profile"):
        nccl.seconds(attention)


def test_gpus_and_frameworks_that_there_are_not() -> None:
    with pytest.raises(InputError, match=r"no measured kernels of 'l40s' come with moeroute; known are a100_sxm, b200"):
        KernelCosts.shipped(gpu_cluster(DEVICES["l40s"], 8), "trtllm")
    with pytest.raises(InputError, match="no megatron kernels of h100_sxm come with moeroute; known are nccl, sglang"):
        KernelCosts.shipped(H100S, "megatron")
    profile = KernelProfile.read(shipped_profile("h100_sxm", "nccl"))
    with pytest.raises(InputError, match="a profile of h100_sxm cannot price 8 x b200_sxm"):
        KernelCosts([profile], gpu_cluster(DEVICES["b200_sxm"], 8))
    with pytest.raises(InputError, match="cannot price 2 x cpu"):
        KernelCosts([profile], cpu_box(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": 3}, "gpu: input should be a valid string"),
        ({"colour": "red"}, "colour: extra inputs are not permitted"),
        ({"kernels": []}, "kernels: list should have at least 1 item"),
    ],
)
def test_a_damaged_profile_is_refused(changes: dict[str, Any], message: str) -> None:
    document = KernelProfile.read(shipped_profile("h100_sxm", "vllm")).model_dump() | changes
    with pytest.raises(InputError, match=f"p.json: {message}.*; fit it again"):
        KernelProfile.parse(document, Path("p.json"))

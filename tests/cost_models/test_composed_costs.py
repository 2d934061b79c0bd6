"""Costs put together from measured kernels: blocks in parts, products that stand in, answers that are kept."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models.cluster import gpu_cluster
from cost_models.devices import DEVICES
from cost_models.kernel_costs import KernelCosts
from cost_models.kernel_profile import KernelProfile, shipped_profile
from cost_models.kernels import kind_named
from cost_models.ops import (
    Collective,
    DenseMlp,
    Experts,
    Gate,
    Gemm,
    Mla,
    MlaProjection,
    Operation,
    Route,
    TokenExchange,
)
from cost_models.traffic import Traffic
from traces.errors import InputError

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


def costs(gpu: str, *frameworks: str) -> KernelCosts:
    return KernelCosts.shipped(gpu_cluster(DEVICES[gpu], 8), *frameworks)


def block(phase: Phase, **changes: Any) -> Mla:
    """32 requests: at prefill 1,024 new tokens after 512 cached ones, at decode one after 4,096."""
    whole = Mla(
        batch_X=np.array([32]),
        new_tokens_X=1024 if phase == "prefill" else 1,
        cached_tokens_X=512 if phase == "prefill" else 4096,
        heads_X=16,
        phase=phase,
        part="block",
    )
    return replace(whole, **changes)


def by_its_table(model: KernelCosts, gpu: str, operation: Operation) -> Any:
    """Seconds of the kernel that prices an operation, and of nothing else."""
    fitted = model.kernel_for(operation)
    return fitted.fit.predict(kind_named(fitted.kind).kernel.describe(operation, DEVICES[gpu]))[0]


def total(model: KernelCosts, *operations: Operation) -> Any:
    return sum(model.seconds(operation) for operation in operations)


@pytest.mark.parametrize("gpu", ["a100_sxm", "b200_sxm"])
def test_a_block_at_decode_without_a_table_is_the_sum_of_its_parts(gpu: str) -> None:
    model = costs(gpu, "sglang", "trtllm") if gpu == "a100_sxm" else without_blocks(gpu)
    rows_X = np.array([32])
    parts: list[Operation] = [
        Gemm(rows_X=rows_X, columns_X=1536 + 512 + 64, inner_X=7168),  # down to the latents and the rotated key
        Gemm(rows_X=rows_X, columns_X=16 * (128 + 64), inner_X=1536),  # queries of 16 heads
        MlaProjection(rows_X=rows_X, heads_X=16, step="pre"),
        block("decode", part="kernel"),
        MlaProjection(rows_X=rows_X, heads_X=16, step="post"),
        Gemm(rows_X=rows_X, columns_X=7168, inner_X=16 * 128),  # results out
    ]
    np.testing.assert_allclose(model.seconds(block("decode")), total(model, *parts), rtol=1e-12)


def without_blocks(gpu: str) -> KernelCosts:
    """The kernels of TensorRT-LLM on a GPU but for those of whole attention blocks."""
    profile = KernelProfile.read(shipped_profile(gpu, "trtllm"))
    kept = [kernel for kernel in profile.kernels if "module" not in kernel.kind]
    assert len(kept) < len(profile.kernels)
    return KernelCosts([profile.model_copy(update={"kernels": kept})], gpu_cluster(DEVICES[gpu], 8))


def test_a_block_at_prefill_without_a_table_brings_up_what_is_cached_too() -> None:
    model = costs("a100_sxm", "trtllm")
    rows_X, keys_X = np.array([32 * 1024]), np.array([32 * (1024 + 512)])
    parts: list[Operation] = [
        Gemm(rows_X=rows_X, columns_X=2112, inner_X=7168),
        Gemm(rows_X=rows_X, columns_X=16 * 192, inner_X=1536),
        Gemm(rows_X=keys_X, columns_X=16 * 256, inner_X=512),  # keys and values of 16 heads, from 512 latents
        block("prefill", part="kernel"),
        Gemm(rows_X=rows_X, columns_X=7168, inner_X=16 * 128),
    ]
    np.testing.assert_allclose(model.seconds(block("prefill")), total(model, *parts), rtol=1e-12)


@pytest.mark.parametrize("phase", PHASES)
def test_a_composed_block_is_near_the_block_that_was_measured(phase: Phase) -> None:
    """TensorRT-LLM has both on H200: parts one after another, which know no pass between them, are not far off."""
    whole, parts = costs("h200_sxm", "trtllm").seconds(block(phase)), without_blocks("h200_sxm").seconds(block(phase))
    assert 0.5 < parts[0] / whole[0] < 1.5


@pytest.mark.parametrize("phase", PHASES)
def test_a_composed_block_has_an_interval_and_says_where_a_part_was_not_measured(phase: Phase) -> None:
    model = costs("a100_sxm", "trtllm")
    prediction = model.predict(block(phase))
    assert prediction.low_s_X is not None
    assert prediction.high_s_X is not None
    assert prediction.low_s_X[0] < prediction.seconds_X[0] < prediction.high_s_X[0]
    far = model.predict(block(phase, batch_X=np.array([32, 10**7])))
    assert far.extrapolated_X.tolist()[1] is True
    # A mixture of arrays: several batches at once are each of them.
    each = [model.seconds(block(phase, batch_X=np.array([batch])))[0] for batch in (1, 32)]
    np.testing.assert_allclose(model.seconds(block(phase, batch_X=np.array([1, 32]))), each, rtol=1e-12)


def test_a_part_that_was_never_measured_is_named() -> None:
    with pytest.raises(InputError, match="a100_sxm kernels of trtllm have no Gemm in dtype 'fp8'; known are bfloat16"):
        costs("a100_sxm", "trtllm").seconds(block("decode", gemm_dtype="fp8"))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("gpu", ["h100_sxm", "b200_sxm"])
def test_sglangs_block_is_given_its_latents_so_that_their_product_is_added_once(gpu: str, phase: Phase) -> None:
    model = costs(gpu, "sglang", "trtllm")
    operation = block(phase, heads_X=128, gemm_dtype="fp8_block")
    kind = "mla_wideep_context_sglang" if phase == "prefill" else "mla_wideep_generation_sglang"
    assert model.kernel_for(operation).kind == kind
    tokens = 32 * 1024 if phase == "prefill" else 32
    down = Gemm(rows_X=np.array([tokens]), columns_X=2112, inner_X=7168, dtype="fp8_block")
    np.testing.assert_allclose(
        model.seconds(operation), by_its_table(model, gpu, operation) + model.seconds(down), rtol=1e-12
    )


@pytest.mark.parametrize("phase", PHASES)
def test_trtllms_block_has_its_product_inside(phase: Phase) -> None:
    model = costs("h200_sxm", "trtllm")
    operation = block(phase, gemm_dtype="fp8_block")
    assert "module" in model.kernel_for(operation).kind
    np.testing.assert_array_equal(model.seconds(operation), by_its_table(model, "h200_sxm", operation))


def test_sglangs_block_alone_says_that_it_lacks_a_product() -> None:
    with pytest.raises(InputError, match=r"h100_sxm kernels of sglang have no Gemm like this one; .* add a profile"):
        costs("h100_sxm", "sglang").seconds(block("decode", heads_X=128, gemm_dtype="fp8_block"))


def test_fp8_stands_in_for_products_scaled_in_blocks_where_there_is_no_table_of_them() -> None:
    product = Gemm(rows_X=np.array([64, 4096]), columns_X=4096, inner_X=7168, dtype="fp8_block")
    blackwell, hopper = costs("b200_sxm", "trtllm"), costs("h100_sxm", "trtllm")
    stands_in, itself = blackwell.predict(product), blackwell.predict(replace(product, dtype="fp8"))
    np.testing.assert_array_equal(stands_in.seconds_X, itself.seconds_X)
    assert stands_in.extrapolated_X.tolist() == [True, True]
    assert itself.extrapolated_X.tolist() == [False, False]
    # Hopper has one, which is not fp8's.
    measured = hopper.predict(product)
    assert hopper.kernel_for(product).dtype == "fp8_block"
    assert measured.extrapolated_X.tolist() == [False, False]
    assert (measured.seconds_X != hopper.predict(replace(product, dtype="fp8")).seconds_X).all()


def test_nothing_stands_in_for_other_dtypes_and_operations() -> None:
    with pytest.raises(InputError, match="have no Gemm in dtype 'fp8_block'; known are bfloat16"):
        costs("a100_sxm", "trtllm").seconds(
            Gemm(rows_X=np.array([64]), columns_X=4096, inner_X=7168, dtype="fp8_block")
        )
    with pytest.raises(InputError, match="have no Gemm in dtype 'nvfp4'; known are bfloat16, fp8, fp8_block"):
        costs("h100_sxm", "trtllm").seconds(Gemm(rows_X=np.array([64]), columns_X=64, inner_X=64, dtype="nvfp4"))


# Each operation at one size; `size` may be a float.
KEPT: dict[str, Any] = {
    "Gate": lambda size_X: Gate(tokens_X=size_X, hidden=7168, experts=256),
    "Route": lambda size_X: Route(tokens_X=size_X, width=8, parts=("top_k",)),
    "Gemm": lambda size_X: Gemm(rows_X=size_X, columns_X=4096, inner_X=4096),
    "Gemm fp8": lambda size_X: Gemm(rows_X=size_X, columns_X=4096, inner_X=4096, dtype="fp8"),
    "Gemm turned": lambda size_X: Gemm(rows_X=4096 * np.ones_like(size_X), columns_X=size_X, inner_X=4096),
    "DenseMlp": lambda size_X: DenseMlp(
        rows_X=size_X, hidden=4096, mlp_hidden=2048, matrices=3, weight_bytes=2, row_bytes=8192
    ),
    "Experts": lambda size_X: Experts(
        rows_XS=size_X[..., None],
        hidden=7168,
        expert_hidden=2048,
        matrices=3,
        weight_bytes=1,
        row_bytes=14336,
        dtype="fp8_block",
    ),
    "Mla": lambda size_X: Mla(
        batch_X=size_X, new_tokens_X=1, cached_tokens_X=1024, heads_X=16, phase="decode", part="kernel"
    ),
    "Mla, more cached": lambda size_X: Mla(
        batch_X=size_X, new_tokens_X=1, cached_tokens_X=4096, heads_X=16, phase="decode", part="kernel"
    ),
    "Mla, prefill": lambda size_X: Mla(
        batch_X=size_X, new_tokens_X=64, cached_tokens_X=1024, heads_X=16, phase="prefill", part="kernel"
    ),
    "MlaProjection pre": lambda size_X: MlaProjection(rows_X=size_X, heads_X=16, step="pre"),
    "MlaProjection post": lambda size_X: MlaProjection(rows_X=size_X, heads_X=16, step="post"),
    "Collective": lambda size_X: Collective(kind="all_reduce", bytes_X=1000 * size_X, ranks_X=np.array(8)),
}
REMEMBERS = costs("h100_sxm", "trtllm", "nccl")


@settings(deadline=None, max_examples=200)
@given(
    name=st.sampled_from(sorted(KEPT)),
    size=st.sampled_from([1, 2, 8, 8.0, 8.5, 64, 2**31]),
    shape=st.sampled_from([(), (1,), (1, 1)]),
)
def test_an_answer_that_is_kept_is_the_one_that_was_worked_out(name: str, size: float, shape: tuple[int, ...]) -> None:
    """Answers of a single size are kept over all examples; those of two at once are worked out anew."""
    anew, operation = REMEMBERS.predict(KEPT[name](np.array([size, size]))), KEPT[name](np.full(shape, size))
    for kept in (REMEMBERS.predict(operation), REMEMBERS.predict(operation)):
        for field in ("seconds_X", "low_s_X", "high_s_X", "extrapolated_X"):
            one, two = getattr(kept, field), getattr(anew, field)
            if two is None:
                assert one is None
                continue
            assert np.shape(one) == shape
            np.testing.assert_allclose(np.ravel(one), two[:1], rtol=1e-12)


def test_an_array_that_changes_after_it_was_priced_is_another_operation() -> None:
    rows_X = np.array([8])
    operation = Gemm(rows_X=rows_X, columns_X=4096, inner_X=4096)
    few = float(REMEMBERS.seconds(operation)[0])
    rows_X[0] = 8192
    many = float(REMEMBERS.seconds(operation)[0])
    assert many > 2 * few
    assert many == REMEMBERS.seconds(replace(operation, rows_X=np.array([8192])))[0]
    rows_X[0] = 8
    assert REMEMBERS.seconds(operation)[0] == few


def test_shapes_of_one_element_keep_their_shapes() -> None:
    sizes: list[Any] = [np.array(64), np.array([64]), np.array([[64]])]
    for size_X in (*sizes, *reversed(sizes)):
        assert REMEMBERS.seconds(Gemm(rows_X=size_X, columns_X=4096, inner_X=4096)).shape == size_X.shape


def test_operations_of_the_same_figures_are_told_apart() -> None:
    rows_X = np.array([64])
    alike: list[Operation] = [
        Gemm(rows_X=rows_X, columns_X=256, inner_X=7168),
        Gemm(rows_X=rows_X, columns_X=7168, inner_X=256),
        Gemm(rows_X=rows_X, columns_X=256, inner_X=7168, dtype="fp8"),
        MlaProjection(rows_X=rows_X, heads_X=16, step="pre"),
        MlaProjection(rows_X=rows_X, heads_X=16, step="post"),
        MlaProjection(rows_X=rows_X, heads_X=16, step="pre", dtype="fp8"),
    ]
    assert len({float(REMEMBERS.seconds(operation)[0]) for operation in alike}) == len(alike)
    # A gate is its product.
    gate = Gate(tokens_X=rows_X, hidden=7168, experts=256)
    np.testing.assert_array_equal(REMEMBERS.seconds(gate), REMEMBERS.seconds(alike[0]))


def test_two_models_do_not_share_their_answers() -> None:
    product = Gemm(rows_X=np.array([64]), columns_X=4096, inner_X=4096)
    h100, b200 = costs("h100_sxm", "trtllm"), costs("b200_sxm", "trtllm")
    assert h100.seconds(product)[0] != b200.seconds(product)[0]


def test_exchanges_of_known_traffic_are_told_apart() -> None:
    model = costs("h100_sxm", "sglang")
    even_XGG = np.full((1, 8, 8), 128)
    operation = TokenExchange(
        tokens_X=np.array([128]),
        hidden=7168,
        top_k=8,
        experts=256,
        ranks_X=np.array(8),
        nodes_X=np.array(1),
        direction="dispatch",
        mode="low_latency",
        dtype="fp8",
        traffic=Traffic.of(even_XGG),
    )
    more = replace(operation, traffic=Traffic.of(8 * even_XGG))
    assert model.seconds(more)[0] > 2 * model.seconds(operation)[0]


def test_an_answer_that_is_kept_cannot_be_written_to() -> None:
    seconds_X = REMEMBERS.seconds(Gemm(rows_X=np.array([64]), columns_X=512, inner_X=512))
    with pytest.raises(ValueError, match="read-only"):
        seconds_X[0] = 7.0

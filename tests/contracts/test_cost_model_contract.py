"""What every cost model must hold: positive, monotone, and the same for one operation as for an array of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cost_models.calibrated import LINEAR, Calibrated, features, shape_of
from cost_models.cluster import gpu_cluster
from cost_models.devices import DEVICES
from cost_models.kernel_costs import KernelCosts
from cost_models.ops import (
    AllToAll,
    Attention,
    Collective,
    Combine,
    CostModel,
    CountExchange,
    DenseMlp,
    Experts,
    Gate,
    Gemm,
    HostToDevice,
    Launch,
    MemoryCopy,
    Mla,
    MlaProjection,
    Operation,
    Permute,
    Regroup,
    Route,
    TokenExchange,
    WeightTransfer,
)
from cost_models.profile import Curve, LinearFit, Profile
from cost_models.roofline import Roofline
from cost_models.traffic import Traffic
from traces.errors import InputError

RANKS = 2
PASSED_ON = "TokenExchange between nodes"

# Each operation at sizes X: tokens, rows or bytes.
OPERATIONS: dict[str, Callable[[Any], Operation]] = {
    "Gate": lambda size_X: Gate(tokens_X=size_X, hidden=64, experts=8),
    "Route": lambda size_X: Route(tokens_X=size_X, width=2, parts=("top_p", "capacity probs", "replicas")),
    "Permute": lambda size_X: Permute(pairs_X=size_X * 2, rows_X=size_X, row_bytes=128),
    "Regroup": lambda size_X: Regroup(rows_X=size_X, segments=8, row_bytes=128),
    "Experts": lambda size_X: Experts(
        rows_XS=size_X[..., None] * np.array([1, 0, 2]),
        hidden=64,
        expert_hidden=32,
        matrices=3,
        weight_bytes=2,
        row_bytes=128,
    ),
    "DenseMlp": lambda size_X: DenseMlp(
        rows_X=size_X, hidden=64, mlp_hidden=32, matrices=3, weight_bytes=2, row_bytes=128
    ),
    "Combine": lambda size_X: Combine(rows_X=size_X * 2, tokens_X=size_X, row_bytes=128),
    "MemoryCopy": lambda size_X: MemoryCopy(bytes_X=size_X),
    "AllToAll": lambda size_X: AllToAll(bytes_XGG=size_X[..., None, None] * np.array([[5, 1], [2, 5]])),
    "WeightTransfer": lambda size_X: WeightTransfer(bytes_XGG=size_X[..., None, None] * np.array([[5, 1], [2, 5]])),
    "CountExchange": lambda size_X: CountExchange(bytes_XGG=size_X[..., None, None] * np.array([[5, 1], [2, 5]])),
    "TokenExchange": lambda size_X: TokenExchange(
        tokens_X=size_X,
        hidden=64,
        top_k=2,
        experts=8,
        ranks_X=np.array(RANKS),
        nodes_X=np.array(1),
        direction="dispatch",
        mode="normal",
        traffic=Traffic.of(size_X[..., None, None] * np.array([[2, 1], [1, 2]])),
    ),
    # Ranks 0, 1 and 2, 3 are nodes; a token goes to a node once and is passed on inside it.
    PASSED_ON: lambda size_X: TokenExchange(
        tokens_X=size_X,
        hidden=64,
        top_k=2,
        experts=8,
        ranks_X=np.array(4),
        nodes_X=np.array(2),
        direction="combine",
        mode="normal",
        dtype="fp8",
        traffic=Traffic.of(
            size_X[..., None, None] * np.array([[2, 1, 1, 2], [1, 2, 0, 1], [3, 1, 1, 0], [1, 1, 2, 2]]),
            nodes=2,
            node_rows_XGN=size_X[..., None, None] * np.array([[2, 2], [2, 1], [3, 1], [2, 3]]),
        ),
    ),
    "Collective": lambda size_X: Collective(kind="all_reduce", bytes_X=1000 * size_X, ranks_X=np.array(RANKS)),
    "Gemm": lambda size_X: Gemm(rows_X=size_X, columns_X=1024, inner_X=1024),
    "Attention": lambda size_X: Attention(
        batch_X=size_X, new_tokens_X=1, cached_tokens_X=100, heads_X=8, kv_heads_X=8, head_dim=128, phase="decode"
    ),
    "Mla": lambda size_X: Mla(
        batch_X=size_X, new_tokens_X=1, cached_tokens_X=100, heads_X=16, phase="decode", part="kernel"
    ),
    "MlaProjection": lambda size_X: MlaProjection(rows_X=size_X, heads_X=16, step="pre"),
    "HostToDevice": lambda size_X: HostToDevice(bytes_X=size_X),
    "Launch": lambda size_X: Launch(kernels_X=size_X),
}


def _calibrated() -> Calibrated:
    curve = Curve(bytes=[10, 1000, 100_000], seconds=[1e-5, 2e-5, 9e-4])
    linear = {}
    for kind in LINEAR:
        operation = OPERATIONS[kind.__name__](np.array(1))
        coefficients = dict.fromkeys(features(operation), 1e-8)
        linear[kind.__name__] = LinearFit(
            shape=shape_of(operation), coefficients=coefficients, largest=dict.fromkeys(coefficients, 1e4)
        )
    return Calibrated(
        Profile(
            device="cpu",
            device_name="test box",
            ranks=RANKS,
            linear=linear,
            curves={"MemoryCopy": curve, "AllToAll": curve},
            errors={},
            probe_s=(1, 1),
            load_average=0,
        )
    )


H100S = gpu_cluster(DEVICES["h100_sxm"], RANKS)
MODELS: dict[str, CostModel] = {
    "roofline": Roofline(H100S),
    "calibrated": _calibrated(),
    "kernels": KernelCosts.shipped(H100S, "trtllm", "nccl"),
}
TWO_NODES = gpu_cluster(replace(DEVICES["h100_sxm"], ranks_per_node=2), 4)
# Models of more than one node, and what they are asked for: nothing but exchanges is told nodes apart.
BETWEEN_NODES: dict[str, CostModel] = {
    "roofline between nodes": Roofline(TWO_NODES),
    "kernels between nodes": KernelCosts.shipped(TWO_NODES, "sglang"),
}
# What a model has nothing for, which it must say; a datasheet does have a launch, but none that costs anything.
REFUSED = {"calibrated": ("Collective", "Gemm", "Attention", "Mla", "MlaProjection", "HostToDevice", "Launch")}
FREE = {("roofline", "Launch")}
# The residual of measured kernels may step down where another of its features does, by no more than this share.
FALL = {"roofline": 0.0, "calibrated": 0.0, "kernels": 0.2}

PRICED = [
    (model, name)
    for model in MODELS
    for name in OPERATIONS
    if name not in (*REFUSED.get(model, ()), PASSED_ON) and (model, name) not in FREE
] + [(model, PASSED_ON) for model in BETWEEN_NODES]
PRICING = MODELS | BETWEEN_NODES
every_price = pytest.mark.parametrize(("model", "name"), PRICED)
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def test_every_operation_is_under_this_contract() -> None:
    assert {type(make(np.array(1))) for make in OPERATIONS.values()} == set(Operation.__args__)


@every_price
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1, 4)], ids=str)
def test_predictions_have_the_shape_of_the_sizes(model: str, name: str, shape: tuple[int, ...]) -> None:
    sizes_X = np.arange(1, 1 + int(np.prod(shape))).reshape(shape)
    prediction = PRICING[model].predict(OPERATIONS[name](sizes_X))
    assert np.shape(prediction.seconds_X) == np.shape(prediction.extrapolated_X) == shape
    assert np.isfinite(prediction.seconds_X).all()
    assert (np.asarray(prediction.seconds_X) > 0).all()
    if prediction.low_s_X is not None:
        assert prediction.high_s_X is not None
        assert np.shape(prediction.low_s_X) == np.shape(prediction.high_s_X) == shape
        assert (prediction.low_s_X <= prediction.seconds_X).all()
        assert (prediction.seconds_X <= prediction.high_s_X).all()


@every_price
def test_an_array_costs_what_its_elements_do(model: str, name: str) -> None:
    size_X = np.array([[1, 7, 7000], [250, 0, 33]])
    costs, operation = PRICING[model], OPERATIONS[name]
    each_X = [[float(costs.seconds(operation(np.array(size)))) for size in row] for row in size_X.tolist()]
    np.testing.assert_allclose(costs.seconds(operation(size_X)), each_X, rtol=1e-9)


@every_price
def test_more_never_takes_less(model: str, name: str) -> None:
    costs, operation = PRICING[model], OPERATIONS[name]
    seconds_X = costs.seconds(operation(np.arange(0, 4000)))
    assert (seconds_X >= (1 - FALL[model.split()[0]]) * np.maximum.accumulate(seconds_X)).all()
    assert seconds_X[-1] > seconds_X[0] >= 0
    far_X = costs.seconds(operation(np.array([10**6, 10**9])))
    assert far_X[1] > far_X[0] > seconds_X[-1]


@every_price
def test_an_operation_is_left_as_it_was(model: str, name: str) -> None:
    given = OPERATIONS[name](np.array([3, 5]))
    before = str(given)
    first, second = PRICING[model].seconds(given), PRICING[model].seconds(given)
    np.testing.assert_array_equal(first, second)
    assert str(given) == before


@pytest.mark.parametrize(("model", "name"), [(model, name) for model, names in REFUSED.items() for name in names])
def test_what_a_model_has_nothing_for_it_refuses(model: str, name: str) -> None:
    with pytest.raises(InputError, match=f"has no {name}; it has "):
        MODELS[model].predict(OPERATIONS[name](np.array(1)))


def test_a_datasheet_knows_no_launch() -> None:
    assert MODELS["roofline"].seconds(Launch(kernels_X=np.array([1, 5]))).tolist() == [0, 0]


@every_model
def test_more_active_experts_take_longer_for_the_same_rows(model: CostModel) -> None:
    def experts(rows_S: list[int]) -> float:
        return float(
            model.seconds(
                Experts(
                    rows_XS=np.array(rows_S),
                    hidden=64,
                    expert_hidden=32,
                    matrices=3,
                    weight_bytes=2,
                    row_bytes=128,
                )
            )
        )

    assert experts([1, 1, 1, 1]) > experts([2, 2, 0, 0]) > experts([4, 0, 0, 0])


@every_model
def test_its_name_is_for_reports(model: CostModel) -> None:
    assert model.name
    assert "\n" not in model.name

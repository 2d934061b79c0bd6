"""What every cost model must hold: positive, monotone, and the same for one operation as for an array of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cost_models.calibrated import LINEAR, Calibrated, features, shape_of
from cost_models.cluster import gpu_cluster
from cost_models.devices import DEVICES
from cost_models.ops import AllToAll, Combine, CostModel, Experts, Gate, MemoryCopy, Operation, Permute, Regroup, Route
from cost_models.profile import Curve, LinearFit, Profile
from cost_models.roofline import Roofline

RANKS = 2

# Each operation at sizes X: tokens, rows or bytes.
OPERATIONS: dict[str, Callable[[Any], Operation]] = {
    "Gate": lambda size_X: Gate(tokens_X=size_X, hidden=64, experts=8),
    "Route": lambda size_X: Route(tokens_X=size_X, width=2, dynamic=True, capacity="probs", replicas=True),
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
    "Combine": lambda size_X: Combine(rows_X=size_X * 2, tokens_X=size_X, row_bytes=128),
    "MemoryCopy": lambda size_X: MemoryCopy(bytes_X=size_X),
    "AllToAll": lambda size_X: AllToAll(bytes_XGG=size_X[..., None, None] * np.array([[5, 1], [2, 5]])),
}


def _calibrated() -> Calibrated:
    curve = Curve(bytes=[10, 1000, 100_000], seconds=[1e-5, 2e-5, 9e-4])
    linear = {}
    for kind in LINEAR:
        operation = OPERATIONS[kind.__name__](np.array(1))
        coefficients = dict.fromkeys(features(operation), 1e-8)
        linear[kind.__name__] = LinearFit(shape=shape_of(operation), coefficients=coefficients)
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


MODELS: dict[str, CostModel] = {
    "roofline": Roofline(gpu_cluster(DEVICES["h100_sxm"], RANKS)),
    "calibrated": _calibrated(),
}

every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
every_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


def test_every_operation_is_under_this_contract() -> None:
    assert {type(make(np.array(1))) for make in OPERATIONS.values()} == set(Operation.__args__)


@every_model
@every_operation
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1, 4)], ids=str)
def test_seconds_have_the_shape_of_the_sizes(
    model: CostModel, operation: Callable[[Any], Operation], shape: tuple[int, ...]
) -> None:
    seconds_X = model.seconds(operation(np.arange(1, 1 + int(np.prod(shape))).reshape(shape)))
    assert np.shape(seconds_X) == shape
    assert np.isfinite(seconds_X).all()
    assert (np.asarray(seconds_X) > 0).all()


@every_model
@every_operation
def test_an_array_costs_what_its_elements_do(model: CostModel, operation: Callable[[Any], Operation]) -> None:
    size_X = np.array([[1, 7, 7000], [250, 0, 33]])
    each_X = [[float(model.seconds(operation(np.array(size)))) for size in row] for row in size_X.tolist()]
    np.testing.assert_allclose(model.seconds(operation(size_X)), each_X, rtol=1e-12)


@every_model
@every_operation
def test_more_never_takes_less(model: CostModel, operation: Callable[[Any], Operation]) -> None:
    seconds_X = model.seconds(operation(np.arange(0, 4000)))
    assert (np.diff(seconds_X) >= 0).all()
    assert seconds_X[-1] > seconds_X[0] >= 0
    far_X = model.seconds(operation(np.array([10**6, 10**9])))
    assert far_X[1] > far_X[0] > seconds_X[-1]


@every_model
@every_operation
def test_an_operation_is_left_as_it_was(model: CostModel, operation: Callable[[Any], Operation]) -> None:
    given = operation(np.array([3, 5]))
    before = str(given)
    first, second = model.seconds(given), model.seconds(given)
    np.testing.assert_array_equal(first, second)
    assert str(given) == before


@every_model
def test_more_active_experts_take_longer_for_the_same_rows(model: CostModel) -> None:
    def experts(rows_S: list[int]) -> float:
        return float(
            model.seconds(
                Experts(
                    rows_XS=np.array(rows_S), hidden=64, expert_hidden=32, matrices=3, weight_bytes=2, row_bytes=128
                )
            )
        )

    assert experts([1, 1, 1, 1]) > experts([2, 2, 0, 0]) > experts([4, 0, 0, 0])


@every_model
def test_its_name_is_for_reports(model: CostModel) -> None:
    assert model.name
    assert "\n" not in model.name

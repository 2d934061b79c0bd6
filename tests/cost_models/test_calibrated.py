"""Calibration: known costs come back from synthetic measurements, and the profile prices no more than it measured."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest

from cost_models.calibrated import LINEAR, Calibrated, curve_bytes, features, read_curve
from cost_models.fit import fit_curve, fit_linear, fit_profile
from cost_models.microbench.benchmark import Measurement
from cost_models.ops import AllToAll, Combine, Experts, Gate, MemoryCopy, Operation, Permute, Regroup, Route
from cost_models.profile import Curve, Profile
from traces.errors import InputError

SIZES = (1, 3, 8, 20, 64, 130, 300, 1000)


def _experts(rows_S: list[int]) -> Experts:
    return Experts(rows_XS=np.array(rows_S), hidden=8, expert_hidden=16, matrices=3, weight_bytes=4, row_bytes=32)


# Cases that tell the features of each operation apart, those at even places alone too: the others are held out.
CASES: dict[type, list[Operation]] = {
    Gate: [Gate(tokens_X=np.array(size), hidden=8, experts=experts) for experts in (2, 4) for size in SIZES],
    Route: [
        Route(tokens_X=np.array(size), width=width, parts=parts)
        for parts in (("top_k",), ("top_p",), ("top_k", "capacity probs"), ("top_p", "replicas"))
        for size, width in ((16, 1), (100, 2), (64, 4), (512, 1), (512, 4), (128, 2), (2048, 4), (700, 1))
    ],
    Permute: [
        Permute(pairs_X=np.array(size), rows_X=np.array(size * share // 4), row_bytes=32)
        for share, size in product((1, 2, 4), SIZES)
    ],
    Regroup: [
        Regroup(rows_X=np.array(size), segments=segments, row_bytes=32) for segments, size in product((2, 8), SIZES)
    ],
    Experts: [_experts([size] * slots) for slots, size in product((1, 2, 5), SIZES)]
    + [_experts([size, 0, 2 * size]) for size in SIZES],
    Combine: [
        Combine(rows_X=np.array(size * k), tokens_X=np.array(size), row_bytes=32) for k, size in product((1, 4), SIZES)
    ],
}
OTHERS: dict[type, Operation] = {
    Gate: Gate(tokens_X=np.array([77, 5000]), hidden=8, experts=3),
    Route: Route(tokens_X=np.array([77, 5000]), width=3, parts=("top_p", "capacity probs", "replicas")),
    Permute: Permute(pairs_X=np.array([77, 5000]), rows_X=np.array([60, 10]), row_bytes=32),
    Regroup: Regroup(rows_X=np.array([77, 5000]), segments=5, row_bytes=32),
    Experts: _experts([[7, 0, 0, 100], [400, 400, 0, 1]]),  # type: ignore[list-item]
    Combine: Combine(rows_X=np.array([77, 5000]), tokens_X=np.array([70, 700]), row_bytes=32),
}


def priced(operation: Operation, coefficients: dict[str, float]) -> Any:
    return sum(coefficients[name] * value for name, value in features(operation).items())


def measurements_of(kind: type, seconds: Callable[[Operation], float]) -> list[Measurement]:
    return [
        Measurement(operation=case, seconds=float(seconds(case)), repeats=1, held_out=index % 2 == 1)
        for index, case in enumerate(CASES[kind])
    ]


def profile_of(measurements: list[Measurement], *, ranks: int = 2) -> Profile:
    return fit_profile(
        measurements, device="cpu", device_name="test box", ranks=ranks, probe_s=(1.0, 1.1), load_average=0.5
    )


def copy_profile(bytes_: list[float], seconds: list[float]) -> Profile:
    return profile_of([]).model_copy(update={"curves": {"MemoryCopy": Curve(bytes=bytes_, seconds=seconds)}})


def test_every_linear_operation_is_under_test() -> None:
    assert set(CASES) == set(OTHERS) == set(LINEAR)


@pytest.mark.parametrize("kind", LINEAR, ids=lambda kind: kind.__name__)
def test_known_coefficients_come_back(kind: type) -> None:
    names = list(dict.fromkeys(name for case in CASES[kind] for name in features(case)))
    # A call costs 1 ms, the rest from 1 to 2 ns, so every feature matters somewhere.
    known = {name: 1e-9 * (1 + index / len(names)) for index, name in enumerate(names)}
    known |= {name: 1e-6 for name in names if name.endswith("call")}
    fitted = fit_linear(measurements_of(kind, lambda case: priced(case, known)))
    assert fitted.coefficients == pytest.approx(known, rel=1e-6)
    model = Calibrated(profile_of(measurements_of(kind, lambda case: priced(case, known))))
    np.testing.assert_allclose(model.seconds(OTHERS[kind]), priced(OTHERS[kind], known), rtol=1e-6)


def test_features_of_experts_by_hand() -> None:
    # Slots of 0, 5, 20 and 200 rows: 3 active; 5 + 16 + 16 and 5 + 20 + 128 of the first 16 and 128.
    values = {name: float(value) for name, value in features(_experts([0, 5, 20, 200])).items()}
    assert values == {"call": 1, "active expert": 3, "row": 225, "first 16 rows": 37, "first 128 rows": 153}


def test_coefficients_are_never_negative() -> None:
    # The more tokens the faster, which no fit may believe: a plain least-squares slope is below zero here.
    falling = measurements_of(Gate, lambda case: 1.0 - float(case.tokens_X) / 1e4)  # type: ignore[union-attr]
    coefficients = fit_linear(falling).coefficients
    assert coefficients["token"] == coefficients["score"] == 0
    assert coefficients["call"] > 0


def test_held_out_sizes_are_scored_but_not_fitted() -> None:
    def seconds(case: Operation) -> float:
        return 1e-3 + 1e-6 * float(case.tokens_X)  # type: ignore[union-attr]

    exact = measurements_of(Gate, seconds)
    assert profile_of(exact).errors["Gate"].mape == pytest.approx(0, abs=1e-9)
    # Held-out sizes that took twice as long: the same fit, |predicted / measured - 1| = 1/2 on all of them …
    doubled = [
        Measurement(operation=m.operation, seconds=m.seconds * (2 if m.held_out else 1), repeats=1, held_out=m.held_out)
        for m in exact
    ]
    profile = profile_of(doubled)
    assert profile.linear == profile_of(exact).linear
    assert profile.errors["Gate"].mape == pytest.approx(0.5)
    assert profile.errors["Gate"].median_ape == pytest.approx(0.5)
    assert profile.errors["Gate"].cases == len(CASES[Gate]) // 2
    # … and one that took four times as long, of 8: mean |error| = .75 / 8, median 0.
    held_out = [index for index, m in enumerate(exact) if m.held_out]
    one = [
        Measurement(
            operation=m.operation,
            seconds=m.seconds * (4 if index == held_out[0] else 1),
            repeats=1,
            held_out=m.held_out,
        )
        for index, m in enumerate(exact)
    ]
    error = profile_of(one).errors["Gate"]
    assert (error.mape, error.median_ape) == (pytest.approx(0.75 / 8), pytest.approx(0, abs=1e-9))


def test_the_error_of_a_profile_weighs_every_size_alike() -> None:
    gate = measurements_of(Gate, lambda case: 1.0)
    permute = measurements_of(Permute, lambda case: 1.0)
    profile = profile_of([*gate, *permute])
    sizes = {name: error.cases for name, error in profile.errors.items()}
    assert sizes == {"Gate": 8, "Permute": 12}
    expected = (8 * profile.errors["Gate"].mape + 12 * profile.errors["Permute"].mape) / 20
    assert profile.mape == pytest.approx(expected)


def test_a_curve_interpolates_on_logarithmic_axes() -> None:
    model = Calibrated(copy_profile([100, 10_000], [1, 4]))
    # 1000 is half-way from 100 to 10000 in powers of ten, and 2 half-way from 1 to 4.
    for size, seconds in ((100, 1), (1000, 2), (10_000, 4)):
        assert model.seconds(MemoryCopy(bytes_X=np.array(size))) == pytest.approx(seconds)


def test_beyond_its_ends_a_curve_is_flat_below_and_in_proportion_above() -> None:
    curve = Curve(bytes=[100, 10_000], seconds=[1, 4])
    np.testing.assert_allclose(read_curve(curve, np.array([0.0, 1, 99, 20_000, 1e6])), [1, 1, 1, 8, 400])


def test_a_curve_goes_through_its_measurements_made_monotone() -> None:
    # 2 s at 20 bytes and 1 s at 40 cannot both be: their geometric mean, sqrt(2), stands for both.
    seconds = {10: 1.0, 20: 2.0, 40: 1.0, 80: 8.0}
    cases = [
        Measurement(operation=MemoryCopy(bytes_X=np.array(size)), seconds=s, repeats=1, held_out=False)
        for size, s in seconds.items()
    ]
    curve = fit_curve(cases)
    assert curve.bytes == [10, 20, 40, 80]
    np.testing.assert_allclose(curve.seconds, [1, np.sqrt(2), np.sqrt(2), 8])


def test_the_size_of_an_all_to_all_is_that_of_its_busiest_rank() -> None:
    # Rank 0 sends 30 and receives 10, rank 1 sends 10 and receives 30; the diagonal stays at home.
    exchange = AllToAll(bytes_XGG=np.array([[99, 30], [10, 99]]))
    assert curve_bytes(exchange, full_duplex=True) == 30
    assert curve_bytes(exchange, full_duplex=False) == 20
    assert exchange.bytes_XGG.tolist() == [[99, 30], [10, 99]]  # and the operation is left as it was


def _exchanges(seconds: Callable[[float, float], float]) -> list[Measurement]:
    """Even and uneven exchanges of two ranks; `seconds(sent, received)` of rank 0."""
    pairs = [(size, size) for size in (10, 20, 40, 80, 160)] + [(100, 20), (30, 150), (60, 20)]
    return [
        Measurement(
            operation=AllToAll(bytes_XGG=np.array([[5, sent], [received, 5]])),
            seconds=seconds(sent, received),
            repeats=1,
            held_out=False,
        )
        for sent, received in pairs
    ]


def test_a_link_shows_whether_it_sends_while_it_receives() -> None:
    assert fit_curve(_exchanges(lambda sent, received: max(sent, received))).full_duplex
    assert not fit_curve(_exchanges(lambda sent, received: (sent + received) / 2)).full_duplex


def test_another_width_needs_another_calibration() -> None:
    model = Calibrated(profile_of(measurements_of(Gate, lambda case: 1.0)))
    with pytest.raises(InputError) as refused:
        model.seconds(Gate(tokens_X=np.array(1), hidden=9, experts=4))
    assert str(refused.value) == (
        "profile of test box was measured for Gate of {'hidden': 8.0}, "
        "the model has {'hidden': 9}; calibrate for this model or price it on the datasheet"
    )


def test_another_number_of_ranks_needs_another_calibration() -> None:
    model = Calibrated(profile_of([*_exchanges(max), _held_out_exchange()]))
    assert model.seconds(AllToAll(bytes_XGG=np.zeros((3, 2, 2)))).shape == (3,)
    with pytest.raises(InputError) as refused:
        model.seconds(AllToAll(bytes_XGG=np.zeros((3, 3))))
    assert str(refused.value) == (
        "profile of test box was measured on 2 ranks, the cluster has 3; calibrate on as many"
    )


def _held_out_exchange() -> Measurement:
    return Measurement(operation=AllToAll(bytes_XGG=np.full((2, 2), 50)), seconds=50.0, repeats=1, held_out=True)


@pytest.mark.parametrize(
    "operation", [*OTHERS.values(), MemoryCopy(bytes_X=np.array(1)), AllToAll(bytes_XGG=np.zeros((2, 2)))]
)
def test_what_was_not_measured_is_not_priced(operation: Operation) -> None:
    name = type(operation).__name__
    with pytest.raises(InputError) as refused:
        Calibrated(profile_of([])).seconds(operation)
    assert str(refused.value) == f"profile of test box has no {name}; it has nothing; run moeroute calibrate"


def test_one_rank_alone_can_be_calibrated() -> None:
    """Its all-to-all moves nothing to other ranks: every size is 0 bytes."""
    alone = [
        Measurement(operation=AllToAll(bytes_XGG=np.array([[size]])), seconds=2e-4, repeats=1, held_out=index % 2 == 1)
        for index, size in enumerate((4, 8, 16, 32))
    ]
    model = Calibrated(profile_of(alone, ranks=1))
    assert model.seconds(AllToAll(bytes_XGG=np.array([[8]]))) == pytest.approx(2e-4)


def test_its_name_says_where_the_figures_are_from() -> None:
    assert Calibrated(profile_of([])).name == "calibrated on test box"

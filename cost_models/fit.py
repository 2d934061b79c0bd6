"""Fitting a profile to measurements: every other size is fitted, the rest say how far to trust it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
from scipy.optimize import isotonic_regression, nnls

from cost_models.calibrated import LINEAR, Calibrated, curve_bytes, features, read_curve, shape_of
from cost_models.intervals import fit_spread
from cost_models.microbench.benchmark import Measurement
from cost_models.ops import AllToAll, MemoryCopy, Operation
from cost_models.profile import Curve, FitError, LinearFit, Point, Profile


def fit_profile(
    measurements: Sequence[Measurement],
    *,
    device: str,
    device_name: str,
    ranks: int,
    probe_s: tuple[float, float],
    load_average: float,
) -> Profile:
    """Fit each operation to its measurements that are not held out; score it on those that are."""
    by_operation: dict[type, list[Measurement]] = defaultdict(list)
    for measurement in measurements:
        by_operation[type(measurement.operation)].append(measurement)
    fitted = {kind: [m for m in cases if not m.held_out] for kind, cases in by_operation.items()}
    profile = Profile(
        device=device,
        device_name=device_name,
        ranks=ranks,
        linear={kind.__name__: fit_linear(cases) for kind, cases in fitted.items() if kind in LINEAR},
        curves={kind.__name__: fit_curve(cases) for kind, cases in fitted.items() if kind not in LINEAR},
        errors={},
        points={},
        probe_s=probe_s,
        load_average=load_average,
    )
    model = Calibrated(profile)
    points = {kind.__name__: [_point(model, case) for case in cases] for kind, cases in by_operation.items()}
    errors = {name: _error([point for point in some if point.held_out]) for name, some in points.items()}
    return profile.model_copy(update={"errors": errors, "points": points})


def _point(model: Calibrated, case: Measurement) -> Point:
    predicted_s = float(model.seconds(case.operation))
    return Point(
        label=size_label(case.operation), measured_s=case.seconds, predicted_s=predicted_s, held_out=case.held_out
    )


def size_label(operation: Operation) -> str:
    """The sizes of a scalar operation in a few words.

    >>> size_label(MemoryCopy(bytes_X=np.array(4096)))
    'bytes 4096'
    """
    sizes = {
        field.name.rpartition("_")[0]: np.asarray(getattr(operation, field.name))
        for field in fields(operation)
        if field.name.endswith(("_X", "_XS", "_XGG")) and getattr(operation, field.name) is not None
    }
    return ", ".join(f"{name} {int(size.sum())}" for name, size in sizes.items())


def _error(held_out: Sequence[Point]) -> FitError:
    measured_N = np.array([point.measured_s for point in held_out])
    predicted_N = np.array([point.predicted_s for point in held_out])
    errors = np.abs(predicted_N / measured_N - 1)
    spread = fit_spread(predicted_N, measured_N, np.zeros(len(held_out), dtype=np.int64))
    return FitError(
        mape=float(errors.mean()),
        median_ape=float(np.median(errors)),
        cases=len(held_out),
        low=min(spread.low),
        high=max(spread.high),
    )


def fit_linear(cases: Sequence[Measurement]) -> LinearFit:
    """Non-negative coefficients that make the relative errors of `cases` small (least squares)."""
    rows = [features(case.operation) for case in cases]
    names = list(dict.fromkeys(name for row in rows for name in row))
    matrix = np.array([[float(row.get(name, 0.0)) for name in names] for row in rows])
    seconds = np.array([case.seconds for case in cases])
    relative = matrix / seconds[:, None]
    scale = np.maximum(np.abs(relative).max(axis=0), 1e-300)  # features differ by orders of magnitude
    solution, _ = nnls(relative / scale, np.ones(len(cases)))
    coefficients = dict(zip(names, (solution / scale).tolist(), strict=True))
    largest = dict(zip(names, matrix.max(axis=0).tolist(), strict=True))
    return LinearFit(shape=shape_of(cases[0].operation), coefficients=coefficients, largest=largest)


def fit_curve(cases: Sequence[Measurement]) -> Curve:
    """Measured times in order of size, made monotone, size counted in the way that leaves them smoothest."""
    curves = [_monotone_curve(cases, full_duplex=full_duplex) for full_duplex in (True, False)]
    return min(curves, key=lambda curve: _log_error(curve, cases))


def _monotone_curve(cases: Sequence[Measurement], *, full_duplex: bool) -> Curve:
    by_bytes: dict[float, list[float]] = defaultdict(list)
    for case in cases:
        assert isinstance(case.operation, MemoryCopy | AllToAll)
        by_bytes[float(curve_bytes(case.operation, full_duplex=full_duplex))].append(case.seconds)
    sizes = sorted(by_bytes)
    log_s = isotonic_regression([float(np.mean(np.log(by_bytes[size]))) for size in sizes]).x
    return Curve(bytes=sizes, seconds=np.exp(log_s).tolist(), full_duplex=full_duplex)


def _log_error(curve: Curve, cases: Sequence[Measurement]) -> float:
    predicted_s = [read_curve(curve, curve_bytes(c.operation, full_duplex=curve.full_duplex)) for c in cases]  # type: ignore[arg-type]
    return float(np.square(np.log(predicted_s) - np.log([case.seconds for case in cases])).sum())

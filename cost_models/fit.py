"""Fitting a profile to measurements: every other size is fitted, the rest say how far to trust it."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from scipy.optimize import isotonic_regression, nnls

from cost_models.calibrated import LINEAR, Calibrated, curve_bytes, features, read_curve, shape_of
from cost_models.microbench.benchmark import Measurement
from cost_models.ops import AllToAll, MemoryCopy
from cost_models.profile import Curve, FitError, LinearFit, Profile


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
        probe_s=probe_s,
        load_average=load_average,
    )
    model = Calibrated(profile)
    errors = {}
    for kind, cases in by_operation.items():
        relative = np.array([model.seconds(m.operation) / m.seconds - 1 for m in cases if m.held_out])
        errors[kind.__name__] = FitError(
            mape=float(np.abs(relative).mean()), median_ape=float(np.median(np.abs(relative))), cases=relative.size
        )
    return profile.model_copy(update={"errors": errors})


def fit_linear(cases: Sequence[Measurement]) -> LinearFit:
    """Non-negative coefficients that make the relative errors of `cases` small (least squares)."""
    rows = [features(case.operation) for case in cases]
    names = list(rows[0])
    matrix = np.array([[float(row[name]) for name in names] for row in rows])
    seconds = np.array([case.seconds for case in cases])
    relative = matrix / seconds[:, None]
    scale = np.maximum(np.abs(relative).max(axis=0), 1e-300)  # features differ by orders of magnitude
    solution, _ = nnls(relative / scale, np.ones(len(cases)))
    coefficients = dict(zip(names, (solution / scale).tolist(), strict=True))
    return LinearFit(shape=shape_of(cases[0].operation), coefficients=coefficients)


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

"""Calibrated: operations priced by what was measured on the device itself.

Work of one rank is a sum of non-negative coefficients times the features below (launch, rows, bytes, …);
copies and collectives, whose bandwidth depends on size, follow the measured curve.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models.kernels.token_traffic import bytes_between_ranks
from cost_models.ops import (
    AllToAll,
    Combine,
    DenseMlp,
    Experts,
    Gate,
    MemoryCopy,
    Operation,
    Permute,
    Prediction,
    Regroup,
    Route,
    TokenExchange,
    busiest_remote_bytes,
)
from cost_models.profile import Curve, Profile
from traces.errors import InputError

Features = Mapping[str, NDArray[np.float64]]


def _gate(op: Gate) -> Features:
    # Scores apart from tokens, so that parts of a model with fewer experts are priced too.
    return {"call": np.ones(np.shape(op.tokens_X)), "token": op.tokens_X, "score": op.tokens_X * op.experts}


def _route(op: Route) -> Features:
    pairs_X = np.asarray(op.tokens_X * op.width, dtype=np.float64)
    features: dict[str, NDArray[np.float64]] = {}
    for part, times in Counter(op.parts).items():
        each = {"call": np.ones_like(pairs_X), "token": op.tokens_X, "pair": pairs_X}
        features |= {f"{part} {name}": times * value_X for name, value_X in each.items()}
    return features


def _permute(op: Permute) -> Features:
    sorting_X = op.pairs_X * np.log2(np.maximum(op.pairs_X, 2))
    return {"call": np.ones(np.shape(op.rows_X)), "sort": sorting_X, "byte": op.rows_X * op.row_bytes}


def _regroup(op: Regroup) -> Features:
    call_X = np.ones(np.shape(op.rows_X))
    return {"call": call_X, "segment": call_X * op.segments, "byte": op.rows_X * op.row_bytes}


def _experts(op: Experts) -> Features:
    rows_XS = np.asarray(op.rows_XS, dtype=np.float64)
    call_X = np.ones(rows_XS.shape[:-1])
    return {
        "call": call_X,
        "active expert": (rows_XS > 0).sum(axis=-1),
        "row": rows_XS.sum(axis=-1),
        # Small products run below full speed: the first rows of each expert cost more than the later ones.
        "first 16 rows": np.minimum(rows_XS, 16).sum(axis=-1),
        "first 128 rows": np.minimum(rows_XS, 128).sum(axis=-1),
    }


def _combine(op: Combine) -> Features:
    return {
        "call": np.ones(np.shape(op.rows_X)),
        "token byte": op.tokens_X * op.row_bytes,
        "row byte": op.rows_X * op.row_bytes,
    }


_FEATURES: dict[type, Callable[[Any], Features]] = {
    Gate: _gate,
    Route: _route,
    Permute: _permute,
    Regroup: _regroup,
    Experts: _experts,
    Combine: _combine,
}
LINEAR = tuple(_FEATURES)


def features(operation: Operation) -> Features:
    """Feature values by name, each of shape X, of an operation with a linear cost."""
    return _FEATURES[type(operation)](operation)


def shape_of(operation: Operation) -> dict[str, float]:
    """The widths that an operation's coefficients hold for; another width needs another calibration."""
    match operation:
        case Gate(hidden=hidden):
            return {"hidden": hidden}
        case Experts():
            widths = np.unique(operation.expert_hidden)
            if widths.size > 1:
                raise InputError(f"a calibration is of experts of one width, these have {widths.tolist()}")
            return {
                "hidden": operation.hidden,
                "expert_hidden": int(widths[0]),
                "matrices": operation.matrices,
                "weight_bytes": operation.weight_bytes,
            }
        case _:
            return {}


def curve_bytes(operation: MemoryCopy | AllToAll, *, full_duplex: bool) -> NDArray[np.float64]:
    """The size that an operation's curve is read at, shape X.

    For an all-to-all: what the busiest rank exchanges with the others, the larger of bytes sent and received if the
    link is `full_duplex`, else their mean.
    """
    if isinstance(operation, MemoryCopy):
        return np.asarray(operation.bytes_X, dtype=np.float64)
    return busiest_remote_bytes(operation.bytes_XGG, full_duplex=full_duplex)


class Calibrated:
    """Prices operations by a fitted profile."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile

    @property
    def name(self) -> str:
        """For reports."""
        return f"calibrated on {self._profile.device_name}"

    @property
    def included(self) -> frozenset[type]:
        """Every operation was measured by itself."""
        return frozenset()

    def seconds(self, operation: Operation) -> NDArray[np.float64]:
        """Seconds for each operation: shape X. `InputError` if the profile does not cover it."""
        return self.predict(operation).seconds_X

    def predict(self, operation: Operation) -> Prediction:
        """Seconds for each operation with the interval of the sizes that were held out: shape X.

        Errors: `InputError` if the profile does not cover the operation.
        """
        operation = _as_measured(operation)
        if isinstance(operation, MemoryCopy | AllToAll):
            seconds_X, extrapolated_X = self._on_curve(operation)
        else:
            seconds_X, extrapolated_X = self._linear(operation)
        error = self._profile.errors.get(_name(operation))
        return Prediction(
            seconds_X=seconds_X,
            low_s_X=None if error is None else seconds_X * error.low,
            high_s_X=None if error is None else seconds_X * error.high,
            extrapolated_X=extrapolated_X,
        )

    def _linear(self, operation: Operation) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        name = _name(operation)
        fitted = self._profile.linear.get(name)
        if fitted is None:
            raise self._no(name)
        if fitted.shape != shape_of(operation):
            raise InputError(
                f"profile of {self._profile.device_name} was measured for {name} of {fitted.shape}, "
                f"the model has {shape_of(operation)}; calibrate for this model or price it on the datasheet"
            )
        values = features(operation)
        missing = values.keys() - fitted.coefficients.keys()
        if missing:
            raise InputError(
                f"profile of {self._profile.device_name} has nothing for {name}: {min(missing)}; calibrate again"
            )
        terms = [fitted.coefficients[feature] * np.asarray(value) for feature, value in values.items()]
        beyond = [np.asarray(value) > fitted.largest[feature] for feature, value in values.items()]
        return np.asarray(sum(terms), dtype=np.float64), np.asarray(np.any(np.broadcast_arrays(*beyond), axis=0))

    def _no(self, name: str) -> InputError:
        known = ", ".join(sorted([*self._profile.linear, *self._profile.curves]))
        return InputError(
            f"profile of {self._profile.device_name} has no {name}; it has {known or 'nothing'}; run moeroute calibrate"
        )

    def _on_curve(self, operation: MemoryCopy | AllToAll) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        name = _name(operation)
        curve = self._profile.curves.get(name)
        if curve is None:
            raise self._no(name)
        if isinstance(operation, AllToAll) and np.shape(operation.bytes_XGG)[-1] != self._profile.ranks:
            raise InputError(
                f"profile of {self._profile.device_name} was measured on {self._profile.ranks} ranks, "
                f"the cluster has {np.shape(operation.bytes_XGG)[-1]}; calibrate on as many"
            )
        bytes_X = curve_bytes(operation, full_duplex=curve.full_duplex)
        return read_curve(curve, bytes_X), np.asarray(bytes_X > curve.bytes[-1])


def _as_measured(operation: Operation) -> Operation:
    """The operation as the microbenchmarks time it: an exchange by its bytes, a dense MLP as an expert of its own."""
    match operation:
        case TokenExchange():
            return AllToAll(bytes_XGG=bytes_between_ranks(operation))
        case DenseMlp():
            return Experts(
                rows_XS=np.asarray(operation.rows_X)[..., None],
                hidden=operation.hidden,
                expert_hidden=operation.mlp_hidden,
                matrices=operation.matrices,
                weight_bytes=operation.weight_bytes,
                row_bytes=operation.row_bytes,
            )
        case _:
            return operation


def _name(operation: Operation) -> str:
    return "AllToAll" if isinstance(operation, AllToAll) else type(operation).__name__


def read_curve(curve: Curve, bytes_X: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interpolate a measured curve on logarithmic axes; beyond its ends, flat below and in proportion above."""
    largest = max(curve.bytes[-1], 1.0)
    log_knots = np.log(np.maximum(curve.bytes, 1.0))  # nothing to send takes as long as a byte
    seconds_X = np.exp(np.interp(np.log(np.clip(bytes_X, 1.0, largest)), log_knots, np.log(curve.seconds)))
    return np.asarray(seconds_X * np.maximum(bytes_X / largest, 1.0))

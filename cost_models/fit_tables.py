"""From measured tables to kernel profiles: fit every part, hold rows out to say how far to trust it."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cost_models.crossval import HeldOut, held_out_predictions, scores, take
from cost_models.description import Description
from cost_models.intervals import coverage, fit_spread
from cost_models.kernel_fit import Fit, fit_kernel
from cost_models.kernel_profile import FittedKernel, HeldOutError, KernelProfile, Sample, Series
from cost_models.tables import Part
from cost_models.units import US
from traces.progress import Progress, quiet

R = TypeVar("R")
Evaluation = tuple[HeldOutError, HeldOut, NDArray[np.int64]]

_FEW_TOKENS = 8  # where simple models fail
_SERIES = 3
_PAIRS = 60
_THREADS = "OMP_NUM_THREADS"


def evaluate_part(part: Part) -> list[Evaluation]:
    """Hold out in each of the part's ways: errors, predictions and folds; the main way first."""
    return _evaluate(part, part.describe(), _suspects(part))


def _suspects(part: Part) -> NDArray[np.bool_]:
    return part.kind.kernel.suspects(part.columns, part.seconds_N, op=part.op)


def _evaluate(part: Part, description: Description, suspect_N: NDArray[np.bool_]) -> list[Evaluation]:
    kernel = part.kind.kernel
    found = []
    for holdout, fold_N in kernel.holdouts(part.columns, op=part.op).items():
        if len(np.unique(fold_N)) < 2:
            continue  # nothing would be left to fit
        held_out = held_out_predictions(
            description, part.seconds_N, fold_N, suspect_N=suspect_N, boosting=kernel.boosting
        )
        error = _error(part, description, holdout, fold_N, held_out, suspect_N)
        found.append((error, held_out, fold_N))
    return found


def can_hold_out(part: Part) -> bool:
    """Whether rows of the part can be held out and others are left to fit: not if it has one shape only."""
    folds = part.kind.kernel.holdouts(part.columns, op=part.op).values()
    return any(len(np.unique(fold_N)) > 1 for fold_N in folds)


def fit_part(part: Part) -> FittedKernel:
    """Fit all sound rows of a part; intervals and errors are those of its held-out rows."""
    description, suspect_N = part.describe(), _suspects(part)
    evaluated = _evaluate(part, description, suspect_N)
    _, held_out, fold_N = evaluated[0]
    sound_N = ~suspect_N
    fit = fit_kernel(take(description, sound_N), part.seconds_N[sound_N], boosting=part.kind.kernel.boosting)
    held_N = (fold_N >= 0) & sound_N
    spread = fit_spread(held_out.predicted_N[held_N], part.seconds_N[held_N], fold_N[held_N])
    return FittedKernel(
        table=part.table,
        kind=part.kind.name,
        framework=part.framework,
        version=part.version,
        op=part.op,
        dtype=part.dtype,
        rows=int(sound_N.sum()),
        prices={stage: _digits_of(terms) for stage, terms in fit.physics.prices.items()},
        overlap=_digits_of(fit.physics.overlap),
        features=list(fit.features),
        sources=list(fit.sources),
        low=[_digits(value, 6) for value in fit.low_F],
        high=[_digits(value, 6) for value in fit.high_F],
        trees=fit.trees.packed(),
        interval_edges_s=[_digits(value, 4) for value in spread.edges_s],
        interval_low=[_digits(value, 4) for value in spread.low],
        interval_high=[_digits(value, 5) for value in spread.high],
        errors=[error for error, _, _ in evaluated],
        sample=_sample(part, fit, description, held_out, held_N),
    )


def errors_of_part(part: Part) -> list[HeldOutError]:
    """The held-out errors of a part, the main way of holding out first."""
    return [error for error, _, _ in evaluate_part(part)]


def fit_profiles(
    parts: Sequence[Part], *, source: str, processes: int = 2, progress: Progress = quiet
) -> list[KernelProfile]:
    """Fit every part of tables, a profile for each GPU and framework; `source` says where the tables are from."""
    by_profile: dict[tuple[str, str], list[FittedKernel]] = {}
    for part, kernel in in_parallel(fit_part, parts, processes, progress):
        by_profile.setdefault((part.device.name, part.framework), []).append(kernel)
    return [
        KernelProfile(gpu=gpu, framework=framework, source=source, kernels=kernels)
        for (gpu, framework), kernels in by_profile.items()
    ]


def in_parallel(
    work: Callable[[Part], R], parts: Sequence[Part], processes: int = 2, progress: Progress = quiet
) -> list[tuple[Part, R]]:
    """Work on parts in several processes, the largest first; results in the order of `parts`."""
    total, done = sum(len(part.seconds_N) for part in parts), 0
    results: dict[int, R] = {}
    # A forked child of a process with threads may hang; a spawned one imports what it needs.
    with _one_thread_each(), ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        largest_first = sorted(range(len(parts)), key=lambda index: -len(parts[index].seconds_N))
        futures = {pool.submit(work, parts[index]): index for index in largest_first}
        for future in as_completed(futures):
            index = futures[future]
            results[index] = future.result()
            done += len(parts[index].seconds_N)
            progress(done / total, f"{parts[index].table} {parts[index].op} {parts[index].dtype}")
    return [(part, results[index]) for index, part in enumerate(parts)]


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Have processes started meanwhile do linear algebra in one thread: more would fight for the same cores."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before


def _error(
    part: Part,
    description: Description,
    holdout: str,
    fold_N: NDArray[np.int64],
    held_out: HeldOut,
    suspect_N: NDArray[np.bool_],
) -> HeldOutError:
    held_N = fold_N >= 0
    sound_N = held_N & ~suspect_N
    seconds_N = part.seconds_N
    bound_N = np.broadcast_to(description.bound_s, seconds_N.shape)
    whole = scores(held_out.predicted_N[held_N], seconds_N[held_N])
    sound = scores(held_out.predicted_N[sound_N], seconds_N[sound_N])
    physics = scores(held_out.physics_N[held_N], seconds_N[held_N])
    roofline = scores(bound_N[held_N], seconds_N[held_N])
    tokens_N = part.kind.kernel.tokens(part.columns)
    few_N = held_N & (tokens_N <= _FEW_TOKENS) if tokens_N is not None else np.zeros_like(held_N)
    few = scores(held_out.predicted_N[few_N], seconds_N[few_N]) if few_N.any() else None
    few_physics = scores(held_out.physics_N[few_N], seconds_N[few_N]) if few_N.any() else None
    return HeldOutError(
        holdout=holdout,
        rows=int(held_N.sum()),
        folds=len(np.unique(fold_N[held_N])),
        mape=_digits(whole.mape, 4),
        median_ape=_digits(whole.median_ape, 4),
        p90_ape=_digits(whole.p90_ape, 4),
        coverage90=_digits(coverage(held_out.predicted_N[held_N], seconds_N[held_N], fold_N[held_N]), 4),
        mape_le8_tokens=None if few is None else _digits(few.mape, 4),
        median_ape_le8_tokens=None if few is None else _digits(few.median_ape, 4),
        physics_mape_le8_tokens=None if few_physics is None else _digits(few_physics.mape, 4),
        suspects=int((held_N & suspect_N).sum()),
        sound_mape=_digits(sound.mape, 4),
        sound_median_ape=_digits(sound.median_ape, 4),
        physics_mape=_digits(physics.mape, 4),
        physics_median_ape=_digits(physics.median_ape, 4),
        roofline_mape=_digits(roofline.mape, 4),
        roofline_median_ape=_digits(roofline.median_ape, 4),
    )


def _sample(part: Part, fit: Fit, description: Description, held_out: HeldOut, held_N: NDArray[np.bool_]) -> Sample:
    generator = np.random.default_rng(0)
    fitted_N = fit.predict(description)[0]
    size = part.kind.size
    by_shape: dict[str, list[int]] = {}
    names = [name for name in part.kind.keys if name != size and len(np.unique(part.columns[name])) > 1]
    for row in range(len(part.seconds_N)):
        label = ", ".join(f"{name} {part.columns[name][row]}" for name in names)
        by_shape.setdefault(label, []).append(row)
    longest = sorted(by_shape, key=lambda label: -len(by_shape[label]))[: max(len(by_shape) // 2, _SERIES)]
    chosen = sorted(generator.permutation(len(longest))[:_SERIES])
    series = []
    for label in (longest[index] for index in chosen):
        rows = sorted(by_shape[label], key=lambda row: float(part.columns[size][row]))
        series.append(
            Series(
                label=label,
                sizes=part.columns[size][rows].tolist(),
                measured_us=_in_us(part.seconds_N[rows]),
                fitted_us=_in_us(fitted_N[rows]),
                held_out_us=[None if np.isnan(p) else _in_us([p])[0] for p in held_out.predicted_N[rows]],
            )
        )
    pairs = generator.permutation(np.flatnonzero(held_N))[:_PAIRS]
    return Sample(
        size=size,
        series=series,
        predicted_us=_in_us(held_out.predicted_N[pairs]),
        measured_us=_in_us(part.seconds_N[pairs]),
    )


def _in_us(seconds: Iterable[float]) -> list[float]:
    """Microseconds; three digits are enough for a plot."""
    return [_digits(value / US, 3) for value in seconds]


def _digits_of(values: Mapping[str, float]) -> dict[str, float]:
    return {name: _digits(value, 6) for name, value in values.items()}


def _digits(value: float, digits: int) -> float:
    """So many digits, no more than are worth their place in a file."""
    return float(f"{value:.{digits}g}")

"""Fits on made-up measurements of a known law: what is found, and what is said beyond it."""

from dataclasses import replace

import numpy as np
import pytest

from cost_models.boosting import Boosting
from cost_models.crossval import held_out_predictions, scores, take
from cost_models.description import Description
from cost_models.kernel_fit import fit_kernel
from cost_models.kernels.base import hashed_folds, leave_one_out
from cost_models.physics import fit_physics
from traces.errors import InputError

BOOSTING = Boosting(trees=60, depth=4)


def law(rows_N: np.ndarray, width_N: np.ndarray) -> tuple[Description, np.ndarray]:
    """5 us to launch, then the larger of computing (at half the datasheet's speed) and reading (at 80%)."""
    compute_s, memory_s = rows_N * width_N * 1e-12, width_N * 1e-9
    seconds_N = 5e-6 + np.maximum(2 * compute_s, 1.25 * memory_s)
    description = Description(
        bound_s=np.maximum(compute_s, memory_s),
        stages={"launch": {"call": np.full(len(rows_N), 1e-6)}, "work": {"compute": compute_s, "memory": memory_s}},
        features={"log rows": np.log2(rows_N), "log width": np.log2(width_N)},
        increasing=frozenset({"log rows"}),
    )
    return description, seconds_N


def grid(rows: int = 12, widths: int = 10) -> tuple[np.ndarray, np.ndarray]:
    row, width = np.meshgrid(2.0 ** np.arange(rows), 1000 * 2.0 ** np.arange(widths))
    return row.ravel(), width.ravel()


def test_physics_finds_the_prices_of_its_law() -> None:
    description, seconds_N = law(*grid())
    physics = fit_physics(description, seconds_N)
    assert abs(physics.prices["launch"]["call"] / 5 - 1) < 0.05
    assert abs(physics.prices["work"]["compute"] / 2 - 1) < 0.05
    assert abs(physics.prices["work"]["memory"] / 1.25 - 1) < 0.1
    assert scores(physics.seconds(description), seconds_N).mape < 0.02


def with_narrow_rows(narrow_N: np.ndarray, price: float) -> tuple[Description, np.ndarray]:
    """The law, where some rows compute in 8 bits: at `price` times their seconds, not at twice."""
    rows_N, width_N = grid()
    compute_s, memory_s = rows_N * width_N * 1e-12, width_N * 1e-9
    seconds_N = 5e-6 + np.maximum(np.where(narrow_N, price, 2) * compute_s, 1.25 * memory_s)
    description, _ = law(rows_N, width_N)
    work = {"compute": compute_s * ~narrow_N, "8-bit compute": compute_s * narrow_N, "memory": memory_s}
    # Of the same name, in another stage: no like.
    other = {"8-bit memory": np.zeros(len(rows_N)), "call": np.full(len(rows_N), 1e-9)}
    return replace(description, stages={**description.stages, "work": work, "other": other}), seconds_N


def test_a_term_that_no_row_has_takes_the_price_of_its_like() -> None:
    rows = len(grid()[0])
    physics = fit_physics(*with_narrow_rows(np.zeros(rows, dtype=bool), 1.0))
    assert abs(physics.prices["work"]["compute"] / 2 - 1) < 0.05
    assert physics.prices["work"]["8-bit compute"] == physics.prices["work"]["compute"]
    turned = fit_physics(*with_narrow_rows(np.ones(rows, dtype=bool), 3.0))
    assert abs(turned.prices["work"]["8-bit compute"] / 3 - 1) < 0.05
    assert turned.prices["work"]["compute"] == turned.prices["work"]["8-bit compute"]
    # Of no like in its own stage, it keeps the price that it started with.
    assert physics.prices["other"]["8-bit memory"] == pytest.approx(1.3)


def test_terms_that_rows_have_keep_prices_of_their_own() -> None:
    physics = fit_physics(*with_narrow_rows(np.arange(len(grid()[0])) % 2 == 0, 1.0))
    assert abs(physics.prices["work"]["compute"] / 2 - 1) < 0.05
    assert abs(physics.prices["work"]["8-bit compute"] - 1) < 0.15


def test_trees_learn_what_physics_leaves() -> None:
    description, seconds_N = law(*grid())
    odd_N = np.isin(description.features["log width"].round(1), [12.0, 14.0, 16.0])  # widths that suit the kernel ill
    seconds_N = seconds_N * np.where(odd_N, 1.3, 1.0)
    fit = fit_kernel(description, seconds_N, boosting=BOOSTING)
    learned, physics = (
        scores(predicted_N, seconds_N).mape
        for predicted_N in (fit.predict(description)[0], fit.physics.seconds(description))
    )
    assert learned < physics / 2


def test_beyond_what_was_seen_the_residual_fades_to_physics() -> None:
    description, seconds_N = law(*grid())
    fit = fit_kernel(description, seconds_N * 1.5 ** (description.features["log rows"] / 11), boosting=BOOSTING)
    far, _ = law(2.0 ** np.array([11.0, 12.0, 15.0, 30.0]), np.full(4, 4000.0))
    seconds_N, beyond_N = fit.predict(far)
    np.testing.assert_allclose(beyond_N, [0, 1, 4, 19], atol=0.01)
    departure_N = np.abs(np.log(seconds_N / fit.physics.seconds(far)))
    np.testing.assert_allclose(departure_N[1:], departure_N[0] * 2.0 ** -np.array([1, 4, 19]), rtol=1e-2)


def test_predictions_have_the_shape_of_the_operations() -> None:
    description, seconds_N = law(*grid())
    fit = fit_kernel(description, seconds_N, boosting=BOOSTING)
    shaped = Description(
        bound_s=description.bound_s.reshape(10, 12),
        stages={s: {t: v.reshape(10, 12) for t, v in terms.items()} for s, terms in description.stages.items()},
        features={name: v.reshape(10, 12) for name, v in description.features.items()},
    )
    np.testing.assert_array_equal(fit.predict(shaped)[0].ravel(), fit.predict(description)[0])


def test_kernels_in_one_fit_are_told_apart() -> None:
    description, seconds_N = law(*grid())
    both = Description(
        bound_s=np.tile(description.bound_s, 2),
        stages={s: {t: np.tile(v, 2) for t, v in terms.items()} for s, terms in description.stages.items()},
        features={name: np.tile(v, 2) for name, v in description.features.items()},
        source=np.repeat(["fast", "slow"], len(seconds_N)),
    )
    fit = fit_kernel(both, np.concatenate([seconds_N, 2 * seconds_N]), boosting=BOOSTING)
    assert fit.sources == ("fast", "slow")
    fast_N, slow_N = fit.predict(both)[0].reshape(2, -1)
    assert abs(np.median(slow_N / fast_N) - 2) < 0.05


def test_a_held_out_row_is_predicted_without_its_fold_and_without_suspects() -> None:
    """Ten times as slow where the fold is 0: a fit of the others cannot know. A suspect spoils nobody's fit."""
    description, seconds_N = law(*grid())
    fold_N = leave_one_out(description.features["log width"]) % 5
    odd_N = np.where(fold_N == 0, 10 * seconds_N, seconds_N)
    nobody = np.zeros(len(seconds_N), dtype=bool)
    blind = held_out_predictions(description, odd_N, fold_N, suspect_N=nobody, boosting=BOOSTING).predicted_N
    np.testing.assert_allclose(blind[fold_N == 0] / seconds_N[fold_N == 0], 1, atol=0.35)
    suspect_N = fold_N == 0
    sound = held_out_predictions(description, odd_N, fold_N, suspect_N=suspect_N, boosting=BOOSTING).predicted_N
    np.testing.assert_allclose(sound[fold_N != 0] / seconds_N[fold_N != 0], 1, atol=0.35)


def test_rows_that_are_never_held_out_have_no_prediction() -> None:
    description, seconds_N = law(*grid())
    fold_N = np.where(np.arange(len(seconds_N)) % 3 == 0, 0, -1)
    held_out = held_out_predictions(
        description, seconds_N, fold_N, suspect_N=np.zeros(len(seconds_N), dtype=bool), boosting=BOOSTING
    )
    np.testing.assert_array_equal(np.isnan(held_out.predicted_N), fold_N < 0)


def test_scores_by_hand() -> None:
    """Off by 10, 20 and 60%: mean 30, median 20, and four fifths of the way from 20 to 60 at the 90th percentile."""
    found = scores(np.array([1.1, 0.8, 1.6]), np.ones(3))
    np.testing.assert_allclose([found.mape, found.median_ape, found.p90_ape], [0.3, 0.2, 0.52])


def test_folds_are_whole_groups() -> None:
    columns = {"n": np.repeat(np.arange(50), 4), "k": np.tile([1, 2, 3, 4], 50)}
    fold_N = hashed_folds(columns, ["n"])
    assert set(fold_N.tolist()) == {0, 1, 2, 3, 4}
    assert all(len(set(fold_N[columns["n"] == n].tolist())) == 1 for n in range(50))


def test_taking_rows_keeps_their_operations() -> None:
    description, _ = law(*grid())
    some = take(description, np.arange(120) % 2 == 1)
    np.testing.assert_array_equal(some.features["log rows"], description.features["log rows"][1::2])
    assert some.increasing == description.increasing


def test_a_fit_of_another_description_is_refused() -> None:
    description, seconds_N = law(*grid())
    fit = fit_kernel(description, seconds_N, boosting=BOOSTING)
    with pytest.raises(InputError, match="as another version of moeroute describes it; fit its profile again"):
        fit.predict(replace(description, features={"log rows": description.features["log rows"]}))
    with pytest.raises(InputError, match="fit its profile again"):
        fit.predict(replace(description, stages={**description.stages, "more": description.stages["launch"]}))


def test_a_term_that_no_row_had_keeps_a_plausible_price() -> None:
    """What a table holds no trace of, another kernel's launch say, costs 1.3 times its own seconds."""
    description, seconds_N = law(*grid())
    zero_N = np.zeros(len(seconds_N))
    fit = fit_kernel(
        replace(description, stages={**description.stages, "other": {"call": zero_N}}), seconds_N, boosting=BOOSTING
    )
    assert abs(fit.physics.prices["other"]["call"] - 1.3) < 1e-6
    without = fit.predict(replace(description, stages={**description.stages, "other": {"call": zero_N}}))[0]
    with_it = fit.predict(replace(description, stages={**description.stages, "other": {"call": zero_N + 1e-5}}))[0]
    assert (with_it > without).all()
    assert with_it.max() < without.max() + 2e-5

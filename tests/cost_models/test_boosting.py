"""Symmetric trees: by hand, grown, and through a file."""

import numpy as np
import pytest

from cost_models.boosting import Boosting, Trees, grow
from traces.errors import InputError

# One tree over two features: is the first above 1 (lowest bit), is the second above 10 (highest bit)?
BY_HAND = Trees(
    borders_F=(np.array([0.0, 1.0], dtype=np.float32), np.array([10.0], dtype=np.float32)),
    feature_RP=np.array([[0, 1]], dtype=np.uint8),
    border_RP=np.array([[1, 0]], dtype=np.uint8),
    leaves_RV=np.array([[1, 2, 3, 4]], dtype=np.int8),
    unit_R=np.array([0.5], dtype=np.float16),
    bias=100.0,
)


def features(*rows: tuple[float, float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32).T.copy()


def test_a_leaf_is_the_number_of_its_answers() -> None:
    predicted_N = BY_HAND.predict(features((0.5, 0), (1, 10), (2, 0), (0, 11), (2, 11)))
    assert predicted_N.tolist() == [100.5, 100.5, 101.0, 101.5, 102.0]


def test_long_inputs_are_read_in_blocks() -> None:
    row = np.arange(5000)
    predicted_N = BY_HAND.predict(features(*zip((row % 3).tolist(), (row % 20).tolist(), strict=True)))
    expected_N = 100 + 0.5 * (1 + (row % 3 > 1) + 2 * (row % 20 > 10))
    np.testing.assert_array_equal(predicted_N, expected_N)


def test_packing_loses_nothing() -> None:
    again = Trees.unpacked(BY_HAND.packed())
    assert again.packed() == BY_HAND.packed()
    for one, other in zip(again.borders_F, BY_HAND.borders_F, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (again.unit_R.tolist(), again.bias) == ([0.5], 100.0)


@pytest.mark.parametrize("text", ["", "not base64!", BY_HAND.packed()[:40]], ids=["empty", "other text", "cut off"])
def test_damaged_trees_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"damaged trees in a profile .*; fit it again"):
        Trees.unpacked(text)


def test_grown_trees_find_steps_and_do_not_fall_where_they_must_rise() -> None:
    generator = np.random.default_rng(0)
    features_NF = generator.uniform(0, 8, (4000, 2)).astype(np.float32)
    step_N = np.where(features_NF[:, 0] > 4, 0.2, 0.0) + np.where(features_NF[:, 1] > 2, -0.4, 0.0)
    noisy_N = step_N + generator.normal(0, 0.06, 4000)
    trees = grow(features_NF, noisy_N, increasing=[True, False], settings=Boosting(trees=80, depth=4))
    corners = trees.predict(features((1, 1), (7, 1), (1, 6), (7, 6)))
    np.testing.assert_allclose(corners, [0, 0.2, -0.4, -0.2], atol=0.03)
    rising_N = np.linspace(0, 8, 200, dtype=np.float32)
    for other in (1.0, 6.0):
        path_N = trees.predict(np.stack([rising_N, np.full(200, other, dtype=np.float32)]))
        assert (np.diff(path_N) >= 0).all()


def test_growing_twice_gives_the_same_trees() -> None:
    features_NF = np.arange(400, dtype=np.float32).reshape(200, 2)
    target_N = np.sin(np.arange(200))
    one, other = (grow(features_NF, target_N, increasing=[False, False], settings=Boosting(trees=5)) for _ in range(2))
    assert one.packed() == other.packed()


def test_rows_that_are_far_off_do_not_blow_a_leaf_up() -> None:
    """A corner where everything takes e times as long: the leaf gets there, not far beyond."""
    features_NF = np.repeat(np.arange(10, dtype=np.float32), 300)[:, None]
    target_N = np.where(features_NF[:, 0] == 9, 1.0, 0.0)
    trees = grow(features_NF, target_N, increasing=[False], settings=Boosting())
    there, elsewhere = trees.predict(np.array([[9, 5]], dtype=np.float32))
    assert 0.8 < there < 1.2
    assert abs(elsewhere) < 0.05

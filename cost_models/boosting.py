"""Gradient boosting of symmetric trees: CatBoost grows them, our compiled loop reads them.

A symmetric tree asks the same question at every node of a level, so a row's leaf is a number made of its answers: no
branches, and small on disk. CatBoost (Prokhorenkova et al., 2018, arXiv:1706.09516) is needed to fit, not to predict.
"""

import base64
import json
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from traces.errors import InputError

_BORDERS = 64  # distinct thresholds a feature; table axes have at most a few dozen values
# Squared up to 10% off, absolute beyond: a few wrong rows must not bend the rest. By plain gradients: CatBoost's Newton
# steps explode where all rows of a leaf are far off. Not plain absolute error: under monotone constraints it then fits
# worse than no trees at all (all seen with 1.2).
_LOSS, _LEAF_METHOD = "Huber:delta=0.1", "Gradient"
_LARGEST_LEAF = 127  # of a byte: what rounding loses is far below what a timing repeats to
_BLOCK = 1024  # rows whose bins fit the first cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Boosting:
    """How to grow: `trees` of `depth` levels, each scaled by `learning_rate`."""

    trees: int = 150
    depth: int = 6
    learning_rate: float = 0.15
    leaf_regularisation: float = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trees:
    """R trees of depth P over F features: leaf values add up, each tree's in a unit of its own.

    `borders_F`: thresholds of each feature, ascending; `feature_RP` and `border_RP` (index into its thresholds) are
    the questions, most significant last; `leaves_RV`, V = 2**P, in units of `unit_R`.
    """

    borders_F: tuple[NDArray[np.float32], ...]
    feature_RP: NDArray[np.uint8]
    border_RP: NDArray[np.uint8]
    leaves_RV: NDArray[np.int8]
    unit_R: NDArray[np.float16]
    bias: float

    def predict(self, features_FN: NDArray[np.float32]) -> NDArray[np.float64]:
        """The sum of leaves for each row, shape [N]."""
        size_F = np.array([len(borders) for borders in self.borders_F])
        borders_FB = np.zeros((len(size_F), max(size_F, default=0)), dtype=np.float32)
        for feature, borders in enumerate(self.borders_F):
            borders_FB[feature, : len(borders)] = borders
        sums_N = np.full(features_FN.shape[1], self.bias, dtype=np.float32)
        leaves_RV = self.leaves_RV.astype(np.float32) * self.unit_R[:, None].astype(np.float32)
        _add_leaves(features_FN, borders_FB, size_F, self.feature_RP, self.border_RP, leaves_RV, sums_N)
        return sums_N.astype(np.float64)

    def packed(self) -> str:
        """Everything as text for a JSON file; `unpacked` reads it back."""
        sizes = np.array([len(borders) for borders in self.borders_F], dtype=np.uint16)
        shape = np.array([*self.feature_RP.shape, len(sizes)], dtype=np.uint16)
        bias = np.array([self.bias], dtype=np.float64)
        parts: list[NDArray[Any]] = [shape, bias, sizes, *self.borders_F, self.unit_R]
        parts += [self.feature_RP, self.border_RP, self.leaves_RV]
        return base64.b64encode(zlib.compress(b"".join(part.tobytes() for part in parts), 9)).decode("ascii")

    @classmethod
    def unpacked(cls, text: str) -> "Trees":
        """Read what `packed` wrote; `InputError` if it is not that."""
        try:
            data = zlib.decompress(base64.b64decode(text, validate=True))
            trees, depth, width = np.frombuffer(data, np.uint16, 3)
            bias = np.frombuffer(data, np.float64, 1, 6)
            sizes = np.frombuffer(data, np.uint16, width, 14)
            start = 14 + 2 * int(width)
            borders_F = []
            for size in sizes:
                borders_F.append(np.frombuffer(data, np.float32, size, start))
                start += 4 * int(size)
            unit_R = np.frombuffer(data, np.float16, int(trees), start)
            start += 2 * int(trees)
            count = int(trees) * int(depth)
            return cls(
                borders_F=tuple(borders_F),
                feature_RP=np.frombuffer(data, np.uint8, count, start).reshape(trees, depth),
                border_RP=np.frombuffer(data, np.uint8, count, start + count).reshape(trees, depth),
                leaves_RV=np.frombuffer(data, np.int8, int(trees) << int(depth), start + 2 * count).reshape(
                    trees, 1 << int(depth)
                ),
                unit_R=unit_R,
                bias=float(bias[0]),
            )
        except (ValueError, zlib.error) as error:
            raise InputError(f"damaged trees in a profile ({error}); fit it again") from error


def grow(
    features_NF: NDArray[np.float32],
    target_N: NDArray[np.float64],
    *,
    increasing: Sequence[bool],
    settings: Boosting,
    threads: int = 1,
) -> Trees:
    """Fit trees to `target_N`, a logarithm of ratios, that never fall along the `increasing` features."""
    try:
        from catboost import CatBoostRegressor
    except ImportError as error:
        raise InputError('fitting tables needs CatBoost: pip install "moeroute[fit]"') from error
    model = CatBoostRegressor(
        iterations=settings.trees,
        depth=settings.depth,
        learning_rate=settings.learning_rate,
        l2_leaf_reg=settings.leaf_regularisation,
        loss_function=_LOSS,
        leaf_estimation_method=_LEAF_METHOD,
        bootstrap_type="Bernoulli",
        subsample=0.8,
        border_count=_BORDERS,
        monotone_constraints=[int(rises) for rises in increasing],
        random_seed=0,
        thread_count=threads,
        allow_writing_files=False,
        verbose=False,
    )
    model.fit(features_NF, target_N)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.json"
        model.save_model(str(path), format="json")
        document = json.loads(path.read_text())
    borders_F = tuple(
        np.array(feature["borders"] or [], dtype=np.float32) for feature in document["features_info"]["float_features"]
    )
    depth = max((len(tree["splits"]) for tree in document["oblivious_trees"]), default=0)
    trees = [tree for tree in document["oblivious_trees"] if tree["splits"]]
    constant = sum(tree["leaf_values"][0] for tree in document["oblivious_trees"] if not tree["splits"])
    feature_RP = np.zeros((len(trees), depth), dtype=np.uint8)
    border_RP = np.full((len(trees), depth), 255, dtype=np.uint8)  # no bin is above: the answer is no
    leaves_RV = np.zeros((len(trees), 1 << depth))
    for row, tree in enumerate(trees):
        for level, split in enumerate(tree["splits"]):
            feature = split["float_feature_index"]
            feature_RP[row, level] = feature
            border_RP[row, level] = np.searchsorted(borders_F[feature], np.float32(split["border"]))
        leaves_RV[row, : len(tree["leaf_values"])] = tree["leaf_values"]
    scale, bias = document["scale_and_bias"]
    leaves_RV *= scale
    unit_R = (np.maximum(np.abs(leaves_RV).max(axis=1, initial=0), 1e-4) / _LARGEST_LEAF).astype(np.float16)
    return Trees(
        borders_F=borders_F,
        feature_RP=feature_RP,
        border_RP=border_RP,
        leaves_RV=np.rint(leaves_RV / unit_R[:, None]).clip(-_LARGEST_LEAF, _LARGEST_LEAF).astype(np.int8),
        unit_R=unit_R,
        bias=float(bias[0]) + scale * constant,
    )


@numba.njit(cache=True)
def _add_leaves(
    features_FN: NDArray[np.float32],
    borders_FB: NDArray[np.float32],
    size_F: NDArray[np.int64],
    feature_RP: NDArray[np.uint8],
    border_RP: NDArray[np.uint8],
    leaves_RV: NDArray[np.float32],
    sums_N: NDArray[np.float32],
) -> None:
    """Add every tree's leaf to `sums_N`, a block of rows at a time, so that loops stay in the cache and vectorise."""
    features, rows = features_FN.shape
    bins_FN = np.empty((features, _BLOCK), dtype=np.uint8)
    leaf_N = np.empty(_BLOCK, dtype=np.uint8)
    for start in range(0, rows, _BLOCK):
        size = min(_BLOCK, rows - start)
        for feature in range(features):
            bins_N = bins_FN[feature]
            values_N = features_FN[feature, start : start + size]
            bins_N[:size] = 0
            for index in range(size_F[feature]):
                border = borders_FB[feature, index]
                for row in range(size):
                    bins_N[row] += np.uint8(values_N[row] > border)
        for tree in range(feature_RP.shape[0]):
            leaf_N[:size] = 0
            for level in range(feature_RP.shape[1]):
                border_index = border_RP[tree, level]
                bins_N = bins_FN[feature_RP[tree, level]]
                bit = np.uint8(1 << level)
                for row in range(size):
                    leaf_N[row] |= bit if bins_N[row] > border_index else np.uint8(0)
            leaves_V = leaves_RV[tree]
            for row in range(size):
                sums_N[start + row] += leaves_V[leaf_N[row]]

"""Stages: a microbatch's step as the ordered stages of its layers, priced.

A compute stage takes each rank its own time. A communication stage is a rendezvous: it starts when the last rank
arrives and ends for all of them at once. What a cost model's kernels do inside others is no stage of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cost_models.ops import CostModel, Operation, Prediction, Route, TokenExchange

Stream = Literal["compute", "communication"]
# Kernels that a stage launches where no graph replays them.
_KERNELS = {"attention": 12, "dense": 4, "gate": 2, "experts": 4, "shared": 4, "head": 2, "sample": 6}  # else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of every layer of a block: `seconds_LG` by layer and rank; all ranks that meet take the same.

    `low_s_LG` and `high_s_LG` are the ends of the cost model's 90% intervals, None where it has none;
    `extrapolated_LG`: priced beyond what was measured, None for nothing. `under_next`: a compute stage that the rank
    runs while the next communication stage, which follows at once, is under way. Of communication stages: `group`
    neighbours meet (0: all ranks); `sms_share` of the multiprocessors is taken from what is computed meanwhile, and
    both run at `pace`, for they share caches and memory; `exchange` is what moves, if tokens do.
    """

    name: str
    stream: Stream
    seconds_LG: NDArray[np.float64]
    under_next: bool = False
    low_s_LG: NDArray[np.float64] | None = None
    high_s_LG: NDArray[np.float64] | None = None
    extrapolated_LG: NDArray[np.bool_] | None = None
    group: int = 0
    sms_share: float = 0.0
    pace: float = 1.0
    exchange: TokenExchange | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Layers of one kind: their stages, and the row of the stages' arrays that each of the layers takes.

    `first_layer`: the number of the first of them in the model, which timelines show.
    """

    stages: tuple[Stage, ...]
    row_of_layer: NDArray[np.int64]
    first_layer: int = 0

    @classmethod
    def of(cls, stages: Sequence[Stage]) -> "Block":
        """Layers that each have a row of their own."""
        return cls(stages=tuple(stages), row_of_layer=np.arange(stages[0].seconds_LG.shape[0]))


Blocks = tuple[Block, ...]


def at_interval_ends(blocks: Blocks) -> tuple[Blocks, Blocks]:
    """The blocks with every time at the low end of its interval, and with every one at the high end."""

    def with_ends(end: Callable[[Stage], NDArray[np.float64] | None]) -> Blocks:
        return tuple(
            replace(
                block,
                stages=tuple(
                    stage if (end_s_LG := end(stage)) is None else replace(stage, seconds_LG=end_s_LG)
                    for stage in block.stages
                ),
            )
            for block in blocks
        )

    return with_ends(lambda stage: stage.low_s_LG), with_ends(lambda stage: stage.high_s_LG)


@dataclass(frozen=True, slots=True)
class Pricing:
    """Makes stages of `layers` rows; without a graph each kernel takes at least `launch_s`."""

    costs: CostModel
    layers: int
    ranks: int
    launch_s: float

    def compute(self, name: str, *operations: Operation) -> list[Stage]:
        """The stage of operations that follow one another; none where others include them all."""
        predictions = self._predict(operations)
        if not predictions:
            return []
        stage = self._stage(name, "compute", predictions)
        if self.launch_s:
            least_s = self.launch_s * _KERNELS.get(name, 1)
            stage = replace(
                stage,
                seconds_LG=np.maximum(stage.seconds_LG, least_s),
                low_s_LG=None if stage.low_s_LG is None else np.maximum(stage.low_s_LG, least_s),
                high_s_LG=None if stage.high_s_LG is None else np.maximum(stage.high_s_LG, least_s),
            )
        return [stage]

    def communicate(self, name: str, *operations: Operation, **details: Any) -> list[Stage]:
        """The same of a rendezvous; `details` are further fields of the stage."""
        predictions = self._predict(operations)
        return [replace(self._stage(name, "communication", predictions), **details)] if predictions else []

    def _predict(self, operations: Sequence[Operation]) -> list[Prediction]:
        return [self.costs.predict(o) for o in operations if not self._is_included(o)]

    def _is_included(self, operation: Operation) -> bool:
        """Whether a kernel does it beside its own work; engines' kernels route by top-k, and by nothing else."""
        if isinstance(operation, Route) and operation.parts != ("top_k",):
            return False
        return type(operation) in self.costs.included

    def _stage(self, name: str, stream: Stream, predictions: Sequence[Prediction]) -> Stage:
        """One stage of operations that follow one another, priced by layer and rank, or by layer for all ranks."""
        prediction = reduce(Prediction.then, predictions)
        shape = (self.layers, self.ranks)
        low_s_X, high_s_X = prediction.low_s_X, prediction.high_s_X
        return Stage(
            name=name,
            stream=stream,
            seconds_LG=_by_rank(prediction.seconds_X, shape),
            low_s_LG=None if low_s_X is None else _by_rank(low_s_X, shape),
            high_s_LG=None if high_s_X is None else _by_rank(high_s_X, shape),
            extrapolated_LG=_by_rank(prediction.extrapolated_X, shape),
        )


def _by_rank(value_X: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    return np.broadcast_to(value_X[:, None] if value_X.ndim == 1 else value_X, shape)


def once(value_G: NDArray[Any]) -> NDArray[Any]:
    """[1, G], or [1, 1] where all ranks have the same, so that it is priced once."""
    return value_G[None, :1] if (value_G == value_G[0]).all() else value_G[None]

"""Program: the one order in which every rank issues the stages of a step, on two streams. Both simulators run it.

A lane is a microbatch. Two lanes take turns, a segment each: what is computed up to a communication stage, and that
stage. So one lane computes while the other communicates, and all ranks meet at collectives in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sim.stages import Blocks, Stage, Stream

STREAMS: tuple[Stream, ...] = ("compute", "communication")


@dataclass(frozen=True, kw_only=True)  # no slots: counts are made once and kept
class Program:
    """O operations in order; each is a stage of one layer and lane.

    `seconds_OG` by rank; `stage_O` the stage of each and `row_O` its row there; `stream_O` 0 compute, 1 communication.
    `beside_O`: a compute operation that starts when its rank comes to the collective just before it in its lane, and
    runs while that is under way. `group_O`: so many neighbours meet (compute: 0). `sms_O`: the share of multiprocessors
    that a communication operation takes from what is computed meanwhile; `pace_O`: the pace at which both then run, for
    they share caches and memory. `after_O`: of a compute operation, the collective that must have ended before it (-1:
    none); `feed_O`: of a collective, how many compute operations must be done before it.
    """

    stages: tuple[Stage, ...]
    lanes: int
    stage_O: NDArray[np.int64]
    row_O: NDArray[np.int64]
    layer_O: NDArray[np.int64]
    lane_O: NDArray[np.int64]
    stream_O: NDArray[np.int64]
    beside_O: NDArray[np.bool_]
    group_O: NDArray[np.int64]
    sms_O: NDArray[np.float64]
    pace_O: NDArray[np.float64]
    after_O: NDArray[np.int64]
    feed_O: NDArray[np.int64]
    seconds_OG: NDArray[np.float64]

    @property
    def ranks(self) -> int:
        """G."""
        return int(self.seconds_OG.shape[1])

    @property
    def operations(self) -> int:
        """O."""
        return int(self.seconds_OG.shape[0])

    @cached_property
    def name_O(self) -> list[str]:
        """The name of each operation's stage."""
        return [self.stages[stage].name for stage in self.stage_O]

    @classmethod
    def of(cls, lanes: Sequence[Blocks], speed_G: NDArray[np.float64] | None = None) -> "Program":
        """Put the blocks of one or more microbatches into the order in which ranks issue them.

        `speed_G`: ranks that compute at less than their device's speed; None: all at full speed.
        """
        stages = tuple(stage for blocks in lanes for block in blocks for stage in block.stages)
        parts: list[NDArray[np.int64]] = []
        seconds_XG = []
        first_stage = 0
        for lane, blocks in enumerate(lanes):
            met = 0  # collectives of the lane so far
            for block in blocks:
                order, beside, meetings = _issue_order(block.stages)
                repeats, size = len(block.row_of_layer), len(order)
                columns = {
                    "stage": np.tile(first_stage + order, repeats),
                    "row": np.repeat(block.row_of_layer, size),
                    "layer": np.repeat(block.first_layer + np.arange(repeats), size),
                    "lane": np.full(repeats * size, lane),
                    "beside": np.tile(beside, repeats),
                    "segment": met + (np.arange(repeats)[:, None] * meetings[-1] + meetings[:-1]).ravel(),
                }
                parts.append(np.stack([column.astype(np.int64) for column in columns.values()]))
                seconds_LSG = np.stack([block.stages[stage].seconds_LG for stage in order], axis=1)
                ranks = seconds_LSG.shape[2]
                seconds_XG.append(seconds_LSG[block.row_of_layer].reshape(-1, ranks))
                met += repeats * int(meetings[-1])
                first_stage += len(block.stages)
        stage_X, row_X, layer_X, lane_X, beside_X, segment_X = np.concatenate(parts, axis=1)
        issued = np.lexsort((np.arange(stage_X.size), lane_X, segment_X)) if len(lanes) > 1 else slice(None)
        of_stage = {
            "stream": np.array([STREAMS.index(stage.stream) for stage in stages]),
            "group": np.array([(stage.group or ranks) * (stage.stream == "communication") for stage in stages]),
            "sms": np.array([stage.sms_share for stage in stages]),
            "pace": np.array([stage.pace for stage in stages]),
        }
        stage_O = stage_X[issued]
        stream_O = of_stage["stream"][stage_O]
        seconds_OG = np.concatenate(seconds_XG)[issued]
        if speed_G is not None and (speed_G != 1).any():
            seconds_OG[stream_O == 0] /= speed_G
        lane_O, beside_O = lane_X[issued], beside_X[issued].astype(bool)
        after_O, feed_O = _dependencies(stream_O, lane_O, beside_O)
        return cls(
            stages=stages,
            lanes=len(lanes),
            stage_O=stage_O,
            row_O=row_X[issued],
            layer_O=layer_X[issued],
            lane_O=lane_O,
            stream_O=stream_O,
            beside_O=beside_O,
            group_O=of_stage["group"][stage_O],
            sms_O=of_stage["sms"][stage_O],
            pace_O=of_stage["pace"][stage_O],
            after_O=after_O,
            feed_O=feed_O,
            seconds_OG=seconds_OG,
        )


def _issue_order(stages: Sequence[Stage]) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """The order of a layer's stages, which of them run beside the one before, and how many collectives come before.

    A stage that runs beside the next collective is issued right after it, and belongs to its segment; the count has
    one entry more, for the whole layer.
    """
    order: list[int] = []
    beside: list[bool] = []
    waiting: list[int] = []
    for index, stage in enumerate(stages):
        if stage.under_next:
            waiting.append(index)
            continue
        assert not waiting or stage.stream == "communication", f"{stage.name} comes between a stage and its collective"
        order += [index, *waiting]
        beside += [False] + [True] * len(waiting)
        waiting = []
    order += waiting  # nothing follows to run beside
    beside += [False] * len(waiting)
    collective = np.array([stages[index].stream == "communication" for index in order])
    before = np.concatenate([[0], np.cumsum(collective)])
    before[:-1] -= np.array(beside)  # with the collective that they run beside
    return np.array(order), np.array(beside), before


def _dependencies(
    stream_O: NDArray[np.int64], lane_O: NDArray[np.int64], beside_O: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`after_O` and `feed_O` of a program."""
    lanes = int(lane_O.max()) + 1
    met = [(-1, -1)] * lanes  # the last collective of each lane, and the one before
    fed = [0] * lanes
    computed = 0
    after_O, feed_O = np.full(stream_O.size, -1), np.zeros(stream_O.size, dtype=np.int64)
    for operation, (stream, lane, beside) in enumerate(
        zip(stream_O.tolist(), lane_O.tolist(), beside_O.tolist(), strict=True)
    ):
        if stream == 1:
            feed_O[operation] = fed[lane]
            met[lane] = (operation, met[lane][0])
        else:
            computed += 1
            fed[lane] = computed
            after_O[operation] = met[lane][1 if beside else 0]
    return after_O, feed_O

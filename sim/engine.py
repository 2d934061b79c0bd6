"""Event engine: SimPy processes, one a rank, each with a compute and a communication stream.

Every collective is one rendezvous: an event that the last rank to arrive sets off for all.
"""

from collections.abc import Generator, Sequence
from typing import Any

import simpy

from sim.stages import Stage, Stream
from sim.timeline import Interval, Timeline

Process = Generator[simpy.Event, Any, None]


class _Rendezvous:
    """All ranks come, the collective runs once, all leave together."""

    def __init__(self, environment: simpy.Environment, ranks: int) -> None:
        self._missing = ranks
        self._everyone_is_here = environment.event()

    def arrive(self) -> simpy.Event:
        self._missing -= 1
        if self._missing == 0:
            self._everyone_is_here.succeed()
        return self._everyone_is_here


class _Rank:
    def __init__(self, engine: "_Engine", rank: int) -> None:
        self._engine = engine
        self._rank = rank
        self._streams: dict[Stream, simpy.Resource] = {
            "compute": simpy.Resource(engine.environment),
            "communication": simpy.Resource(engine.environment),
        }

    def run(self) -> Process:
        """Go through the stages; a stage `under_next` is left running beside the collective that follows."""
        left_running: list[simpy.Event] = []
        for layer in range(self._engine.layers):
            for index, stage in enumerate(self._engine.stages):
                stage_run = self._engine.environment.process(self._run_stage(stage, layer, index))
                if stage.under_next:
                    left_running.append(stage_run)
                    continue
                yield stage_run
                if stage.stream == "communication":
                    yield from left_running
                    left_running.clear()

    def _run_stage(self, stage: Stage, layer: int, index: int) -> Process:
        environment = self._engine.environment
        with self._streams[stage.stream].request() as stream_is_free:
            yield stream_is_free
            if stage.stream == "communication":
                yield self._engine.rendezvous[layer, index].arrive()
            start_s = environment.now
            yield environment.timeout(float(stage.seconds_LG[layer, self._rank]))
        self._engine.intervals.append(
            Interval(
                rank=self._rank,
                stream=stage.stream,
                operation=stage.name,
                layer=layer,
                start_s=float(start_s),
                end_s=float(environment.now),
            )
        )


class _Engine:
    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages
        self.layers, self.ranks = stages[0].seconds_LG.shape
        self.environment = simpy.Environment()
        self.intervals: list[Interval] = []
        self.rendezvous = {
            (layer, index): _Rendezvous(self.environment, self.ranks)
            for layer in range(self.layers)
            for index, stage in enumerate(stages)
            if stage.stream == "communication"
        }


def simulate_events(stages: Sequence[Stage]) -> Timeline:
    """Run the stages as processes until the last rank is done."""
    engine = _Engine(stages)
    for rank in range(engine.ranks):
        engine.environment.process(_Rank(engine, rank).run())
    engine.environment.run()
    return Timeline.of(engine.ranks, engine.intervals)

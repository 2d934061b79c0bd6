"""Event engine: SimPy processes, one a rank for its compute stream, and one rendezvous a collective.

A collective runs once its ranks have come and their communication streams are free, and ends for all of them at once;
never is there a process for a message. Events carry the exact times at which things end, so that what does not contend
takes exactly what the analytic simulator says.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from sim.faults import Disturbance, Schedule
from sim.network import Network
from sim.program import Program
from sim.timeline import Timeline

Process = Generator[simpy.Event, Any, Any]


def simulate_events(
    program: Program, network: Network | None = None, disturbance: Disturbance | None = None, *, step: int = 0
) -> Timeline:
    """Run the program until the last rank is done.

    `network` None: collectives take what they are priced at. `disturbance` None: nothing varies and nothing fails.
    `step`: its number, for jitter differs from step to step.
    Errors: `InputError` where a fault names a part that the cluster has not.
    """
    disturbance = disturbance or Disturbance()
    assert network is not None or not disturbance.faults, "faults need a network to happen to"
    schedule = Schedule.of(disturbance.faults, network.cluster) if network else Schedule(links=(), speeds=(), losses=())
    if network and schedule.links:
        network = replace(network, changes=schedule.links)
    engine = _Engine(program, _jittered(program, disturbance, step), network, schedule, disturbance.detect_s)
    return engine.run()


def _jittered(program: Program, disturbance: Disturbance, step: int) -> NDArray[np.float64]:
    """Factors on the time of each operation on each rank, of mean 1; a collective has one for all."""
    shape = program.seconds_OG.shape
    if not disturbance.jitter:
        return np.ones(shape)
    rng = np.random.default_rng([disturbance.seed, step])
    variance = np.log1p(disturbance.jitter**2)
    factor_OG = np.exp(rng.normal(-variance / 2, np.sqrt(variance), size=shape))
    together_O = program.stream_O == 1
    factor_OG[together_O] = factor_OG[together_O, :1]
    return np.asarray(factor_OG)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """Compute operations `first` to `last` of one lane that follow one another on every rank without waiting.

    `after`: the collective before which they cannot start, as its place among all (-1: none); `then`: the one that
    waits for them (-1: none).
    """

    first: int
    last: int
    after: int
    then: int


class _Meeting:
    """One rendezvous of neighbours at one collective."""

    def __init__(self, environment: simpy.Environment, ranks: range, comes: bool) -> None:
        self.ranks = ranks
        self.missing = set(ranks) if comes else set()
        self.latest_s = 0.0
        self.complete = environment.event()
        self.ended = environment.event()
        if not comes:
            self.complete.succeed()

    def arrive(self, rank: int, at_s: float) -> None:
        self.latest_s = max(self.latest_s, at_s)
        self.leave(rank)

    def leave(self, rank: int) -> None:
        """The rank has come, or will not come any more."""
        if rank in self.missing:
            self.missing.remove(rank)
            if not self.missing:
                self.complete.succeed()


class _Engine:
    def __init__(
        self,
        program: Program,
        factor_OG: NDArray[np.float64],
        network: Network | None,
        schedule: Schedule,
        detect_s: float,
    ) -> None:
        self._program = program
        self._factor_OG = factor_OG
        self._network = network
        self._schedule = schedule
        self._detect_s = detect_s
        self._environment = simpy.Environment()
        self._collectives = np.flatnonzero(program.stream_O == 1).tolist()
        self._chunks = _chunks_of(program, self._collectives)
        self._start_OG = np.full(program.seconds_OG.shape, np.nan)
        self._end_OG = np.full(program.seconds_OG.shape, np.nan)
        self._alive = np.ones(program.ranks, dtype=bool)
        self._speed_G = [1.0] * program.ranks
        self._beside_G = [1.0] * program.ranks  # the pace of what a rank computes, for the collective beside it
        self._computes_G = [False] * program.ranks
        # Set off when what a rank computes, or its part of a collective, changes pace.
        self._pace_G: list[simpy.Event | None] = [None] * program.ranks
        self._share_G: list[simpy.Event | None] = [None] * program.ranks
        self._ran_G: list[list[tuple[int, Sequence[float]]]] = [[] for _ in range(program.ranks)]
        shared = bool(program.sms_O.any() or (program.pace_O < 1).any())
        self._paces_change = shared or bool(schedule.speeds or schedule.losses)
        self._meetings: list[list[_Meeting]] = []
        waited_for = {chunk.then for chunk in self._chunks}
        for place, operation in enumerate(self._collectives):
            group = int(program.group_O[operation])
            self._meetings.append(
                [
                    _Meeting(self._environment, range(first, first + group), place in waited_for)
                    for first in range(0, program.ranks, group)
                ]
            )

    def run(self) -> Timeline:
        environment = self._environment
        seconds_GO = (self._program.seconds_OG * self._factor_OG).T.tolist()
        for rank in range(self._program.ranks):
            environment.process(self._compute(rank, seconds_GO[rank]))
        for place, meetings in enumerate(self._meetings):
            for meeting in meetings:
                environment.process(self._meet(place, meeting))
        for at_s, rank, speed in self._schedule.speeds:
            environment.process(self._slow_down(at_s, rank, speed))
        for at_s, rank in self._schedule.losses:
            environment.process(self._lose(at_s, rank))
        environment.run()
        assert all(meeting.ended.processed for meetings in self._meetings for meeting in meetings), "ranks wait forever"
        for rank, ran in enumerate(self._ran_G):
            self._record(rank, ran)
        return Timeline(program=self._program, start_OG=self._start_OG, end_OG=self._end_OG)

    def _compute(self, rank: int, seconds_O: Sequence[float]) -> Process:
        """The compute stream of one rank."""
        environment = self._environment
        group_O = self._program.group_O
        ran = self._ran_G[rank]
        now = 0.0
        for chunk in self._chunks:
            if chunk.after >= 0:
                group = int(group_O[self._collectives[chunk.after]])
                now = max(now, (yield self._meetings[chunk.after][rank // group].ended))
            if not self._alive[rank]:
                break
            ends = list(accumulate(seconds_O[chunk.first : chunk.last + 1], initial=now))
            if self._paces_change:
                self._computes(rank, True, now)
                ends = yield from self._at_pace(rank, ends)
                self._computes(rank, False, ends[-1] if self._alive[rank] else environment.now)
            else:
                yield environment.timeout(max(ends[-1] - environment.now, 0.0))
            ran.append((chunk.first, ends))
            now = ends[-1]
            if not self._alive[rank]:
                break
            if chunk.then >= 0:
                group = int(group_O[self._collectives[chunk.then]])
                self._meetings[chunk.then][rank // group].arrive(rank, now)

    def _at_pace(self, rank: int, ends: Sequence[float]) -> Generator[simpy.Event, Any, list[float]]:
        """Run kernels that would end at `ends`, the first entry being their start, at a pace that may change.

        When they really do, in the same form; as far as they come on a rank that is lost meanwhile.
        """
        environment = self._environment
        now, done = ends[0], 0.0  # seconds of work
        real = [now]
        work = [end - ends[0] for end in ends[1:]]
        while True:
            if not self._alive[rank]:
                return real
            pace = self._speed_G[rank] * self._beside_G[rank]
            end = now + (work[-1] - done) / pace
            changed = environment.event()
            self._pace_G[rank] = changed
            yield environment.timeout(max(end - environment.now, 0.0)) | changed
            until: float = changed.value if changed.triggered else end  # type: ignore[assignment]
            real += [now + (w - done) / pace for w in work[len(real) - 1 :] if now + (w - done) / pace <= until]
            if len(real) == len(ends):
                self._pace_G[rank] = None
                return real
            done += (until - now) * pace
            now = until

    def _record(self, rank: int, ran: Sequence[tuple[int, Sequence[float]]]) -> None:
        """Write down when a rank's kernels ran: the first of some in a row, its start and then each one's end."""
        operations = [first + place for first, ends in ran for place in range(len(ends) - 1)]
        self._start_OG[operations, rank] = [start for _, ends in ran for start in ends[:-1]]
        self._end_OG[operations, rank] = [end for _, ends in ran for end in ends[1:]]

    def _meet(self, place: int, meeting: _Meeting) -> Process:
        """One collective: wait for its ranks and for their streams, run, let all go on."""
        environment = self._environment
        operation = self._collectives[place]
        start = 0.0
        if place:
            before = int(self._program.group_O[self._collectives[place - 1]])
            groups = dict.fromkeys(rank // before for rank in meeting.ranks)
            for group in groups:
                start = max(start, (yield self._meetings[place - 1][group].ended))
        yield meeting.complete
        start = max(start, meeting.latest_s, environment.now if self._schedule.losses else 0.0)
        seconds = self._collective_s(operation, meeting, start)
        pace = float(self._program.pace_O[operation])
        beside = pace * (1 - float(self._program.sms_O[operation]))
        if beside < 1 and seconds > 0:
            end = yield from self._beside_computation(meeting, start, seconds, beside, pace)
        else:
            end = start + seconds
            yield environment.timeout(max(end - environment.now, 0.0))
        alive = [rank for rank in meeting.ranks if self._alive[rank]]
        self._start_OG[operation, alive], self._end_OG[operation, alive] = start, end
        meeting.ended.succeed(end)

    def _beside_computation(
        self, meeting: _Meeting, start_s: float, seconds: float, beside: float, pace: float
    ) -> Generator[simpy.Event, Any, float]:
        """Run a collective that slows, and is slowed by, what its ranks compute beside it; when it ends."""
        alive = [rank for rank in meeting.ranks if self._alive[rank]]
        for rank in alive:
            self._beside_G[rank] = beside
            _set_off(self._pace_G, rank, start_s)
        parts = [self._environment.process(self._part(rank, start_s, seconds, pace)) for rank in alive]
        yield self._environment.all_of(parts)
        ends: list[float] = [part.value for part in parts]  # type: ignore[misc]  # SimPy's values have no type
        end = max(ends, default=start_s + seconds)
        for rank in alive:
            self._beside_G[rank] = 1.0
            _set_off(self._pace_G, rank, end)
        return end

    def _part(self, rank: int, start_s: float, seconds: float, pace: float) -> Process:
        """One rank's part of a collective, at `pace` while the rank computes; its value is when it is done."""
        environment = self._environment
        now, left = start_s, seconds
        while True:
            speed = pace if self._computes_G[rank] else 1.0
            end = now + left / speed
            changed = environment.event()
            self._share_G[rank] = changed
            yield environment.timeout(max(end - environment.now, 0.0)) | changed
            until: float = changed.value if changed.triggered else end  # type: ignore[assignment]
            if until >= end:
                self._share_G[rank] = None
                return end
            left -= (until - now) * speed
            now = until

    def _computes(self, rank: int, busy: bool, at_s: float) -> None:
        self._computes_G[rank] = busy
        _set_off(self._share_G, rank, at_s)

    def _collective_s(self, operation: int, meeting: _Meeting, start_s: float) -> float:
        program = self._program
        priced_s = float(program.seconds_OG[operation, meeting.ranks.start : meeting.ranks.stop].max())
        stage = program.stages[program.stage_O[operation]]
        if self._network is not None and stage.exchange is not None:
            priced_s = self._network.seconds(stage, int(program.row_O[operation]), start_s)
        return priced_s * float(self._factor_OG[operation, meeting.ranks.start])

    def _slow_down(self, at_s: float, rank: int, speed: float) -> Process:
        yield self._environment.timeout(at_s)
        self._speed_G[rank] = speed
        _set_off(self._pace_G, rank, at_s)

    def _lose(self, at_s: float, rank: int) -> Process:
        """The rank stops; once the others know, they wait for it no longer."""
        yield self._environment.timeout(at_s)
        self._alive[rank] = False
        _set_off(self._pace_G, rank, at_s)
        yield self._environment.timeout(self._detect_s)
        for meetings in self._meetings:
            for meeting in meetings:
                meeting.leave(rank)


def _set_off(event_G: list[simpy.Event | None], rank: int, at_s: float) -> None:
    """Tell whoever waits on a rank that something changes at `at_s`."""
    event, event_G[rank] = event_G[rank], None
    if event is not None:
        event.succeed(at_s)


def _chunks_of(program: Program, collectives: Sequence[int]) -> list[_Chunk]:
    """The compute operations in order, merged where nothing can come between."""
    place_of = {operation: place for place, operation in enumerate(collectives)}
    then_of = {int(program.feed_O[operation]): place for operation, place in reversed(place_of.items())}
    runs: list[list[int]] = []
    computed = np.flatnonzero(program.stream_O == 0).tolist()
    for operation in computed:
        before = operation - 1
        joins = (
            bool(runs)
            and runs[-1][-1] == before
            and program.lane_O[before] == program.lane_O[operation]
            and not program.beside_O[before]
            and not program.beside_O[operation]
        )
        if joins:
            runs[-1].append(operation)
        else:
            runs.append([operation])
    done = 0
    chunks = []
    for run in runs:
        done += len(run)
        after = place_of.get(int(program.after_O[run[0]]), -1)
        chunks.append(_Chunk(first=run[0], last=run[-1], after=after, then=then_of.get(done, -1)))
    return chunks

"""What both simulators must hold: one program gives one timeline, and contention only ever adds to it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.analytic import simulate_analytic
from sim.engine import simulate_events
from sim.faults import Disturbance
from sim.program import STREAMS, Program
from sim.stages import Block, Blocks, Stage
from sim.timeline import Timeline

Lanes = tuple[Blocks, ...]

SIMULATORS: dict[str, Callable[[Program], Timeline]] = {"analytic": simulate_analytic, "event": simulate_events}

every_simulator = pytest.mark.parametrize("simulate", SIMULATORS.values(), ids=SIMULATORS)


def compute(name: str, *seconds_G: float, under_next: bool = False) -> Stage:
    """One layer of a compute stage."""
    return Stage(name=name, stream="compute", seconds_LG=np.array([seconds_G], dtype=float), under_next=under_next)


def communicate(name: str, seconds: float, ranks: int = 2, **details: Any) -> Stage:
    return Stage(name=name, stream="communication", seconds_LG=np.full((1, ranks), float(seconds)), **details)


def program(*lanes: Sequence[Stage]) -> Program:
    """Each lane one block, a layer for every row of its stages."""
    return Program.of([(Block.of(stages),) for stages in lanes])


def times(timeline: Timeline, operation: str, lane: int = 0) -> list[tuple[float, float]]:
    """Start and end on each rank, in rank order."""
    found = sorted(
        (i.rank, i.start_s, i.end_s) for i in timeline.intervals if (i.operation, i.lane) == (operation, lane)
    )
    return [(start_s, end_s) for _, start_s, end_s in found]


@every_simulator
def test_a_collective_waits_for_the_slowest_rank(simulate: Any) -> None:
    # Ranks are ready after 1 s and 3 s; 2 s of all-to-all: both are done at 5 s.
    timeline = simulate(program([compute("gate", 1, 3), communicate("dispatch", 2)]))
    assert times(timeline, "dispatch") == [(3, 5), (3, 5)]
    assert timeline.step_s == 5


@every_simulator
def test_ranks_meet_at_every_collective(simulate: Any) -> None:
    # 1 | 3, meet at 3; 2 s; 4 | 1, meet at 9; 1 s; then 1 | 2: the step ends at 12. Slowest first: 3 + 2 + 4 + 1 + 2.
    stages = [
        compute("gate", 1, 3),
        communicate("dispatch", 2),
        compute("experts", 4, 1),
        communicate("return", 1),
        compute("combine", 1, 2),
    ]
    timeline = simulate(program(stages))
    assert times(timeline, "experts") == [(5, 9), (5, 6)]
    assert times(timeline, "combine") == [(10, 11), (10, 12)]
    assert timeline.step_s == 12


@every_simulator
def test_a_group_waits_for_its_own_ranks_alone(simulate: Any) -> None:
    # Ranks 0 and 1 meet at 3 and take 2 s; 2 and 3 meet at 4, also 2 s. All meet at 6.
    stages = [
        compute("attention", 1, 3, 4, 2),
        communicate("attention sum", 2, ranks=4, group=2),
        communicate("dispatch", 1, ranks=4),
    ]
    timeline = simulate(program(stages))
    assert times(timeline, "attention sum") == [(3, 5), (3, 5), (4, 6), (4, 6)]
    assert times(timeline, "dispatch") == [(6, 7)] * 4


@every_simulator
def test_layers_follow_one_another(simulate: Any) -> None:
    gate = Stage(name="gate", stream="compute", seconds_LG=np.array([[1.0, 3.0], [2.0, 1.0]]))
    # Layer 0 ends at 5 for both; layer 1: 7 | 6, meet at 7, 8.
    timeline = simulate(program([gate, communicate_layers("dispatch", [2.0, 1.0])]))
    assert timeline.step_s == 8
    assert [i.layer for i in timeline.intervals if i.operation == "dispatch" and i.rank == 0] == [0, 1]


@every_simulator
def test_layers_that_share_a_row_take_the_same(simulate: Any) -> None:
    """Blocks follow one another, and `row_of_layer` says which row each layer takes: 3, 3, then 5 and 5."""
    dense = Block(stages=(compute("dense", 3, 1),), row_of_layer=np.zeros(2, dtype=np.int64))
    moe = Block(
        stages=(Stage(name="experts", stream="compute", seconds_LG=np.array([[9.0, 9.0], [5.0, 1.0]])),),
        row_of_layer=np.array([1, 1]),
        first_layer=2,
    )
    timeline = simulate(Program.of([(dense, moe)]))
    on_rank_0 = [(i.operation, i.layer, i.start_s, i.end_s) for i in timeline.intervals if i.rank == 0]
    assert on_rank_0 == [("dense", 0, 0, 3), ("dense", 1, 3, 6), ("experts", 2, 6, 11), ("experts", 3, 11, 16)]


@every_simulator
@pytest.mark.parametrize(("shared_s", "experts_start_s"), [(1, 3), (2, 3), (5, 6)])
def test_shared_experts_hide_under_the_dispatch(simulate: Any, shared_s: float, experts_start_s: float) -> None:
    # Gate 1 s, dispatch 2 s: experts start at 3, or when the rank's shared experts are done.
    stages = [
        compute("gate", 1, 1),
        compute("shared", shared_s, 0, under_next=True),
        communicate("dispatch", 2),
        compute("experts", 1, 1),
    ]
    timeline = simulate(program(stages))
    assert times(timeline, "shared") == [(1, 1 + shared_s), (1, 1)]
    assert times(timeline, "dispatch") == [(1, 3), (1, 3)]
    assert times(timeline, "experts") == [(experts_start_s, experts_start_s + 1), (3, 4)]


@every_simulator
def test_what_runs_under_a_collective_waits_neither_for_it_nor_for_other_ranks(simulate: Any) -> None:
    # Rank 0 comes to the dispatch at 1, rank 1 at 3: the dispatch runs from 3 to 5, shared experts from 1 and from 3.
    stages = [compute("gate", 1, 3), compute("shared", 1, 1, under_next=True), communicate("dispatch", 2)]
    timeline = simulate(program(stages))
    assert times(timeline, "shared") == [(1, 2), (3, 4)]
    assert times(timeline, "dispatch") == [(3, 5), (3, 5)]


@every_simulator
def test_one_compute_stream_does_one_thing_at_a_time(simulate: Any) -> None:
    # Of two stages under the dispatch the second queues behind the first; the dispatch waits for neither.
    stages = [
        compute("shared", 3, 3, under_next=True),
        compute("norm", 1, 1, under_next=True),
        communicate("dispatch", 2),
    ]
    timeline = simulate(program(stages))
    assert times(timeline, "shared") == [(0, 3), (0, 3)]
    assert times(timeline, "norm") == [(3, 4), (3, 4)]
    assert times(timeline, "dispatch") == [(0, 2), (0, 2)]
    assert timeline.step_s == 4


def test_what_runs_under_a_collective_comes_right_before_it() -> None:
    """Else it would be unclear what it waits for."""
    stages = [compute("shared", 3, 3, under_next=True), compute("gate", 1, 1), communicate("dispatch", 2)]
    with pytest.raises(AssertionError, match="gate comes between a stage and its collective"):
        program(stages)


@every_simulator
def test_a_step_lasts_until_the_last_interval_ends(simulate: Any) -> None:
    timeline = simulate(program([communicate("return", 1), compute("shared", 4, 0, under_next=True)]))
    assert timeline.step_s == 5


@every_simulator
def test_a_rank_is_idle_while_it_waits_for_others(simulate: Any) -> None:
    """Layer 0: rank 0 waits 3 - 1 s for rank 1; layer 1: rank 1 waits 2 - 1 s for rank 0."""
    gate = Stage(name="gate", stream="compute", seconds_LG=np.array([[1.0, 3.0], [2.0, 1.0]]))
    timeline = simulate(program([gate, communicate_layers("dispatch", [2.0, 1.0])]))
    assert timeline.idle_G().tolist() == [2, 1]
    # Rank 0 comes at 1 and 7, rank 1 at 3 and 6.
    assert timeline.arrival_OG[timeline.program.stream_O == 1].tolist() == [[1, 3], [7, 6]]


@every_simulator
def test_one_half_computes_while_the_other_communicates(simulate: Any) -> None:
    """Two lanes of 1 s compute, 2 s communication, twice; in one lane of the whole batch everything takes twice that.

    compute        A0 B0 .  A1 .  B1
    communication  .  A0 A0 B0 B0 A1 A1 B1 B1
    second         0  1  2  3  4  5  6  7  8

    A1 may start when A's first exchange ends, at 3; B1 when B's does, at 5. One lane: (2 + 4) * 2 = 12 s.
    """
    half = [compute("c0", 1), communicate("x0", 2, 1), compute("c1", 1), communicate("x1", 2, 1)]
    timeline = simulate(program(half, half))
    assert [times(timeline, name, lane=0) for name in ("c0", "x0", "c1", "x1")] == [
        [(0, 1)],
        [(1, 3)],
        [(3, 4)],
        [(5, 7)],
    ]
    assert [times(timeline, name, lane=1) for name in ("c0", "x0", "c1", "x1")] == [
        [(1, 2)],
        [(3, 5)],
        [(5, 6)],
        [(7, 9)],
    ]
    assert timeline.step_s == 9
    whole = [compute("c0", 2), communicate("x0", 4, 1), compute("c1", 2), communicate("x1", 4, 1)]
    assert simulate(program(whole)).step_s == 12


@every_simulator
def test_halves_that_cost_as_much_as_the_whole_make_overlap_lose(simulate: Any) -> None:
    """At decode a half reads the same weights: 3 s of compute for the half as for the whole, 1 s of exchange for 2.

    compute        A0 A0 A0 B0 B0 B0 A1 A1 A1 B1 B1 B1
    communication  .  .  .  A0 .  .  B0 .  .  A1 .  .  B1
    second         0  1  2  3  4  5  6  7  8  9  10 11 12

    13 s, against (3 + 2) * 2 = 10 s for the whole.
    """
    half = [compute("c0", 3), communicate("x0", 1, 1), compute("c1", 3), communicate("x1", 1, 1)]
    timeline = simulate(program(half, half))
    assert [times(timeline, name, lane=0) for name in ("x0", "c1", "x1")] == [[(3, 4)], [(6, 9)], [(9, 10)]]
    assert [times(timeline, name, lane=1) for name in ("x0", "c1", "x1")] == [[(6, 7)], [(9, 12)], [(12, 13)]]
    assert timeline.step_s == 13
    whole = [compute("c0", 3), communicate("x0", 2, 1), compute("c1", 3), communicate("x1", 2, 1)]
    assert simulate(program(whole)).step_s == 10


@every_simulator
def test_a_kernel_beside_a_collective_has_the_other_multiprocessors(simulate: Any) -> None:
    # A collective of 1 s takes half of them: a kernel of 2 s does 0.5 s of work meanwhile, the other 1.5 s after it.
    stages = [
        compute("shared", 2, 0.25, under_next=True),
        communicate("dispatch", 1, sms_share=0.5),
        compute("experts", 1, 1),
    ]
    timeline = simulate(program(stages))
    assert times(timeline, "dispatch") == [(0, 1), (0, 1)]
    # Rank 1's 0.25 s take 0.5 s and are done before the collective is.
    assert times(timeline, "shared") == [(0, 2.5), (0, 0.5)]
    assert times(timeline, "experts") == [(2.5, 3.5), (1, 2)]


@every_simulator
def test_streams_that_share_caches_and_memory_slow_each_other(simulate: Any) -> None:
    # At half the pace 1 s of kernel takes 2 s, in which the collective does 1 of its 3 s; the other 2 s it is alone.
    # Rank 1 computes nothing and has its part done at 3, but all ends for all at 4.
    stages = [
        compute("shared", 1, 0, under_next=True),
        communicate("dispatch", 3, pace=0.5),
        compute("experts", 1, 1),
    ]
    timeline = simulate(program(stages))
    assert times(timeline, "shared") == [(0, 2), (0, 0)]
    assert times(timeline, "dispatch") == [(0, 4), (0, 4)]
    assert times(timeline, "experts") == [(4, 5), (4, 5)]


@every_simulator
def test_two_that_take_equally_long_at_half_the_pace_could_as_well_take_turns(simulate: Any) -> None:
    stages = [compute("shared", 1, 1, under_next=True), communicate("dispatch", 1, pace=0.5)]
    assert simulate(program(stages)).step_s == 2


@every_simulator
def test_fewer_multiprocessors_and_a_slower_pace_multiply(simulate: Any) -> None:
    # Half of the multiprocessors at half the pace: the kernel's 1 s takes 4, in which the collective does 2 of its 3 s.
    stages = [
        compute("shared", 1, 1, under_next=True),
        communicate("dispatch", 3, sms_share=0.5, pace=0.5),
    ]
    timeline = simulate(program(stages))
    assert times(timeline, "shared") == [(0, 4), (0, 4)]
    assert times(timeline, "dispatch") == [(0, 5), (0, 5)]


@every_simulator
def test_the_other_half_computes_with_fewer_multiprocessors(simulate: Any) -> None:
    """Halves of 2 s compute and 3 s exchange, which takes a quarter of the multiprocessors.

    A computes from 0 to 2, its exchange runs from 2 to 5. B's 2 s from 2 on take 2 / 0.75 = 2.667 s: to 4.667.
    Its exchange waits for A's: from 5 to 8.
    """
    half = [compute("c", 2), communicate("x", 3, 1, sms_share=0.25)]
    timeline = simulate(program(half, half))
    assert times(timeline, "x", lane=0) == [(2, 5)]
    ((start_s, end_s),) = times(timeline, "c", lane=1)
    assert (start_s, end_s) == (2, 2 + 2 / 0.75)
    assert times(timeline, "x", lane=1) == [(5, 8)]


def communicate_layers(name: str, seconds_L: list[float]) -> Stage:
    return Stage(name=name, stream="communication", seconds_LG=np.repeat(np.array(seconds_L)[:, None], 2, axis=1))


SECONDS = st.one_of(st.just(0.0), st.integers(0, 5).map(float), st.floats(0, 1e3))


@st.composite
def any_lanes(draw: st.DrawFn, *, sms_shares: Sequence[float] = (0.0,), paces: Sequence[float] = (1.0,)) -> Lanes:
    """One or two microbatches: blocks of stages of any kind, layers that share rows, groups that meet."""
    ranks = draw(st.integers(1, 4))
    groups = [0, *(size for size in range(1, ranks + 1) if ranks % size == 0)]

    def stage(name: str, kind: str, rows: int) -> Stage:
        if kind != "collective":
            flat = draw(st.lists(SECONDS, min_size=rows * ranks, max_size=rows * ranks))
            seconds_LG = np.array(flat).reshape(rows, ranks)
            return Stage(name=name, stream="compute", seconds_LG=seconds_LG, under_next=kind == "under")
        seconds_L = np.array(draw(st.lists(SECONDS, min_size=rows, max_size=rows)))
        return Stage(
            name=name,
            stream="communication",
            seconds_LG=np.broadcast_to(seconds_L[:, None], (rows, ranks)),
            group=draw(st.sampled_from(groups)),
            sms_share=draw(st.sampled_from(list(sms_shares))),
            pace=draw(st.sampled_from(list(paces))),
        )

    def block(lane: int, number: int) -> Block:
        kinds = draw(st.lists(st.sampled_from(["compute", "collective", "under"]), min_size=1, max_size=5))
        for place in range(len(kinds) - 2, -1, -1):
            if kinds[place] == "under" and kinds[place + 1] == "compute":
                kinds[place] = "compute"
        rows = draw(st.integers(1, 2))
        stages = tuple(stage(f"{lane}.{number}.{place} {kind}", kind, rows) for place, kind in enumerate(kinds))
        row_of_layer = draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=2))
        return Block(stages=stages, row_of_layer=np.array(row_of_layer))

    lanes = draw(st.integers(1, 2))
    return tuple(tuple(block(lane, number) for number in range(draw(st.integers(1, 2)))) for lane in range(lanes))


@settings(max_examples=200, deadline=None)
@given(lanes=any_lanes())
def test_both_give_the_same_where_nothing_contends(lanes: Lanes) -> None:
    same = Program.of(lanes)
    analytic, event = simulate_analytic(same), simulate_events(same)
    np.testing.assert_array_equal(analytic.start_OG, event.start_OG)
    np.testing.assert_array_equal(analytic.end_OG, event.end_OG)


SHARED: dict[str, Sequence[float]] = {"sms_shares": (0.0, 0.25, 0.5), "paces": (1.0, 0.75, 0.5)}


@settings(max_examples=200, deadline=None)
@given(lanes=any_lanes(**SHARED))
def test_both_give_the_same_where_streams_slow_each_other(lanes: Lanes) -> None:
    same = Program.of(lanes)
    analytic, event = simulate_analytic(same), simulate_events(same)
    np.testing.assert_allclose(analytic.start_OG, event.start_OG, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(analytic.end_OG, event.end_OG, rtol=1e-9, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(lanes=any_lanes(**SHARED))
def test_the_analytic_step_is_a_lower_bound(lanes: Lanes) -> None:
    same = Program.of(lanes)
    assert simulate_analytic(same).step_s <= simulate_events(same).step_s * (1 + 1e-9) + 1e-9


@every_simulator
@settings(max_examples=100, deadline=None)
@given(lanes=any_lanes(**SHARED))
def test_a_timeline_runs_every_stage_once_without_overlap(simulate: Any, lanes: Lanes) -> None:
    issued = Program.of(lanes)
    timeline = simulate(issued)
    ranks = issued.ranks
    found = sorted((i.operation, i.layer, i.lane, i.rank) for i in timeline.intervals)
    assert found == sorted(
        (stage.name, layer, lane, rank)
        for lane, blocks in enumerate(lanes)
        for block in blocks
        for layer in range(len(block.row_of_layer))
        for stage in block.stages
        for rank in range(ranks)
    )
    for rank in range(ranks):
        for stream in STREAMS:
            line = sorted((i.start_s, i.end_s) for i in timeline.intervals if (i.rank, i.stream) == (rank, stream))
            assert all(one[1] <= other[0] for one, other in pairwise(line))
    least_s = dict(zip(zip(issued.name_O, issued.row_O, strict=True), issued.seconds_OG, strict=True))
    rows = {(name, layer): row for name, layer, row in zip(issued.name_O, issued.layer_O, issued.row_O, strict=True)}
    for i in timeline.intervals:
        priced_s = least_s[i.operation, rows[i.operation, i.layer]][i.rank]
        assert i.start_s >= 0
        assert i.end_s - i.start_s >= priced_s * (1 - 1e-9) - 1e-9  # streams may slow each other
    starts = [(i.start_s, i.rank) for i in timeline.intervals]
    assert starts == sorted(starts)
    # A rank is idle while neither of its streams runs: the step less the union of its intervals.
    for rank, idle_s in enumerate(timeline.idle_G()):
        edges = sorted({0.0, timeline.step_s} | {t for i in timeline.intervals for t in (i.start_s, i.end_s)})
        busy_s = sum(
            end_s - start_s
            for start_s, end_s in pairwise(edges)
            if any(i.start_s <= start_s and end_s <= i.end_s for i in timeline.intervals if i.rank == rank)
        )
        assert idle_s == pytest.approx(timeline.step_s - busy_s, abs=1e-6)
        assert idle_s >= -1e-9


@every_simulator
@settings(max_examples=100, deadline=None)
@given(lanes=any_lanes(**SHARED))
def test_within_a_lane_time_never_goes_back(simulate: Any, lanes: Lanes) -> None:
    """A stage starts when all before it in its lane have ended, but for what runs beside the collective before it."""
    issued = Program.of(lanes)
    timeline = simulate(issued)
    for lane in range(issued.lanes):
        ended_G = before_collective_G = np.zeros(issued.ranks)
        for o in np.flatnonzero(issued.lane_O == lane):
            assert (timeline.start_OG[o] >= (before_collective_G if issued.beside_O[o] else ended_G)).all()
            if issued.stream_O[o] == 1:
                before_collective_G = ended_G
            ended_G = np.maximum(ended_G, timeline.end_OG[o])


@every_simulator
@settings(max_examples=100, deadline=None)
@given(lanes=any_lanes())
def test_a_group_starts_and_ends_a_collective_together(simulate: Any, lanes: Lanes) -> None:
    issued = Program.of(lanes)
    timeline = simulate(issued)
    for o in np.flatnonzero(issued.stream_O == 1):
        group = int(issued.group_O[o])
        for first in range(0, issued.ranks, group):
            mates = slice(first, first + group)
            assert len(set(timeline.start_OG[o, mates])) == len(set(timeline.end_OG[o, mates])) == 1
            assert timeline.start_OG[o, first] >= timeline.arrival_OG[o, mates].max()


@every_simulator
@settings(max_examples=80, deadline=None)
@given(lanes=any_lanes(**SHARED))
def test_streams_that_slow_each_other_never_end_earlier(simulate: Any, lanes: Lanes) -> None:
    shared = Program.of(lanes)
    apart = replace(shared, sms_O=np.zeros_like(shared.sms_O), pace_O=np.ones_like(shared.pace_O))
    assert simulate(shared).step_s >= simulate(apart).step_s * (1 - 1e-9) - 1e-9


def slower_by(more_s: float, lanes: Lanes) -> Lanes:
    """The same with the first stage of each lane slower."""

    def slower(blocks: Blocks) -> Blocks:
        first, *others = blocks
        stage, *stages = first.stages
        late = replace(stage, seconds_LG=stage.seconds_LG + more_s)
        return (replace(first, stages=(late, *stages)), *others)

    return tuple(slower(blocks) for blocks in lanes)


@every_simulator
@settings(max_examples=80, deadline=None)
@given(lanes=any_lanes(), more_s=st.floats(0, 100))
def test_a_slower_stage_never_ends_the_step_earlier(simulate: Any, lanes: Lanes, more_s: float) -> None:
    slower_s = simulate(Program.of(slower_by(more_s, lanes))).step_s
    assert slower_s >= simulate(Program.of(lanes)).step_s - 1e-9


@every_simulator
@settings(max_examples=50, deadline=None)
@given(lanes=any_lanes())
def test_ranks_that_compute_at_half_speed_take_twice_as_long_alone(simulate: Any, lanes: Lanes) -> None:
    ranks = lanes[0][0].stages[0].seconds_LG.shape[1]
    slow, fast = Program.of(lanes, np.full(ranks, 0.5)), Program.of(lanes)
    np.testing.assert_array_equal(slow.seconds_OG[slow.stream_O == 0], 2 * fast.seconds_OG[fast.stream_O == 0])
    np.testing.assert_array_equal(slow.seconds_OG[slow.stream_O == 1], fast.seconds_OG[fast.stream_O == 1])
    assert simulate(slow).step_s >= simulate(fast).step_s


@settings(max_examples=50, deadline=None)
@given(lanes=any_lanes(**SHARED), seed=st.integers(0, 9))
def test_the_same_seed_gives_the_same_timeline(lanes: Lanes, seed: int) -> None:
    same = Program.of(lanes)
    disturbed = [
        simulate_events(same, None, Disturbance(jitter=0.1, seed=s)).end_OG.tobytes() for s in (seed, seed, seed + 1)
    ]
    assert disturbed[0] == disturbed[1]
    if same.seconds_OG.any():
        assert disturbed[0] != disturbed[2]

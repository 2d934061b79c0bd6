"""The event simulation: links that contend, ranks and links that fail, times that vary; by hand and by law."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cost_models.cluster import Cluster, gpu_cluster
from cost_models.devices import DEVICES
from cost_models.ops import CostModel, Operation, Prediction, TokenExchange
from cost_models.roofline import Roofline
from cost_models.traffic import Traffic
from sim.analytic import simulate_analytic
from sim.engine import simulate_events
from sim.faults import Disturbance, Fault
from sim.network import Network
from sim.program import Program
from sim.stages import Block, Stage
from sim.timeline import Timeline
from traces.errors import InputError

# Nodes of two GPUs. Inside a node nothing is slow; a NIC moves 10 bytes a second. Ranks 0 and 2 are on leaf0, 1 and 3
# on leaf1.
SMALL = replace(DEVICES["h100_sxm"], name="small", ranks_per_node=2, scale_up=1e6, scale_out=10.0, host_bandwidth=1e6)


def two_nodes(oversubscription: float = 1.0, *, times: float = 1.0) -> Cluster:
    """Two nodes of two, all links `times` as fast."""
    device = replace(
        SMALL,
        scale_up=SMALL.scale_up * times,
        scale_out=SMALL.scale_out * times,
        host_bandwidth=SMALL.host_bandwidth * times,
    )
    return gpu_cluster(device, 4, oversubscription=oversubscription)


def moves(*flows: tuple[int, int, int]) -> TokenExchange:
    """A dispatch of so many bytes from one rank to another, in rows of 2 bytes."""
    rows_GG = np.zeros((4, 4), dtype=np.int64)
    for source, rank, bytes_ in flows:
        rows_GG[source, rank] = bytes_ // 2
    return exchange_of(rows_GG)


def exchange_of(rows_GG: NDArray[np.int64]) -> TokenExchange:
    return TokenExchange(
        tokens_X=np.array([1]),
        hidden=1,
        top_k=1,
        experts=4,
        ranks_X=np.array(4),
        nodes_X=np.array(2),
        direction="dispatch",
        mode="low_latency",
        traffic=Traffic.of(rows_GG[None], nodes=2),
    )


def priced(exchange: TokenExchange, costs: CostModel) -> Stage:
    seconds_LG = np.broadcast_to(costs.seconds(exchange)[:, None], (1, 4))
    return Stage(name="dispatch", stream="communication", seconds_LG=seconds_LG, exchange=exchange)


def compute(name: str, *seconds_G: float) -> Stage:
    return Stage(name=name, stream="compute", seconds_LG=np.array([seconds_G], dtype=float))


def communicate(name: str, seconds: float, ranks: int) -> Stage:
    return Stage(name=name, stream="communication", seconds_LG=np.full((1, ranks), float(seconds)))


def program(*stages: Stage) -> Program:
    return Program.of([(Block.of(stages),)])


def disturbed(*faults: str, detect_s: float = 0.1) -> Disturbance:
    return Disturbance(faults=tuple(map(Fault.parse, faults)), detect_s=detect_s)


def spans(timeline: Timeline, rank: int) -> list[tuple[str, float, float]]:
    """What a rank ran, in order."""
    return [(i.operation, i.start_s, i.end_s) for i in timeline.intervals if i.rank == rank]


# --- links


def test_an_exchange_over_an_oversubscribed_spine_by_hand() -> None:
    """Rank 0 sends 100 bytes to rank 3, over the spine, and 50 to rank 2, over their leaf.

    leaf0 has 2 * 10 / 2.5 = 8 bytes/s up. The bound: 150 bytes through rank 0's NIC, 10 bytes/s, 15 s. But the flows
    first have 5 bytes/s each; after 10 s the second has ended, and the first moves its other 50 bytes at the 8 of the
    spine, not at 10: 6.25 s. 16.25 s.
    """
    cluster = two_nodes(2.5)
    costs = Roofline(cluster)
    issued = program(compute("gate", 1, 1, 1, 1), priced(moves((0, 3, 100), (0, 2, 50)), costs))
    assert simulate_analytic(issued).step_s == pytest.approx(1 + 15)
    timeline = simulate_events(issued, Network(cluster=cluster, costs=costs))
    assert timeline.step_s == pytest.approx(1 + 16.25)
    # All ranks are let go at once.
    assert {i.end_s for i in timeline.intervals if i.operation == "dispatch"} == {timeline.step_s}


def test_without_oversubscription_the_bound_is_what_it_takes() -> None:
    cluster = two_nodes()
    costs = Roofline(cluster)
    issued = program(priced(moves((0, 3, 100), (0, 2, 50)), costs))
    assert (
        simulate_events(issued, Network(cluster=cluster, costs=costs)).step_s == simulate_analytic(issued).step_s == 15
    )


def test_without_a_network_collectives_take_what_they_are_priced_at() -> None:
    costs = Roofline(two_nodes(2.5))
    assert simulate_events(program(priced(moves((0, 3, 100), (0, 2, 50)), costs))).step_s == 15


@dataclass(frozen=True)
class Slower(CostModel):
    """Twice what bare links take, and 3 s that no byte costs."""

    links: Roofline
    name: str = "slower"
    included: frozenset[type] = frozenset()

    def predict(self, operation: Operation) -> Prediction:
        return Prediction.unmeasured(self.seconds(operation))

    def seconds(self, operation: Operation) -> NDArray[np.float64]:
        return 3 + 2 * self.links.seconds(operation)


def test_contention_stretches_the_part_of_a_price_that_moves_bytes() -> None:
    """As above, priced at 3 + 2 * 15 = 33 s: the 3 s stay, the 30 s grow as 15 grow to 16.25."""
    cluster = two_nodes(2.5)
    costs = Slower(Roofline(cluster))
    issued = program(priced(moves((0, 3, 100), (0, 2, 50)), costs))
    assert simulate_analytic(issued).step_s == pytest.approx(33)
    assert simulate_events(issued, Network(cluster=cluster, costs=costs)).step_s == pytest.approx(3 + 2 * 16.25)


@pytest.mark.parametrize(
    ("at_s", "end_s"),
    [
        (0.5, 21),  # before it: 100 bytes at 5 bytes/s, from 1 on
        (1, 21),
        (6, 16),  # 50 bytes have moved, the other 50 take 10 s
        (11, 11),  # just when it ends
        (20, 11),
    ],
)
def test_a_link_that_falls_to_half(at_s: float, end_s: float) -> None:
    """100 bytes from rank 0 to rank 2 at 10 bytes/s, from 1 s on: done at 11 if nothing happens."""
    cluster = two_nodes()
    costs = Roofline(cluster)
    issued = program(compute("gate", 1, 1, 1, 1), priced(moves((0, 2, 100)), costs))
    network = Network(cluster=cluster, costs=costs)
    timeline = simulate_events(issued, network, disturbed(f"nic0-leaf0=0.5@{at_s}"))
    assert timeline.step_s == pytest.approx(end_s)


def test_a_link_that_falls_twice() -> None:
    """10 bytes/s for 5 s, 5 bytes/s for 6 s, then rank 2's NIC has 1 byte/s for the last 20 bytes: 5 + 6 + 20."""
    cluster = two_nodes()
    costs = Roofline(cluster)
    faults = disturbed("nic2=0.1@11", "nic0-leaf0=0.5@5")  # in whatever order they are given
    timeline = simulate_events(
        program(priced(moves((0, 2, 100)), costs)), Network(cluster=cluster, costs=costs), faults
    )
    assert timeline.step_s == pytest.approx(31)


@pytest.mark.parametrize(
    ("at_s", "end_s"),
    [
        (2, 44),  # in the 3 s that no byte costs: then all 100 bytes at 5 bytes/s, twice: 1 + 3 + 40
        (14, 34),  # after 10 s of moving, 50 bytes are left: twice 10 s
    ],
)
def test_a_link_that_falls_to_half_under_a_price_of_its_own(at_s: float, end_s: float) -> None:
    """1 s of compute, then 3 + 2 * 10 s: done at 24 if nothing happens."""
    cluster = two_nodes()
    costs = Slower(Roofline(cluster))
    issued = program(compute("gate", 1, 1, 1, 1), priced(moves((0, 2, 100)), costs))
    network = Network(cluster=cluster, costs=costs)
    assert simulate_events(issued, network).step_s == pytest.approx(24)
    timeline = simulate_events(issued, network, disturbed(f"nic0-leaf0=0.5@{at_s}"))
    assert timeline.step_s == pytest.approx(end_s)


def exchanges() -> st.SearchStrategy[list[NDArray[np.int64]]]:
    rows = st.lists(st.sampled_from([0, 0, 1, 7, 50, 1000]), min_size=16, max_size=16)
    return st.lists(rows.map(lambda flat: np.array(flat, dtype=np.int64).reshape(4, 4)), min_size=1, max_size=3)


def step_s(cluster: Cluster, rows: Sequence[NDArray[np.int64]]) -> tuple[float, float]:
    """What a step of exchanges alone takes: analytic and event."""
    costs = Roofline(cluster)
    issued = program(*(priced(exchange_of(rows_GG), costs) for rows_GG in rows))
    event = simulate_events(issued, Network(cluster=cluster, costs=costs))
    return simulate_analytic(issued).step_s, event.step_s


@settings(max_examples=60, deadline=None)
@given(rows=exchanges(), oversubscription=st.sampled_from([1.0, 2.5, 8.0]), times=st.sampled_from([1.5, 2.0, 10.0]))
def test_faster_links_never_hurt_a_step_that_only_communicates(
    rows: Sequence[NDArray[np.int64]], oversubscription: float, times: float
) -> None:
    analytic_s, event_s = step_s(two_nodes(oversubscription), rows)
    faster_analytic_s, faster_event_s = step_s(two_nodes(oversubscription, times=times), rows)
    assert faster_event_s <= event_s * (1 + 1e-9)
    # They are exactly so many times as fast.
    assert faster_event_s * times == pytest.approx(event_s)
    assert faster_analytic_s * times == pytest.approx(analytic_s)


@settings(max_examples=60, deadline=None)
@given(rows=exchanges(), oversubscription=st.sampled_from([1.0, 2.5, 8.0]))
def test_links_that_contend_only_ever_add(rows: Sequence[NDArray[np.int64]], oversubscription: float) -> None:
    analytic_s, event_s = step_s(two_nodes(oversubscription), rows)
    assert analytic_s <= event_s * (1 + 1e-9)
    if oversubscription == 1:
        assert analytic_s == event_s
    # Less above the leaves is never faster.
    assert event_s >= step_s(two_nodes(), rows)[1] * (1 - 1e-9)


# --- ranks


# Ranks of one node, whose links play no part.
NODE = gpu_cluster(replace(SMALL, ranks_per_node=8), 2, host=False)
NETWORK = Network(cluster=NODE, costs=Roofline(NODE))


def test_a_gpu_that_falls_to_half_speed_in_the_middle_of_a_kernel() -> None:
    """Two kernels of 2 s. At 1 s half the speed: 1 s of the first is left and takes 2, the second takes 4."""
    issued = program(compute("gate", 2, 2), compute("experts", 2, 2))
    timeline = simulate_events(issued, NETWORK, disturbed("gpu0=0.5@1"))
    assert spans(timeline, 0) == [("gate", 0, 3), ("experts", 3, 7)]
    assert spans(timeline, 1) == [("gate", 0, 2), ("experts", 2, 4)]


def test_speeds_are_shares_of_what_the_rank_had_at_first() -> None:
    """4 s of work: 1 s at full speed, 1 s in the 2 s at a half, the other 2 at a quarter: until 1 + 2 + 8."""
    timeline = simulate_events(program(compute("gate", 4, 1)), NETWORK, disturbed("gpu0=0.25@3", "gpu0=0.5@1"))
    assert spans(timeline, 0) == [("gate", 0, 11)]


def test_a_slow_gpu_between_kernels_slows_what_comes() -> None:
    """Rank 0 waits for rank 1 until 3; it is slow from 2 on, so that its second kernel of 1 s takes 2."""
    issued = program(compute("gate", 1, 3), communicate("dispatch", 1, 2), compute("experts", 1, 1))
    timeline = simulate_events(issued, NETWORK, disturbed("gpu0=0.5@2"))
    assert spans(timeline, 0) == [("gate", 0, 1), ("dispatch", 3, 4), ("experts", 4, 6)]


def test_a_slow_gpu_and_taken_multiprocessors_multiply() -> None:
    """Half the speed and half the multiprocessors: a kernel of 1 s beside a collective of 8 s takes 4."""
    issued = program(
        replace(compute("shared", 1, 1), under_next=True), replace(communicate("dispatch", 8, 2), sms_share=0.5)
    )
    timeline = simulate_events(issued, NETWORK, disturbed("gpu0=0.5@0"))
    assert [span for span in spans(timeline, 0) if span[0] == "shared"] == [("shared", 0, 4)]
    assert [span for span in spans(timeline, 1) if span[0] == "shared"] == [("shared", 0, 2)]


TWO_LAYERS = (
    compute("gate", 2, 3),
    communicate("dispatch", 1, 2),
    compute("experts", 1, 1),
    communicate("return", 1, 2),
)


def test_when_a_rank_is_lost_the_others_wait_until_they_know_and_go_on() -> None:
    """Rank 1 is lost at 2, in its gate. Rank 0 comes to the dispatch at 2 and goes on at 2 + 4, alone.

    rank 0  gate 0-2, waits 2-6, dispatch 6-7, experts 7-8, return 8-9
    """
    timeline = simulate_events(program(*TWO_LAYERS), NETWORK, disturbed("rank1=lost@2", detect_s=4))
    assert spans(timeline, 0) == [("gate", 0, 2), ("dispatch", 6, 7), ("experts", 7, 8), ("return", 8, 9)]
    assert spans(timeline, 1) == []  # its gate never ended
    assert timeline.step_s == 9


def test_a_rank_lost_in_a_collective_does_not_end_it() -> None:
    """At 3.5, in the dispatch from 3 to 4, which the other ends. It waits at the return for the lost one, until 7.5."""
    timeline = simulate_events(program(*TWO_LAYERS), NETWORK, disturbed("rank1=lost@3.5", detect_s=4))
    assert spans(timeline, 0) == [("gate", 0, 2), ("dispatch", 3, 4), ("experts", 4, 5), ("return", 7.5, 8.5)]
    assert spans(timeline, 1) == [("gate", 0, 3)]


def test_a_loss_that_is_known_before_anyone_waits_costs_no_time() -> None:
    timeline = simulate_events(program(*TWO_LAYERS), NETWORK, disturbed("rank1=lost@1", detect_s=0.5))
    assert spans(timeline, 0) == [("gate", 0, 2), ("dispatch", 2, 3), ("experts", 3, 4), ("return", 4, 5)]


def test_a_run_needs_a_rank_that_is_left() -> None:
    with pytest.raises(InputError, match=r"all 2 ranks of .* are lost; leave at least one"):
        simulate_events(program(*TWO_LAYERS), NETWORK, disturbed("rank0=lost@2.5", "rank1=lost@3.5"))


def test_a_lost_rank_has_run_what_it_had_finished() -> None:
    # Two kernels of a second each in a row; it is lost in the middle of the second.
    timeline = simulate_events(
        program(compute("gate", 1, 1), compute("route", 1, 1), communicate("dispatch", 1, 2)),
        NETWORK,
        disturbed("rank0=lost@1.5", detect_s=1),
    )
    assert spans(timeline, 0) == [("gate", 0, 1)]
    assert [span[0] for span in spans(timeline, 1)] == ["gate", "route", "dispatch"]


def test_a_gpu_recovers() -> None:
    # 4 s of work: one done by 1 s, half a one by 2 s, the other 2.5 at full speed.
    timeline = simulate_events(program(compute("experts", 4, 1)), NETWORK, disturbed("gpu0=0.5@1", "gpu0=1@2"))
    assert spans(timeline, 0) == [("experts", 0, 4.5)]


def test_a_link_recovers() -> None:
    rows_GG = np.array([[0, 10], [0, 0]])
    steady, dips = (
        simulate_events(program(priced(exchange_of(rows_GG), Roofline(NETWORK.cluster))), NETWORK, disturbance)
        for disturbance in (None, disturbed("switch0-gpu1=0.5@0", "switch0-gpu1=1@1e-9"))
    )
    assert steady.step_s < dips.step_s <= steady.step_s + 1e-9


def test_a_fault_after_the_end_changes_nothing() -> None:
    undisturbed = simulate_events(program(*TWO_LAYERS), NETWORK)
    assert undisturbed.step_s == 6
    for fault in ("rank1=lost@6.5", "gpu0=0.5@6.5", "gpu0-switch0=0.5@6.5"):
        timeline = simulate_events(program(*TWO_LAYERS), NETWORK, disturbed(fault))
        np.testing.assert_array_equal(timeline.start_OG, undisturbed.start_OG)
        np.testing.assert_array_equal(timeline.end_OG, undisturbed.end_OG)


@settings(max_examples=60, deadline=None)
@given(
    seconds=st.lists(st.lists(st.floats(0, 5), min_size=4, max_size=4), min_size=1, max_size=4),
    lost=st.integers(0, 3),
    at_s=st.floats(0, 20),
    detect_s=st.floats(0, 5),
)
def test_a_lost_rank_stops_and_the_others_finish(
    seconds: list[list[float]], lost: int, at_s: float, detect_s: float
) -> None:
    cluster = gpu_cluster(replace(SMALL, ranks_per_node=8), 4)
    stages = [
        stage
        for place, of_ranks in enumerate(seconds)
        for stage in (compute(f"c{place}", *of_ranks), communicate(f"x{place}", of_ranks[0], 4))
    ]
    network = Network(cluster=cluster, costs=Roofline(cluster))
    undisturbed = simulate_events(program(*stages), network)
    faults = Disturbance(faults=(Fault(change=f"rank{lost}=lost", at_s=at_s),), detect_s=detect_s)
    timeline = simulate_events(program(*stages), network, faults)
    others = [rank for rank in range(4) if rank != lost]
    assert not np.isnan(timeline.end_OG[:, others]).any()
    ran_O = ~np.isnan(timeline.end_OG[:, lost])
    assert (timeline.end_OG[ran_O, lost] <= at_s + 1e-9).all()
    np.testing.assert_array_equal(timeline.end_OG[ran_O, lost], undisturbed.end_OG[ran_O, lost])
    assert timeline.step_s <= max(undisturbed.step_s, at_s + detect_s + undisturbed.step_s) + 1e-9


# --- what varies


def test_jitter_has_a_mean_of_one() -> None:
    """400 kernels of 1 s on each of two ranks: on average 1 s, with the deviation asked for."""
    gate = Stage(name="gate", stream="compute", seconds_LG=np.ones((400, 2)))
    timeline = simulate_events(program(gate), None, Disturbance(jitter=0.2, seed=3))
    seconds = timeline.end_OG - timeline.start_OG
    assert seconds.mean() == pytest.approx(1, abs=4 * 0.2 / np.sqrt(800))
    assert seconds.std() == pytest.approx(0.2, rel=0.15)
    assert (seconds > 0).all()


def test_a_collective_varies_for_all_ranks_alike() -> None:
    dispatch = Stage(name="dispatch", stream="communication", seconds_LG=np.ones((5, 2)))
    timeline = simulate_events(program(dispatch), None, Disturbance(jitter=0.2, seed=3))
    np.testing.assert_array_equal(timeline.end_OG[:, 0], timeline.end_OG[:, 1])
    assert len(set((timeline.end_OG - timeline.start_OG)[:, 0].round(9))) == 5


def test_no_jitter_is_no_disturbance() -> None:
    calm = simulate_events(program(*TWO_LAYERS), None, Disturbance(jitter=0.0, seed=5))
    np.testing.assert_array_equal(calm.end_OG, simulate_events(program(*TWO_LAYERS)).end_OG)


def test_slow_ranks_make_all_wait() -> None:
    """With jitter the slowest of many counts at each collective, so that a step takes longer than the mean."""
    ranks = 16
    stages = [
        Stage(name="gate", stream="compute", seconds_LG=np.ones((50, ranks))),
        Stage(name="dispatch", stream="communication", seconds_LG=np.zeros((50, ranks))),
    ]
    assert simulate_events(program(*stages), None, Disturbance(jitter=0.1)).step_s > 50 * 1.1


# --- what is refused


@pytest.mark.parametrize("text", ["rank7", "rank7=lost", "rank7=lost@", "rank7=lost@soon", "@1", "rank7=lost@1@2"])
def test_a_fault_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError) as refused:
        Fault.parse(text)
    assert str(refused.value) == f"fault {text!r}: not of the form change@seconds, as rank7=lost@0.012"


@pytest.mark.parametrize("at", ["-1", "1e999"])
def test_a_time_that_cannot_be_is_refused(at: str) -> None:
    with pytest.raises(InputError, match="its time must be 0 or more"):
        Fault.parse(f"rank7=lost@{at}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jitter": -0.1}, "jitter is -0.1; it must be 0 or more"),
        ({"detect_s": float("nan")}, "detect_s is nan; it must be 0 or more"),
    ],
    ids=["jitter", "detect"],
)
def test_a_disturbance_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        Disturbance(**options)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("rank7=lost@1", "there is no rank7; the ranks are gpu0 to gpu1"),
        ("nic0=0.5@1", "there is no nic0"),
        ("gpu0=2@1", "'2' is neither lost nor a share between 0 and 1"),
        ("gpu0-switch0=lost@1", "no path from"),
    ],
    ids=["rank", "part", "share", "cut off"],
)
def test_a_fault_that_the_cluster_cannot_have_is_refused(fault: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulate_events(program(*TWO_LAYERS), NETWORK, disturbed(fault))


def test_jitter_differs_from_step_to_step_and_repeats() -> None:
    gate = program(compute("gate", 1, 1))
    disturbance = Disturbance(jitter=0.2, seed=3)
    first, second, again = (simulate_events(gate, NETWORK, disturbance, step=step).step_s for step in (0, 1, 0))
    assert first == again != second


def test_what_was_slowed_stays_slowed_when_the_other_is_lost() -> None:
    # Both at half pace from 1 s on: the 5 s of dispatch have done 1 at 3 s, when rank 0's kernel is lost; 4 are left.
    dispatch = replace(communicate("dispatch", 5, 2), pace=0.5)
    lanes = [
        (Block.of([compute("gate", 1, 1), dispatch]),),
        (Block.of([compute("gate", 9, 0), communicate("dispatch", 0, 2)]),),
    ]
    timeline = simulate_events(Program.of(lanes), NETWORK, disturbed("rank0=lost@3", detect_s=0.5))
    ends = {(i.lane, i.operation): i.end_s for i in timeline.intervals if i.rank == 1}
    assert ends[0, "dispatch"] == pytest.approx(7)


def test_a_link_that_changes_after_a_collective_leaves_it_alone() -> None:
    cluster = two_nodes()
    network = Network(cluster=cluster, costs=Roofline(cluster))
    uneven = exchange_of(np.random.default_rng(0).integers(0, 50, (4, 4)))
    step = program(*[replace(priced(uneven, network.costs), name="dispatch")])
    before = simulate_events(step, network).step_s
    assert simulate_events(step, network, disturbed("nic0=0.5@1e6")).step_s == before

"""Placements that follow their traffic, step by step."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from recorder import Recorder

from cost_models.cluster import gpu_cluster
from cost_models.devices import DEVICES
from cost_models.ops import WeightTransfer
from cost_models.roofline import Roofline
from router.placement import place
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.policies.top_k import TopK
from router.rebalance import Incremental, Never
from sim.execution import Execution
from sim.layout import Layout
from sim.rebalancing import fetched_GG, migration_s, rebalance_over_time
from sim.replay import Replay
from sim.replayed_steps import ReplayedSteps
from traces.batching import make_steps
from traces.errors import InputError
from traces.model import ModelSpec
from traces.presets import preset
from traces.synthetic import synthetic_trace

TINY = ModelSpec(name="tiny", layers=2, experts=4, top_k=2, hidden=8, expert_hidden=16)  # an expert is 768 bytes
LOADS = np.arange(48).reshape(6, 2, 4)


def placed(*slots_LS: Any, ranks: int = 2) -> Placement:
    slots = np.array(slots_LS)
    return Placement(slot_to_expert_LS=slots, experts=int(slots.max()) + 1, ranks=ranks)


BEFORE = placed([0, 1, 2, 3], [0, 1, 2, 3])
AFTER = placed([2, 1, 0, 3], [0, 3, 2, 1])  # a swap in each layer: two slots each


@dataclass(frozen=True, kw_only=True)
class AtStep:
    """Asks for one placement before one step, and remembers what it was shown."""

    at: int
    wanted: Placement
    window: int = 2
    name: str = "at step"
    seen: list[tuple[int, Any]] = field(default_factory=list)

    def next(self, step: int, current: Placement, window_WLE: Any) -> Placement:
        self.seen.append((step, window_WLE))
        return self.wanted if step == self.at else current


def run(rebalancer: Any, **options: Any) -> tuple[Any, list[Placement]]:
    """A step takes 10 s; a move takes 3 s. Also the placement of each step."""
    met: list[Placement] = []

    def step_s(step: int, placement: Placement) -> float:
        met.append(placement)
        return 10.0

    done = rebalance_over_time(rebalancer, BEFORE, LOADS, step_s=step_s, move_s=lambda before, after: 3.0, **options)
    return done, met


def test_a_step_waits_for_the_move_before_it_and_runs_on_what_is_in_place() -> None:
    done, met = run(AtStep(at=2, wanted=AFTER))
    assert [placement is AFTER for placement in met] == [False, False, True, True, True, True]
    assert done.stall_s_W.tolist() == [0, 0, 3, 0, 0, 0]
    assert done.moved_W.tolist() == [0, 0, 4, 0, 0, 0]
    assert (done.total_s, done.moved, done.rebalancings) == (63, 4, 1)


def test_a_plan_that_changes_nothing_is_no_rebalancing() -> None:
    same = placed(*BEFORE.slot_to_expert_LS.tolist())
    assert same is not BEFORE
    done, met = run(AtStep(at=2, wanted=same))
    assert done.rebalancings == 0
    assert done.stall_s_W.tolist() == [0] * 6
    assert all(placement is BEFORE for placement in met)


def test_layers_can_move_one_a_step() -> None:
    rebalancer = AtStep(at=2, wanted=AFTER)
    done, met = run(rebalancer, layers_per_step=1)
    assert done.stall_s_W.tolist() == [0, 0, 3, 3, 0, 0]
    assert done.moved_W.tolist() == [0, 0, 2, 2, 0, 0]
    assert met[2].slot_to_expert_LS.tolist() == [[2, 1, 0, 3], [0, 1, 2, 3]]
    assert met[3] is AFTER
    assert [step for step, _ in rebalancer.seen] == [0, 1, 2, 4, 5]  # not asked before step 3: a move is under way
    assert done.rebalancings == 1


def test_a_rebalancer_sees_only_steps_that_are_over() -> None:
    rebalancer = AtStep(at=99, wanted=AFTER)
    run(rebalancer)
    for step, window_WLE in rebalancer.seen:
        np.testing.assert_array_equal(window_WLE, LOADS[max(step - 2, 0) : step])


def test_what_comes_later_changes_nothing_before() -> None:
    """The same decisions up to a step whatever that step and later ones bring."""
    rng = np.random.default_rng(4)
    loads_WLE = rng.integers(0, 50, size=(9, 2, 16))
    start = place("lpt", loads_WLE[0], ranks=4, slots=20)
    met: list[list[Any]] = []
    for other in range(2):
        changed_WLE = loads_WLE.copy()
        changed_WLE[6:] = rng.integers(0, 50, size=(3, 2, 16)) * other
        placements: list[Any] = []

        def step_s(step: int, placement: Placement, placements: list[Any] = placements) -> float:
            placements.append(placement.slot_to_expert_LS)
            return 1.0

        rebalancer = Incremental(every=2, window=3, budget_share=0.2)
        rebalance_over_time(rebalancer, start, changed_WLE, step_s=step_s, move_s=lambda before, after: 0.0)
        met.append(placements)
    np.testing.assert_array_equal(np.stack(met[0][:7]), np.stack(met[1][:7]))  # step 6 is served on steps 0 to 5
    assert (met[0][6] != met[0][0]).any()
    assert (met[0][8] != met[1][8]).any()


def test_weights_come_from_the_nearest_rank_that_held_them() -> None:
    """Four ranks on two nodes with a slot each; expert 0 on ranks 0 and 2, 1 on rank 1, 2 on rank 3.

    Then rank 1 wants expert 0 and fetches it from rank 0 on its node, though rank 2 is as near by number; rank 2 wants
    expert 1, and only rank 1 has it.
    """
    before, after = placed([0, 1, 0, 2], ranks=4), placed([0, 0, 1, 2], ranks=4)
    fetched = np.zeros((4, 4), dtype=int)
    fetched[0, 1] = fetched[1, 2] = 1
    np.testing.assert_array_equal(fetched_GG(before, after, np.array([0, 0, 1, 1])), fetched)
    # On one node the next rank up serves: rank 2 for rank 1.
    fetched[0, 1], fetched[2, 1] = 0, 1
    np.testing.assert_array_equal(fetched_GG(before, after, np.zeros(4, dtype=int)), fetched)
    with pytest.raises(InputError, match="give placements of one deployment"):
        fetched_GG(before, after, np.zeros(2, dtype=int))


def test_all_weights_travel_at_once_as_the_cost_model_says() -> None:
    costs = Recorder()
    assert migration_s(BEFORE, AFTER, TINY, costs, Layout.one_node(2)) == 1.0  # the first thing that it is asked for
    assert migration_s(BEFORE, BEFORE, TINY, costs, Layout.one_node(2)) == 0.0  # asks nothing
    (transfer,) = costs.asked
    assert type(transfer) is WeightTransfer
    assert transfer.bytes_XGG.tolist() == [[[0, 2 * 768], [2 * 768, 0]]]


def test_ranks_that_share_widths_fetch_their_shares() -> None:
    costs = Recorder()
    layout = Layout(node_of_G=np.zeros(4, dtype=np.int64), expert_tensor=2)
    migration_s(BEFORE, AFTER, TINY, costs, layout)
    (transfer,) = costs.asked
    assert isinstance(transfer, WeightTransfer)
    assert transfer.bytes_XGG[0].tolist() == [[0, 0, 768, 0], [0, 0, 0, 768], [768, 0, 0, 0], [0, 768, 0, 0]]


def test_a_replay_step_by_step_takes_what_the_replay_takes() -> None:
    model = preset("qwen3-30b-a3b")
    trace = synthetic_trace(model, tokens=128, zipf=0.8, seed=3, phase="decode")
    cluster = gpu_cluster(DEVICES["h100_sxm"], 8)
    steps = make_steps(trace, phase="decode", tokens_per_rank=2, ranks=8, limit=3)
    replay = Replay(
        trace=trace,
        steps=steps,
        cluster=cluster,
        costs=Roofline(cluster),
        phase="decode",
        execution=Execution(extent="moe"),
    )
    policy = RoutingPolicy(selection=TopK(k=8))
    placement = place("lpt", trace.loads_LE(), ranks=8, slots=136)
    replayed = ReplayedSteps(replay=replay, policy=policy)
    assert replayed.loads_WLE.shape == (3, model.layers, model.experts)
    assert (replayed.loads_WLE.sum(axis=2) == 2 * 8 * 8).all()
    done = rebalance_over_time(
        Never(), placement, replayed.loads_WLE, step_s=replayed.step_s, move_s=lambda before, after: 0.0
    )
    _, timelines, _ = replay.run(policy, placement)
    np.testing.assert_allclose(done.step_s_W, [timeline.step_s for timeline in timelines], rtol=1e-12)


def test_bad_requests_are_refused_with_the_mend() -> None:
    with pytest.raises(InputError, match=r"loads of shape \(6, 2, 3\) for a placement of 2 layers of 4 experts"):
        rebalance_over_time(Never(), BEFORE, LOADS[:, :, :3], step_s=lambda s, p: 0.0, move_s=lambda b, a: 0.0)
    with pytest.raises(InputError, match="layers_per_step is 0; use at least 1"):
        run(Never(), layers_per_step=0)

"""A replay of four tokens on two ranks, every figure of its report by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cost_models.cluster import cpu_box, gpu_cluster
from cost_models.devices import DEVICES
from cost_models.ops import (
    AllToAll,
    Combine,
    DenseMlp,
    Experts,
    Gate,
    Operation,
    Permute,
    Prediction,
    Regroup,
    Route,
    TokenExchange,
)
from router.capacity import Capacity
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.policies.top_k import TopK
from router.policies.top_p import TopP
from sim.execution import Execution
from sim.replay import Replay, rows_by_rank
from sim.report import Report
from traces.batching import make_steps
from traces.errors import InputError
from traces.model import ModelSpec
from traces.trace import RoutingTrace

# A row is 8 * 2 = 16 bytes, an expert 3 * 8 * 16 = 384 parameters of 2 bytes.
TINY = ModelSpec(name="tiny", layers=1, experts=4, top_k=2, hidden=8, expert_hidden=16, kv_bytes_per_token=10)
# Rank 0 holds experts 0 and 1, rank 1 holds 2 and 3; tokens 0 and 1 are rank 0's, 2 and 3 are rank 1's.
PLACEMENT = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3]]), experts=4, ranks=2)
IDS = [[0, 1], [0, 2], [0, 3], [1, 0]]
GATES = [[0.5, 0.25], [0.5, 0.25], [0.75, 0.125], [0.5, 0.5]]
TOP_2 = RoutingPolicy(selection=TopK(k=2))


class FixedCosts:
    """Whole seconds by operation; an expert MLP takes a second a row."""

    name = "by hand"
    _SECONDS = {Gate: 1, Route: 2, Permute: 3, AllToAll: 4, Regroup: 5, Combine: 6}  # noqa: RUF012  # never changed

    included: frozenset[type] = frozenset()

    def predict(self, operation: Operation) -> Prediction:
        return Prediction.unmeasured(self.seconds(operation))

    def seconds(self, operation: Operation) -> Any:
        match operation:
            case Experts(rows_XS=rows_XS):
                return np.asarray(rows_XS).sum(axis=-1).astype(float)
            case DenseMlp(rows_X=rows_X):
                return np.asarray(rows_X).astype(float)
            case AllToAll(bytes_XGG=bytes_XGG):
                return np.full(np.shape(bytes_XGG)[:-2], 4.0)
            case TokenExchange(tokens_X=tokens_X):
                return np.full(np.shape(tokens_X), 4.0)
            case Gate(tokens_X=size_X) | Route(tokens_X=size_X) | Permute(rows_X=size_X) | Regroup(rows_X=size_X):
                return np.full(np.shape(size_X), float(self._SECONDS[type(operation)]))
            case Combine(rows_X=size_X):
                return np.full(np.shape(size_X), 6.0)
            case _:
                raise AssertionError(operation)


def trace_of(ids: Any = IDS, gates: Any = GATES, model: ModelSpec = TINY, **columns: Any) -> RoutingTrace:
    ids_TLC = np.array(ids, dtype=np.uint16)[:, None, :]
    given = {
        "gates_TLC": None if gates is None else np.array(gates, dtype=np.float16)[:, None, :],
        "request_T": np.array([0, 0, 1, 1], dtype=np.int32),
        "position_T": np.array([0, 1, 0, 1], dtype=np.int32),
        "phase_T": np.zeros(4, dtype=np.uint8),
        "score_kind": "softmax",
        "source": "by hand",
        **columns,
    }
    return RoutingTrace(model=model, expert_ids_TLC=ids_TLC, **given)


def replay_of(trace: RoutingTrace, *, tokens_per_rank: int = 2, **options: Any) -> Replay:
    """Of the MoE layers alone."""
    steps = make_steps(trace, phase="prefill", tokens_per_rank=tokens_per_rank, ranks=2)
    execution = Execution(extent="moe")
    return Replay(
        trace=trace, steps=steps, **{"cluster": cpu_box(2), "costs": FixedCosts(), "execution": execution, **options}
    )


def report_of(policy: RoutingPolicy = TOP_2, trace: RoutingTrace | None = None, **options: Any) -> Report:
    return replay_of(trace or trace_of(), **options).run(policy, PLACEMENT)[0]


def test_the_step_by_hand() -> None:
    # Expert rows: 4, 2 on rank 0 and 1, 1 on rank 1: experts take 6 s and 2 s.
    # Gate 1, route 2, permute 3: at 6 s. Counts 4: 10. Dispatch 4: 14. Regroup 5: 19. Experts: 25 and 21.
    # Ungroup 5: 30 and 26. Return 4, from 30: 34. Combine 6: 40.
    report = report_of()
    assert report.step_s == 40
    assert report.step_s_by_step == (40.0,)
    assert (report.tokens_per_s, report.tokens_per_s_per_rank) == (4 / 40, 2 / 40)
    assert report.stage_s == {
        "gate": 1,
        "route": 2,
        "permute": 3,
        "counts": 4,
        "dispatch": 4,
        "regroup": 5,
        "experts": 4,  # the mean of 6 and 2
        "ungroup": 5,
        "return": 4,
        "combine": 6,
    }
    assert report.waiting_s == 2  # rank 1 waits 4 s for rank 0 at the return
    assert report.breakdown_s == {
        "gate": 1 + 2,
        "dispatch": 3 + 4 + 4 + 5,
        "experts": 4,
        "combine": 5 + 4 + 6,
    }
    assert report.waits_s == {"counts": 0, "dispatch": 0, "return": 2}
    assert report.critical_rank_by_layer == (0,)
    assert report.lost_share == 0


def test_imbalance_by_hand() -> None:
    # Rows: 6 and 2, mean 4. Active experts: 2 and 2.
    report = report_of()
    assert (report.token_imbalance, report.active_imbalance) == (6 / 4, 1)
    # k = 1: rank 0 has all 4 rows of 2 experts, rank 1 none: twice the mean.
    report = report_of(RoutingPolicy(selection=TopK(k=1)))
    assert (report.token_imbalance, report.active_imbalance) == (2, 2)


def test_imbalance_is_averaged_over_layers() -> None:
    # Layer 0 as above: 6 and 2 rows, 3/2. In layer 1 every token has an expert on each rank: 4 and 4, 1.
    model = replace(TINY, layers=2)
    ids_TLC = np.stack([np.array(IDS), np.array([[0, 2], [1, 3], [0, 2], [1, 3]])], axis=1).astype(np.uint16)
    gates_TLC = np.repeat(np.array(GATES, dtype=np.float16)[:, None, :], 2, axis=1)
    trace = replace(trace_of(), model=model, expert_ids_TLC=ids_TLC, gates_TLC=gates_TLC)
    placement = Placement(slot_to_expert_LS=np.tile(np.arange(4), (2, 1)), experts=4, ranks=2)
    report, _, works = replay_of(trace).run(TOP_2, placement)
    assert rows_by_rank(works).tolist() == [[6, 2], [4, 4]]
    assert report.token_imbalance == (6 / 4 + 1) / 2


def test_imbalance_is_averaged_over_steps() -> None:
    # One token a rank and step. Tokens 0 and 2: rows e0 e1 e0 and e3. Tokens 1 and 3: e0 e1 e0 and e2.
    report, _, works = replay_of(trace_of(), tokens_per_rank=1).run(TOP_2, PLACEMENT)
    assert report.steps == 2
    assert report.token_imbalance == 3 / 2
    assert rows_by_rank(works).tolist() == [[6, 2]]


def test_quality_by_hand() -> None:
    # The model's own top 2 has .75 + .75 + .875 + 1 = 3.375.
    everything = report_of()
    assert (everything.gate_mass, everything.dropped_share, everything.experts_per_token) == (1, 0, 2)
    # The best of each: .5 + .5 + .75 + .5 = 2.25.
    one = report_of(RoutingPolicy(selection=TopK(k=1)))
    assert one.gate_mass == pytest.approx(2.25 / 3.375)
    assert (one.dropped_share, one.experts_per_token) == (0, 1)
    # Until .6: tokens 0, 1 and 3 need two, token 2 one: .75 + .75 + .75 + 1.
    some = report_of(RoutingPolicy(selection=TopP(p=0.6, k_max=2)))
    assert some.gate_mass == pytest.approx(3.25 / 3.375)
    assert (some.dropped_share, some.experts_per_token) == (0, 7 / 4)


def test_drops_by_hand() -> None:
    # C = ceil(1 * 2 * 2 / 4) = 1 pair an expert and rank. Token 1 loses expert 0, token 3 its second choice, expert 0.
    report = report_of(RoutingPolicy(selection=TopK(k=2), capacity=Capacity(factor=1.0, drop="position")))
    assert report.dropped_share == 2 / 8
    assert report.experts_per_token == 6 / 4
    assert report.gate_mass == pytest.approx((0.75 + 0.25 + 0.875 + 0.5) / 3.375)
    assert report.token_imbalance == 4 / 3  # rows 4 (e0 e1 | e0 e1) and 2


def test_null_experts_by_hand() -> None:
    # Experts 4 and 5 do no work: what is left is e1 | e0 e2 | e0 and nothing. Rows: 3 and 1, of which token 1's for
    # expert 2 and token 2's for expert 0 travel.
    model = replace(TINY, null_experts=2)
    report = report_of(trace=trace_of([[4, 1], [0, 2], [0, 5], [5, 4]], model=model))
    assert (report.gate_mass, report.dropped_share, report.rerouted_share, report.experts_per_token) == (1, 0, 0, 1)
    assert report.token_imbalance == 3 / 2
    assert report.bytes_by_tier == {"scale_up": 2 * 2 * 16, "scale_out": 0}
    assert report.expert_flops_per_token == 2 * 384
    # Nobody needs a real expert: nothing is computed, nothing travels, nothing is lost.
    report = report_of(trace=trace_of([[4, 5], [4, 5], [5, 4], [5, 4]], model=model))
    assert (report.gate_mass, report.dropped_share, report.experts_per_token) == (1, 0, 0)
    assert report.network_bytes_per_step == 0
    assert report.stage_s["experts"] == 0


def test_traffic_by_hand() -> None:
    # Away from home: token 1 to expert 2; token 2 to 0; token 3 to 1 and 0: 4 rows of 16 bytes, there and back.
    report = report_of()
    assert report.bytes_by_tier == {"scale_up": 2 * 4 * 16, "scale_out": 0}
    assert report.network_bytes_per_step == report.to_json()["network_bytes_per_step"] == 2 * 4 * 16
    # Once to each rank, token 3's row is sent once.
    assert report_of(protocol="per_rank").network_bytes_per_step == 2 * 3 * 16
    # The same between nodes.
    apart = gpu_cluster(replace(DEVICES["h100_sxm"], ranks_per_node=1), 2)
    far = replace(replay_of(trace_of()), cluster=apart).run(RoutingPolicy(selection=TopK(k=2)), PLACEMENT)[0]
    assert far.bytes_by_tier == {"scale_up": 0, "scale_out": 2 * 4 * 16}


def test_flops_and_memory_by_hand() -> None:
    report = report_of(kv_tokens_per_rank=7, protocol="per_rank")
    assert report.expert_flops_per_token == 2 * 2 * 384  # two experts, a multiply-add is two
    assert report.memory.expert_bytes == 2 * 384 * 2  # two slots a rank
    # Each rank's request of two tokens looks back on 7: the cache then holds 9, of 10 bytes.
    assert report.memory.kv_cache_bytes == 90
    assert report.memory.buffer_bytes == 2 * 2 * 2 * 16  # 2 tokens a rank, 2 experts each, sent and received
    assert report.memory.other_weight_bytes == 0
    assert report.memory.total_bytes == 1536 + 90 + 128
    assert report.to_json()["memory_bytes"] == 1754
    assert report.to_json()["fits"] is True  # the host's memory is not known


def test_hidden_shared_experts_cost_no_time_and_are_no_wait() -> None:
    """A shared expert of 2 s runs under the dispatch of 4 s: the step is still 40 s, rank 1 still waits 4 s."""
    model = replace(TINY, shared_experts=1, shared_hidden=16)
    report = report_of(trace=trace_of(model=model))
    assert report.stage_s["shared"] == 2
    assert report.step_s == 40
    assert report.waiting_s == 2
    assert report.expert_flops_per_token == 2 * (2 * 384 + 384)


def test_the_device_of_the_cluster_bounds_the_memory() -> None:
    device = replace(DEVICES["h100_sxm"], memory_bytes=1000.0)
    replay = replace(replay_of(trace_of()), cluster=gpu_cluster(device, 2))
    report = replay.run(TOP_2, PLACEMENT)[0]
    assert report.memory.capacity_bytes == 1000
    assert report.to_json()["fits"] is False


def test_a_report_is_named_after_its_policy_unless_told() -> None:
    assert report_of().name == "top_k(k=2)"
    assert replay_of(trace_of()).run(TOP_2, PLACEMENT, name="mine")[0].name == "mine"
    assert (report_of().costs, report_of().fidelity) == ("by hand", "analytic")


def test_a_trace_without_gates_cannot_be_replayed() -> None:
    with pytest.raises(InputError, match="trace by hand has no gates; policies need the scores of the candidates"):
        report_of(trace=trace_of(gates=None, score_kind="none"))


def test_a_trace_of_logits_is_refused_or_made_into_scores() -> None:
    """Logits may be negative: as weights they would turn experts' outputs round, as scores make a share of nothing."""
    trace = trace_of(gates=[[2.0, -1.0], [1.0, -1.0], [-1.0, -2.0], [0.5, 0.0]], score_kind="logits")
    try:
        assignments, quality = replay_of(trace).route(TOP_2)
    except InputError as refused:
        assert "logits" in str(refused)  # noqa: PT017  # either answer will do
        return
    weights_TK = assignments[0][0].weights_TK
    assert np.isfinite(weights_TK).all()
    assert (weights_TK >= 0).all()
    assert quality.gate_mass == pytest.approx(1)


def test_a_placement_of_another_size_is_refused() -> None:
    """The compiled kernels index by rank and slot without looking."""
    replay = replay_of(trace_of())
    for slot_to_expert_LS, experts, ranks in (
        ([[0, 1, 2, 3]], 4, 1),
        ([[0, 1, 2, 3]], 4, 4),
        ([[0, 1, 2, 3]] * 2, 4, 2),
        ([[0, 1]], 2, 2),
    ):
        placement = Placement(slot_to_expert_LS=np.array(slot_to_expert_LS), experts=experts, ranks=ranks)
        with pytest.raises(InputError) as refused:
            replay.run(TOP_2, placement)
        assert str(refused.value) == (
            f"the placement is for {len(slot_to_expert_LS)} layers of {experts} experts on {ranks} ranks, "
            "the replay has 1 of 4 on 2; place for these"
        )


def test_steps_for_more_ranks_than_the_cluster_has_are_refused() -> None:
    with pytest.raises(InputError, match="steps hold tokens of rank 1, but the cluster has 1 ranks"):
        replace(replay_of(trace_of()), cluster=cpu_box(1))

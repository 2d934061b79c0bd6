"""The real expert-parallel layer on two gloo ranks, against a naive dense computation and against the simulator.

All cases run in one group of processes, since starting it takes seconds.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from cost_models.microbench.ranks import RankGroup, run_on_ranks
from cost_models.ops import Operation, Prediction
from router.capacity import Capacity
from router.context import RouteContext
from router.nn import expert_parallel
from router.nn.expert_parallel import ExpertParallelMoE, MoEWeights, gate
from router.placement import place
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.policies.skip import Skip
from router.policies.top_k import TopK
from router.policies.top_p import TopP
from router.replicas import ReplicaChoice
from sim.blocks import blocks_of
from sim.execution import Execution
from sim.lower import lower
from traces.errors import InputError
from traces.model import ModelSpec

RANKS, LAYERS, E, D, F = 2, 2, 6, 8, 12
MODEL = ModelSpec(name="tiny", layers=LAYERS, experts=E, top_k=2, hidden=D, expert_hidden=F)


@dataclass(frozen=True, kw_only=True)
class Case:
    policy: RoutingPolicy
    placement: Placement
    tokens_by_rank: tuple[int, int] = (17, 17)
    replica_choice: ReplicaChoice = "even"
    renormalise: bool = True


def _placement(algorithm: str = "contiguous", slots: int = E) -> Placement:
    loads_LE = np.random.default_rng(0).random((LAYERS, E))
    return place(algorithm, loads_LE, ranks=RANKS, slots=slots, seed=1)


CASES = {
    "top-1": Case(policy=RoutingPolicy(selection=TopK(k=1)), placement=_placement()),
    "top-k": Case(policy=RoutingPolicy(selection=TopK(k=3)), placement=_placement("random")),
    "top-k as scored": Case(policy=RoutingPolicy(selection=TopK(k=2)), placement=_placement("lpt"), renormalise=False),
    "top-p": Case(policy=RoutingPolicy(selection=TopP(p=0.5, k_max=4)), placement=_placement("lpt")),
    "skip": Case(policy=RoutingPolicy(selection=Skip(threshold=0.6, k_max=3)), placement=_placement("random")),
    "capacity by probs": Case(
        policy=RoutingPolicy(selection=TopK(k=2), capacity=Capacity(factor=0.75, drop="probs")),
        placement=_placement(),
    ),
    "capacity by position": Case(
        policy=RoutingPolicy(selection=TopP(p=0.6, k_max=3), capacity=Capacity(factor=0.5, drop="position")),
        placement=_placement("random"),
    ),
    "replicas in turn": Case(policy=RoutingPolicy(selection=TopK(k=2)), placement=_placement("lpt", E + 4)),
    "replicas at home": Case(
        policy=RoutingPolicy(selection=TopK(k=2), capacity=Capacity(factor=1.0)),
        placement=_placement("lpt", 2 * E),
        replica_choice="local",
    ),
    "uneven ranks": Case(
        policy=RoutingPolicy(selection=TopK(k=2), capacity=Capacity(factor=0.75)),
        placement=_placement("lpt", E + 2),
        tokens_by_rank=(21, 4),
    ),
    "a rank without tokens": Case(
        policy=RoutingPolicy(selection=TopP(p=0.6, k_max=3), capacity=Capacity(factor=1.0)),
        placement=_placement(),
        tokens_by_rank=(9, 0),
    ),
}


def weights() -> list[MoEWeights]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    return [
        MoEWeights(
            gate_ED=3 * random(E, D),
            w_gate_EFD=random(E, F, D),
            w_up_EFD=random(E, F, D),
            w_down_EDF=random(E, D, F),
        )
        for _ in range(LAYERS)
    ]


def inputs(case: Case) -> list[Tensor]:
    """What each rank holds: [L, T of the rank, D]."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(LAYERS, tokens, D, generator=generator) for tokens in case.tokens_by_rank]


def run_cases(group: RankGroup, names: list[str]) -> dict[str, Any]:
    """On each rank: every case's outputs, rows by layer and slot, and stages; rank 0 has those of all ranks."""
    rows_by_slot: list[list[int]] = []
    real_mlp = expert_parallel.expert_mlp

    def counting_mlp(rows_ND: Tensor, counts: list[int], *weights: Tensor) -> Tensor:
        rows_by_slot.append(list(counts))
        return real_mlp(rows_ND, counts, *weights)

    expert_parallel.expert_mlp = counting_mlp
    results = {}
    with torch.no_grad():
        for name in names:
            case = CASES[name]
            rows_by_slot.clear()
            layer = ExpertParallelMoE(
                group=group,
                layers=weights(),
                placement=case.placement,
                policy=case.policy,
                replica_choice=case.replica_choice,
                renormalise=case.renormalise,
            )
            outputs, seconds = layer.forward(inputs(case)[group.rank])
            results[name] = group.gather((torch.stack(outputs).numpy(), np.array(rows_by_slot), seconds))
    return results


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return run_on_ranks(run_cases, list(CASES), ranks=RANKS)


def naive_layer(case: Case, weights: MoEWeights, x_by_rank: list[Tensor]) -> list[Tensor]:
    """The layer as a definition: every token by itself, drops by sorting lists, every expert's whole MLP."""
    chosen: list[dict[str, Any]] = []
    for rank, x_TD in enumerate(x_by_rank):
        probs_TE = torch.softmax(x_TD @ weights.gate_ED.T, dim=-1)
        for token, probs_E in enumerate(probs_TE.tolist()):
            best = sorted(range(E), key=lambda expert, p=probs_E: (-p[expert], expert))  # type: ignore[misc]
            used = naive_selection(case.policy.selection, [probs_E[expert] for expert in best])
            total = sum(probs_E[expert] for expert in best[:used]) if case.renormalise else 1.0
            chosen += [
                {"rank": rank, "token": token, "expert": expert, "weight": probs_E[expert] / total}
                for expert in best[:used]
            ]
    out = [torch.zeros_like(x_TD) for x_TD in x_by_rank]
    for pair in naive_capacity(case, chosen):
        x_D, expert = x_by_rank[pair["rank"]][pair["token"]], pair["expert"]
        inner_F = silu(weights.w_gate_EFD[expert] @ x_D) * (weights.w_up_EFD[expert] @ x_D)
        out[pair["rank"]][pair["token"]] += pair["weight"] * (weights.w_down_EDF[expert] @ inner_F)
    return out


def naive_selection(selection: Any, probs: list[float]) -> int:
    """How many of the best experts a token uses."""
    match selection:
        case TopK(k=k):
            return k
        case TopP(p=p, k_max=k_max):
            return next((k for k in range(1, k_max) if sum(probs[:k]) >= p), k_max)
        case Skip(threshold=threshold, k_max=k_max):
            return sum(p >= threshold * probs[0] for p in probs[:k_max])
    raise AssertionError(selection)


def naive_capacity(case: Case, chosen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    capacity = case.policy.capacity
    if capacity is None:
        return chosen
    kept = []
    scopes = [[0], [1]] if capacity.scope == "source_rank" else [[0, 1]]
    for ranks in scopes:
        tokens = sum(case.tokens_by_rank[rank] for rank in ranks)
        limit = math.ceil(tokens * case.policy.width / E * capacity.factor)
        for expert in range(E):
            queue = [pair for pair in chosen if pair["rank"] in ranks and pair["expert"] == expert]
            if capacity.drop == "probs":
                queue.sort(key=lambda pair: -pair["weight"])
            kept += queue[:limit]
    return kept


@pytest.mark.parametrize("name", CASES)
def test_the_real_run_equals_the_dense_computation(results: dict[str, Any], name: str) -> None:
    case = CASES[name]
    x_by_rank = inputs(case)
    for layer, of_layer in enumerate(weights()):
        expected = naive_layer(case, of_layer, [x_LTD[layer] for x_LTD in x_by_rank])
        for rank in range(RANKS):
            np.testing.assert_allclose(results[name][rank][0][layer], expected[rank].numpy(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_the_rows_that_the_simulator_counts(results: dict[str, Any], name: str) -> None:
    """The same candidates as numpy arrays, all ranks' at once, through the policy and `sim.lower`."""
    case = CASES[name]
    source_rank_T = np.repeat(np.arange(RANKS), case.tokens_by_rank)
    assignments = []
    for layer, of_layer in enumerate(weights()):
        by_rank = [gate(x_LTD[layer], of_layer.gate_ED, rank) for rank, x_LTD in enumerate(inputs(case))]
        candidates = expert_parallel.Candidates(
            ids_TC=torch.cat([c.ids_TC for c in by_rank]).numpy(),
            probs_TC=torch.cat([c.probs_TC for c in by_rank]).numpy(),
            source_rank_T=source_rank_T,
            experts=E,
            score_kind="softmax",
        )
        context = RouteContext(layer=layer, ranks=RANKS, renormalise=case.renormalise)
        assignments.append(case.policy.route(candidates, context, {})[0])
    work = lower(
        MODEL,
        assignments,
        case.placement,
        policy=case.policy,
        source_rank_T=source_rank_T,
        replica_choice=case.replica_choice,
    )
    computed_LGS = np.stack([results[name][rank][1] for rank in range(RANKS)], axis=1)
    np.testing.assert_array_equal(computed_LGS, work.rows_LGS)


def test_the_cases_reach_what_they_are_named_for() -> None:
    """Drops, unequal numbers of experts and replicas do happen, so the tests above are not of the empty case."""
    dropping = {name for name, case in CASES.items() if case.policy.capacity is not None}
    for name in dropping - {"replicas at home", "a rank without tokens"}:
        case = CASES[name]
        x_by_rank = [x_LTD[0] for x_LTD in inputs(case)]
        free = Case(**{**vars(case), "policy": RoutingPolicy(selection=case.policy.selection)})
        with_drops, without = (naive_layer(c, weights()[0], x_by_rank) for c in (case, free))
        assert any((a - b).abs().max() > 1e-2 for a, b in zip(with_drops, without, strict=True) if a.numel()), name
    assert CASES["replicas in turn"].placement.replicas_LE.max() > 1


def test_its_stages_are_the_simulators_by_name_and_order(results: dict[str, Any]) -> None:
    class Free:
        name = "free"
        included: frozenset[type] = frozenset()

        def predict(self, operation: Operation) -> Prediction:
            return Prediction.unmeasured(np.zeros((1, 1)))

        def seconds(self, operation: Operation) -> Any:
            return self.predict(operation).seconds_X

    case = CASES["top-k"]
    source_rank_T = np.zeros(1, dtype=np.int64)
    candidates = gate(torch.zeros(1, D), weights()[0].gate_ED, 0)
    context = RouteContext(layer=0, ranks=RANKS, renormalise=True)
    in_numpy = expert_parallel.Candidates(
        ids_TC=candidates.ids_TC.numpy(),
        probs_TC=candidates.probs_TC.numpy(),
        source_rank_T=source_rank_T,
        experts=E,
        score_kind="softmax",
    )
    assignment, _ = case.policy.route(in_numpy, context, {})
    work = lower(MODEL, [assignment] * LAYERS, case.placement, policy=case.policy, source_rank_T=source_rank_T)
    (block,) = blocks_of(work, Free(), Execution(extent="moe"))
    simulated = [stage.name for stage in block.stages]
    for rank in range(RANKS):
        seconds = results["top-k"][rank][2]
        assert list(seconds) == simulated
        assert all(s >= 0 for s in seconds.values())


def test_capacity_over_all_ranks_is_refused() -> None:
    """A rank knows only its own tokens; the simulator knows them all."""
    with pytest.raises(InputError, match="a real rank knows only its own tokens"):
        ExpertParallelMoE(
            group=RankGroup(rank=0, ranks=RANKS, device=torch.device("cpu")),
            layers=weights(),
            placement=_placement(),
            policy=RoutingPolicy(selection=TopK(k=2), capacity=Capacity(factor=0.75, scope="global")),
            replica_choice="even",
            renormalise=True,
        )

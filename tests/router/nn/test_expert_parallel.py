"""The real expert-parallel layer on two gloo ranks, against a naive dense computation and against the simulator.

All cases run in one group of processes, since starting it takes seconds.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from cost_models.microbench.ranks import RankGroup, run_on_ranks
from cost_models.ops import Operation, Prediction
from router.candidates import Candidates
from router.capacity import Capacity
from router.context import RouteContext, State
from router.nn import expert_parallel
from router.nn.expert_parallel import ExpertParallelMoE, MoEWeights, check_runnable, gate
from router.placement import place
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.policies.base import Adjustment
from router.policies.skip import Skip
from router.policies.top_k import TopK
from router.policies.top_p import TopP
from router.replicas import ReplicaChoice
from router.spill import Spill
from sim.blocks import blocks_of
from sim.execution import Execution
from sim.layout import Layout
from sim.lower import Work, lower
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
    favoured: tuple[int, ...] = ()
    node_of_G: tuple[int, int] = (0, 0)


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
    "padded": Case(
        policy=RoutingPolicy(selection=TopK(k=2), capacity=Capacity(factor=0.75, pad=True)),
        placement=_placement("lpt"),
        tokens_by_rank=(21, 4),
    ),
    "padded replicas": Case(
        policy=RoutingPolicy(selection=TopK(k=2), capacity=Capacity(factor=1.5, pad=True)),
        placement=_placement("lpt", E + 4),
    ),
    "padded replicas at home": Case(
        policy=RoutingPolicy(selection=TopK(k=2), capacity=Capacity(factor=1.0, pad=True)),
        placement=_placement("lpt", E + 4),
        replica_choice="local",
    ),
    "padded without tokens": Case(
        policy=RoutingPolicy(selection=TopK(k=2), capacity=Capacity(factor=1.0, pad=True)),
        placement=_placement(),
        tokens_by_rank=(9, 0),
    ),
    "padded to the fullest": Case(
        policy=RoutingPolicy(selection=TopK(k=2), capacity=Capacity(factor=0.0, rule="tutel", pad=True)),
        placement=_placement("random"),
        tokens_by_rank=(21, 4),
    ),
    "padded pass by pass": Case(
        policy=RoutingPolicy(selection=TopK(k=2), capacity=Capacity(factor=0.5, rule="megablocks", pad=True)),
        placement=_placement(),
        tokens_by_rank=(17, 5),
    ),
    "replicas on the node": Case(
        policy=RoutingPolicy(selection=TopK(k=2)),
        placement=_placement("lpt", E + 4),
        replica_choice="nearest",
        node_of_G=(0, 1),
    ),
    "replicas by water-filling": Case(
        policy=RoutingPolicy(selection=TopK(k=2)),
        placement=_placement("lpt", E + 4),
        replica_choice="water_filling",
        tokens_by_rank=(21, 4),
        favoured=(4, 0),
    ),
    "replicas by load": Case(
        policy=RoutingPolicy(selection=TopK(k=2), capacity=Capacity(factor=1.0)),
        placement=_placement("lpt", E + 2),
        replica_choice="least_loaded",
        tokens_by_rank=(9, 0),
    ),
    "replicas by active experts": Case(
        policy=RoutingPolicy(selection=TopP(p=0.6, k_max=3)),
        placement=_placement("lpt", 2 * E),
        replica_choice="fewest_active",
    ),
    "spill beside a split": Case(
        policy=RoutingPolicy(selection=TopK(k=3), capacity=Spill(factor=1.0, least_rows=1, guests=1)),
        placement=_placement("lpt", E + 2),
        replica_choice="fewest_active",
        tokens_by_rank=(12, 21),
    ),
    "spill": Case(
        policy=RoutingPolicy(selection=TopK(k=2), capacity=Spill(factor=1.0, least_rows=1, guests=2)),
        placement=_placement("random"),
        tokens_by_rank=(21, 4),
    ),
    "spill of many": Case(
        policy=RoutingPolicy(selection=TopK(k=3), capacity=Spill(factor=1.0, least_rows=1, guests=3)),
        placement=Placement(slot_to_expert_LS=np.array([[4, 0, 2, 5, 3, 1]] * LAYERS), experts=E, ranks=RANKS),
        favoured=(4, 0, 2),
    ),
    "spill beside replicas": Case(
        policy=RoutingPolicy(selection=TopK(k=2), capacity=Spill(factor=1.0, least_rows=1, guests=1)),
        placement=_placement("lpt", E + 4),
        replica_choice="local",
        tokens_by_rank=(12, 21),
    ),
    "spill without tokens": Case(
        policy=RoutingPolicy(selection=TopK(k=1), capacity=Spill(factor=1.0, least_rows=1, guests=1)),
        placement=_placement(),
        tokens_by_rank=(0, 9),
    ),
    "spill of too little": Case(
        policy=RoutingPolicy(selection=TopK(k=2), capacity=Spill(factor=1.0, least_rows=1000, guests=1)),
        placement=_placement("random"),
    ),
}
SPILLING = [name for name in CASES if name.startswith("spill")]
PADDED = [name for name in CASES if name.startswith("padded")]


def weights(case: Case) -> list[MoEWeights]:
    """Of both layers; tokens, which have a first element of 1, like the experts that are favoured."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])

    liking_ED = torch.zeros(E, D)
    liking_ED[list(case.favoured), 0] = 20.0
    return [
        MoEWeights(
            gate_ED=3 * random(E, D) + liking_ED,
            w_gate_EFD=random(E, F, D),
            w_up_EFD=random(E, F, D),
            w_down_EDF=random(E, D, F),
        )
        for _ in range(LAYERS)
    ]


def inputs(case: Case) -> list[Tensor]:
    """What each rank holds: [L, T of the rank, D]."""
    generator = torch.Generator().manual_seed(2)
    x_by_rank = [torch.randn(LAYERS, tokens, D, generator=generator) for tokens in case.tokens_by_rank]
    for x_LTD in x_by_rank if case.favoured else []:
        x_LTD[:, :, 0] = 1.0
    return x_by_rank


def run_cases(group: RankGroup, names: list[str]) -> dict[str, Any]:
    """On each rank: every case's outputs, rows by layer and place, and stages; rank 0 has those of all ranks."""
    rows_by_slot: list[list[int]] = []
    real_experts = expert_parallel._experts

    def counting(rows_ND: Tensor, counts: list[int], *others: Any) -> Tensor:
        assert rows_ND.shape[0] == sum(counts)
        rows_by_slot.append(list(counts))
        out_ND: Tensor = real_experts(rows_ND, counts, *others)
        return out_ND

    expert_parallel._experts = counting  # type: ignore[assignment]
    results = {}
    with torch.no_grad():
        for name in names:
            case = CASES[name]
            rows_by_slot.clear()
            layer = ExpertParallelMoE(
                group=group,
                layers=weights(case),
                placement=case.placement,
                policy=case.policy,
                replica_choice=case.replica_choice,
                renormalise=case.renormalise,
                node_of_G=np.array(case.node_of_G),
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
    if not isinstance(capacity, Capacity) or capacity.factor == 0:
        return chosen
    if capacity.rule == "megablocks":
        return naive_passes(case, capacity, chosen)
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


def naive_passes(case: Case, capacity: Capacity, chosen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each choice of a token queues for places of its own."""
    kept = []
    for rank, tokens in enumerate(case.tokens_by_rank):
        of_rank = [pair for pair in chosen if pair["rank"] == rank]
        for choice in range(case.policy.width):
            for expert in range(E):
                queue = [pair for pair in of_rank[choice :: case.policy.width] if pair["expert"] == expert]
                queue.sort(key=lambda pair: -pair["weight"])
                kept += queue[: int(capacity.factor * (tokens / E)) or None]
    return kept


@pytest.mark.parametrize("name", CASES)
def test_the_real_run_equals_the_dense_computation(results: dict[str, Any], name: str) -> None:
    case = CASES[name]
    x_by_rank = inputs(case)
    for layer, of_layer in enumerate(weights(case)):
        expected = naive_layer(case, of_layer, [x_LTD[layer] for x_LTD in x_by_rank])
        for rank in range(RANKS):
            np.testing.assert_allclose(results[name][rank][0][layer], expected[rank].numpy(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_the_rows_that_the_simulator_counts(results: dict[str, Any], name: str) -> None:
    work = simulated_work(CASES[name])
    computed_LGS = np.stack([results[name][rank][1] for rank in range(RANKS)], axis=1)
    np.testing.assert_array_equal(computed_LGS, work.rows_LGS)


def simulated_work(case: Case) -> Work:
    """The same candidates as numpy arrays, all ranks' at once, through the policy and `sim.lower`."""
    source_rank_T = np.repeat(np.arange(RANKS), case.tokens_by_rank)
    assignments = []
    for layer, of_layer in enumerate(weights(case)):
        by_rank = [gate(x_LTD[layer], of_layer.gate_ED, rank) for rank, x_LTD in enumerate(inputs(case))]
        candidates = Candidates(
            ids_TC=torch.cat([c.ids_TC for c in by_rank]).numpy(),
            probs_TC=torch.cat([c.probs_TC for c in by_rank]).numpy(),
            source_rank_T=source_rank_T,
            experts=E,
            score_kind="softmax",
        )
        context = RouteContext(layer=layer, ranks=RANKS, renormalise=case.renormalise)
        assignments.append(case.policy.route(candidates, context, {})[0])
    return lower(
        MODEL,
        assignments,
        case.placement,
        policy=case.policy,
        source_rank_T=source_rank_T,
        replica_choice=case.replica_choice,
        layout=Layout(node_of_G=np.array(case.node_of_G)),
    )


def test_the_cases_reach_what_they_are_named_for() -> None:
    """Drops, unequal numbers of experts and replicas do happen, so the tests above are not of the empty case."""
    dropping = {name for name, case in CASES.items() if isinstance(case.policy.capacity, Capacity)}
    not_full = {
        "replicas at home",
        "replicas by load",
        "a rank without tokens",
        "padded replicas",
        "padded to the fullest",
    }
    for name in sorted(dropping - not_full):
        case = CASES[name]
        x_by_rank = [x_LTD[0] for x_LTD in inputs(case)]
        free = Case(**{**vars(case), "policy": RoutingPolicy(selection=case.policy.selection)})
        with_drops, without = (naive_layer(c, weights(case)[0], x_by_rank) for c in (case, free))
        assert any((a - b).abs().max() > 1e-2 for a, b in zip(with_drops, without, strict=True) if a.numel()), name
    assert CASES["replicas in turn"].placement.replicas_LE.max() > 1
    for name in PADDED:
        assert simulated_work(CASES[name]).padding_share > 0, name
    in_turn = Case(**{**vars(CASES["replicas by water-filling"]), "replica_choice": "even"})
    filled_LG, turns_LG = (
        work.received_LG for work in map(simulated_work, (CASES["replicas by water-filling"], in_turn))
    )
    assert filled_LG.max() < turns_LG.max()
    moved = {name: simulated_work(CASES[name]).experts_moved_LGG for name in SPILLING}
    assert all(experts_LGG is not None for experts_LGG in moved.values())
    totals = {name: int(experts_LGG.sum()) for name, experts_LGG in moved.items()}  # type: ignore[union-attr]
    assert {name for name, experts in totals.items() if not experts} == {"spill of too little"}
    assert totals["spill of many"] > LAYERS  # more than one expert in a layer


@pytest.mark.parametrize("name", ["top-k", "replicas by load", "padded", "spill", "spill beside a split"])
def test_its_stages_are_the_simulators_by_name_and_order(results: dict[str, Any], name: str) -> None:
    class Free:
        name = "free"
        included: frozenset[type] = frozenset()

        def predict(self, operation: Operation) -> Prediction:
            return Prediction.unmeasured(np.zeros((1, 1)))

        def seconds(self, operation: Operation) -> Any:
            return self.predict(operation).seconds_X

    (block,) = blocks_of(simulated_work(CASES[name]), Free(), Execution(extent="moe"))
    simulated = [stage.name for stage in block.stages]
    for rank in range(RANKS):
        seconds = results[name][rank][2]
        assert list(seconds) == simulated
        assert all(s >= 0 for s in seconds.values())


def test_guests_of_several_ranks_get_their_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third rank hosts experts of the second, then of the first; weights come in the order of their lenders."""
    rows_GS = np.array([[14, 6, 20, 2, 0, 0, 10, 0]])  # 20, 22, 0 and 10 rows: 13 may stay
    plan = Spill(factor=1.0, least_rows=1, guests=3).plan(rows_GS, ranks=4)
    assert [[move.slot for move in plan.guests_of(rank)] for rank in range(4)] == [[], [], [2, 0], [0]]
    ranks, slots_per_rank = range(4), 2
    rows_by_slot = torch.randn(8, 3, F, D, generator=torch.Generator().manual_seed(3))
    own = [
        MoEWeights(
            gate_ED=torch.zeros(1, 1),
            w_gate_EFD=of_rank[:, 0],
            w_up_EFD=of_rank[:, 1],
            w_down_EDF=of_rank[:, 2].mT.contiguous(),
        )
        for of_rank in torch.split(rows_by_slot, slots_per_rank)
    ]
    posted: dict[int, list[Tensor]] = {}

    def exchange(rank: int, deliver: bool) -> MoEWeights | None:
        def all_to_all(rows_ND: Tensor, sent: list[int], received: list[int]) -> Tensor:
            posted[rank] = list(torch.split(rows_ND, sent))
            if not deliver:
                return rows_ND.new_zeros(sum(received), rows_ND.shape[1])
            got_ND = torch.cat([posted[source][rank] for source in ranks])
            assert got_ND.shape[0] == sum(received)
            return got_ND

        monkeypatch.setattr(expert_parallel, "all_to_all", all_to_all)
        return expert_parallel._exchange_weights(plan, rank, own[rank])

    for rank in ranks:
        exchange(rank, deliver=False)
    for rank in ranks:
        guests, moves = exchange(rank, deliver=True), plan.guests_of(rank)
        assert (guests is None) == (not moves)
        for place_, move in enumerate(moves):
            assert guests is not None
            w_gate_FD, w_up_FD, w_down_FD = rows_by_slot[move.slot]
            torch.testing.assert_close(guests.w_gate_EFD[place_], w_gate_FD)
            torch.testing.assert_close(guests.w_up_EFD[place_], w_up_FD)
            torch.testing.assert_close(guests.w_down_EDF[place_], w_down_FD.T)


@pytest.mark.parametrize("pad", [False, True])
def test_capacity_over_all_ranks_is_refused(pad: bool) -> None:
    """A rank knows only its own tokens; the simulator knows them all."""
    policy = RoutingPolicy(selection=TopK(k=2), capacity=Capacity(factor=0.75, scope="global", pad=pad))
    with pytest.raises(InputError, match=r"capacity.scope global: a real rank knows only its own tokens"):
        ExpertParallelMoE(
            group=RankGroup(rank=0, ranks=RANKS, device=torch.device("cpu")),
            layers=weights(CASES["top-k"]),
            placement=_placement(),
            policy=policy,
            replica_choice="even",
            renormalise=True,
        )


def test_padding_beside_a_split_by_counts_is_refused() -> None:
    with pytest.raises(InputError, match="replica_choice water_filling, but the capacity pads"):
        ExpertParallelMoE(
            group=RankGroup(rank=0, ranks=RANKS, device=torch.device("cpu")),
            layers=weights(CASES["padded replicas"]),
            placement=CASES["padded replicas"].placement,
            policy=CASES["padded replicas"].policy,
            replica_choice="water_filling",
            renormalise=True,
        )


def test_an_adjustment_over_all_ranks_is_refused() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Batch(Adjustment):
        name: ClassVar[str] = "batch"
        scope: str = "global"

        def adjust(
            self, used_TC: Any, candidates: Candidates, context: RouteContext, state: State
        ) -> tuple[Any, State]:
            return used_TC, state

    top_k = TopK(k=2)
    with pytest.raises(InputError, match=r"batch.scope global: a real rank knows only its own tokens"):
        check_runnable(RoutingPolicy(selection=top_k, adjustment=Batch()), ranks=2)
    check_runnable(RoutingPolicy(selection=top_k, adjustment=Batch()), ranks=1)
    check_runnable(RoutingPolicy(selection=top_k, adjustment=Batch(scope="source_rank")), ranks=2)

"""Counts in a step: after the rows are packed, or before anyone knows where they go, and who pays for them."""

from typing import Any

import numpy as np
import pytest
from recorder import Recorder

from cost_models.ops import CountExchange
from router.assignment import Assignment
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.policies.top_k import TopK
from router.replicas import ReplicaChoice
from router.spill import Spill
from sim.blocks import blocks_of
from sim.execution import Execution
from sim.lower import lower
from traces.model import ModelSpec

TINY = ModelSpec(name="tiny", layers=1, experts=2, top_k=1, hidden=8, expert_hidden=16)
TWICE = Placement(slot_to_expert_LS=np.array([[0, 1, 0, 1]]), experts=2, ranks=2)
TOP_1 = RoutingPolicy(selection=TopK(k=1))
SPILL = RoutingPolicy(selection=TopK(k=1), capacity=Spill(factor=1.0, least_rows=1, guests=1))


class Fused(Recorder):
    """Kernels that exchange counts beside rows, as engines' do."""

    included = frozenset({CountExchange})


def stages(costs: Recorder, choice: ReplicaChoice, policy: RoutingPolicy = TOP_1) -> tuple[list[str], Any]:
    """The names of the first stages, and the bytes of the counts that are paid for, None: none are."""
    ones_TK = np.ones((4, 1))
    assignment = Assignment(
        ids_TK=np.array([[0], [0], [0], [1]]),
        scores_TK=ones_TK,
        weights_TK=ones_TK,
        kept_TK=ones_TK > 0,
        rerouted_TK=ones_TK < 0,
    )
    work = lower(TINY, [assignment], TWICE, policy=policy, source_rank_T=np.array([0, 0, 1, 1]), replica_choice=choice)
    (block,) = blocks_of(work, costs, Execution(extent="moe"))
    asked = [operation for operation in costs.asked if isinstance(operation, CountExchange)]
    names = [stage.name for stage in block.stages]
    return names[: names.index("dispatch")], asked[0].bytes_XGG.tolist() if asked else None


def test_counts_follow_the_rows_that_are_packed() -> None:
    assert stages(Recorder(), "even") == (["gate", "route", "permute", "counts"], [[[16, 16], [16, 16]]])


@pytest.mark.parametrize("choice", ["least_loaded", "water_filling", "fewest_active"])
def test_where_rows_go_by_counts_these_come_first(choice: ReplicaChoice) -> None:
    assert stages(Recorder(), choice) == (["gate", "route", "counts", "permute"], [[[16, 16], [16, 16]]])


def test_kernels_that_exchange_counts_beside_rows_do_not_gather_them_before() -> None:
    assert stages(Fused(), "even") == (["gate", "route", "permute"], None)
    assert stages(Fused(), "water_filling")[0] == ["gate", "route", "counts", "permute"]
    assert stages(Fused(), "even", SPILL)[0] == ["gate", "route", "counts", "spill weights", "permute"]

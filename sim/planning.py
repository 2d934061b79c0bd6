"""Planning: what single steps of earlier traffic, and the costs of a deployment, say to a placement."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cost_models.ops import CostModel
from router.placement.problem import PlacementProblem
from router.replicas import ReplicaChoice
from router.splits import SPLITS
from sim.layout import Layout
from sim.lower import Protocol
from sim.rank_seconds import rank_seconds_of
from traces.batching import Step
from traces.trace import RoutingTrace


def with_steps(
    problem: PlacementProblem,
    trace: RoutingTrace,
    steps: Sequence[Step],
    *,
    costs: CostModel,
    layout: Layout,
    protocol: Protocol,
    dispatch_dtype: str | None = None,
    replica_choice: ReplicaChoice = "even",
) -> PlacementProblem:
    """The problem with the rows of each step, the experts of each token, and what they take on such a deployment.

    A token that uses a null expert has not K experts to place together: such a model's single tokens are left out.
    """
    model = trace.model
    return replace(
        problem,
        steps_WLE=np.stack([rows_LE(trace, step) for step in steps]),
        ids_TLK=None if model.null_experts else trace.expert_ids_TLC[:, :, : model.top_k].astype(np.int64),
        seconds=rank_seconds_of(
            model,
            costs,
            layout=layout,
            protocol=protocol,
            dispatch_dtype=dispatch_dtype or model.activation_dtype,
            slots_per_rank=problem.slots_per_rank,
            tokens_per_rank=steps[0].tokens_T.size // layout.ranks,
            width=model.top_k,
        ),
        split=replica_choice if replica_choice in SPLITS else None,
    )


def rows_LE(trace: RoutingTrace, step: Step) -> NDArray[np.int64]:
    """The rows of each expert in one step, by the model's own top k: [L, E]."""
    return trace.take(step.tokens_T).loads_LE()

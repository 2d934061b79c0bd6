"""Planning: what a window of earlier traffic says to a placement."""

import numpy as np
from numpy.typing import NDArray

from router.placement.problem import PlacementProblem
from sim.rank_seconds import rank_seconds_of
from sim.replay import Replay
from traces.batching import Step
from traces.trace import RoutingTrace


def problem_of(replay: Replay, *, slots: int, away_share: float = 1.0, seed: int = 0) -> PlacementProblem:
    """All that the trace, the steps and the costs of an earlier replay know, for its layout and the model's groups.

    Loads are those of all the trace's tokens. Tokens that use null experts have not K experts to place together: such a
    model's single tokens are left out. Errors: `InputError` as `PlacementProblem`.
    """
    trace, layout = replay.trace, replay.shared
    model, ranks = trace.model, layout.expert_groups
    return PlacementProblem(
        loads_LE=trace.loads_LE().astype(np.float64),
        ranks=ranks,
        slots=slots,
        nodes=layout.nodes,
        groups=model.expert_groups,
        away_share=away_share,
        seed=seed,
        steps_WLE=np.stack([rows_LE(trace, step) for step in replay.steps]),
        ids_TLK=None if model.null_experts else trace.expert_ids_TLC[:, :, : model.top_k].astype(np.int64),
        seconds=rank_seconds_of(
            model,
            replay.costs,
            layout=layout,
            protocol=replay.protocol,
            dispatch_dtype=replay.dispatch_dtype or model.activation_dtype,
            slots_per_rank=-(-slots // ranks),
            tokens_per_rank=replay.steps[0].tokens_T.size // layout.ranks,
            width=model.top_k,
        ),
    )


def rows_LE(trace: RoutingTrace, step: Step) -> NDArray[np.int64]:
    """The rows of each expert in one step, by the model's own top k: [L, E]."""
    return trace.take(step.tokens_T).loads_LE()

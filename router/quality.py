"""Quality of a routing as far as a trace can tell: the router score that is kept, and what is dropped."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from router.assignment import Assignment
from router.candidates import Candidates


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingQuality:
    """What a policy kept, over all steps and layers.

    `gate_mass`: the router score of a token's kept pairs, as a share of what the model's own top k has, and at most
    all of it: experts beyond what the model was trained with are not known to be better. `dropped_share`: of chosen
    pairs. `experts_per_token`: kept pairs a token and layer.
    """

    gate_mass: float
    dropped_share: float
    experts_per_token: float


def routing_quality(
    candidates: Sequence[Candidates], assignments: Sequence[Assignment], *, top_k: int
) -> RoutingQuality:
    """Compare what was kept with what plain top-`top_k` would keep; both sequences go step by layer."""
    kept_score = own_score = 0.0
    chosen = kept = tokens = 0
    for offered, assignment in zip(candidates, assignments, strict=True):
        kept_score_T = np.sum(assignment.scores_TK * assignment.kept_TK, axis=1, dtype=np.float64)
        own_score_T = np.sum(offered.probs_TC[:, :top_k], axis=1, dtype=np.float64)
        kept_score += float(np.minimum(kept_score_T, own_score_T).sum())
        own_score += float(own_score_T.sum())
        chosen += int(assignment.chosen_TK.sum())
        kept += int(assignment.kept_TK.sum())
        tokens += offered.tokens
    return RoutingQuality(
        gate_mass=kept_score / own_score if own_score else 1.0,  # where every score is 0, there is nothing to lose
        dropped_share=1 - kept / chosen,
        experts_per_token=kept / tokens,
    )

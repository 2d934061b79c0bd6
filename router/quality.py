"""Quality of a routing as far as a trace can tell: the router score that is kept, and what is dropped."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.assignment import Assignment
from router.candidates import Candidates


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingQuality:
    """What a policy kept, over all steps and layers.

    `gate_mass`: the router score of a token's kept pairs, as a share of what the model's own top k has, and at most
    all of it: experts beyond what the model was trained with are not known to be better. A rerouted pair counts with
    the score of the expert that computes it, and what a token gives to null experts counts as kept, for the model does
    just that. `dropped_share` and `rerouted_share`: of chosen pairs, 0 where there are none. `experts_per_token`: kept
    pairs a token and layer, without null experts.
    """

    gate_mass: float
    dropped_share: float
    rerouted_share: float
    experts_per_token: float


def routing_quality(
    candidates: Sequence[Candidates], assignments: Sequence[Assignment], *, top_k: int
) -> RoutingQuality:
    """Compare what was kept with what plain top-`top_k` would keep; both sequences go step by layer."""
    kept_score = own_score = 0.0
    chosen = kept = rerouted = tokens = 0
    for offered, assignment in zip(candidates, assignments, strict=True):
        kept_score_T = _kept_score(assignment)
        own_score_T = np.sum(offered.probs_TC[:, :top_k], axis=1, dtype=np.float64)
        kept_score += float(np.minimum(kept_score_T, own_score_T).sum())
        own_score += float(own_score_T.sum())
        chosen += int(assignment.chosen_TK.sum())
        kept += int(assignment.kept_TK.sum())
        rerouted += int(assignment.rerouted_TK.sum())
        tokens += offered.tokens
    return RoutingQuality(
        gate_mass=kept_score / own_score if own_score else 1.0,  # where every score is 0, there is nothing to lose
        dropped_share=(chosen - kept) / max(chosen, 1),
        rerouted_share=rerouted / max(chosen, 1),
        experts_per_token=kept / tokens,
    )


def _kept_score(assignment: Assignment) -> NDArray[np.float64]:
    """The router score of what the model does for each token: kept pairs and null experts."""
    score_T: NDArray[np.float64] = np.sum(assignment.scores_TK * assignment.kept_TK, axis=1, dtype=np.float64)
    if assignment.null_weights_TN is not None:
        score_T += assignment.null_weights_TN.sum(axis=1, dtype=np.float64)
    return score_T

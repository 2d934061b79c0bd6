"""What a routing policy is, and when each of its parts is called.

A policy is made once from its parameters. For every step of every layer the simulator (numpy) or the real MoE layer
(torch) calls `RoutingPolicy.route(candidates, context, state)` (in `router.policies`), which goes through its parts:

1. a `Selection` says which candidates each token uses, token by token;
2. an `Adjustment`, if there is one, sees the whole step, and what hardware asks for each choice, and moves tokens to
   other candidates;
3. `assign` makes the assignment: ids, weights, nothing dropped yet;
4. a limit, if there is one (`router.capacity`), drops or reroutes what does not fit.

Selections and adjustments speak in masks over candidates, so that no token can get an expert twice. Each leaf is one
short file: array-API functions over `router.backends`, the same for numpy, torch and cupy.
"""

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

from router.assignment import UNUSED, Assignment
from router.backends import Array, first_columns, namespace
from router.candidates import Candidates
from router.context import RouteContext, State
from router.part import Kind, Part
from traces.errors import InputError


class Selection(Part):
    """Chooses experts for each token from its candidates; knows nothing of capacity."""

    kind: ClassVar[Kind] = "selection"

    @property
    @abstractmethod
    def width(self) -> int:
        """K, the most experts a token can get."""

    @property
    def reads(self) -> int:
        """How many candidates of each token the selection must see."""
        return self.width

    def choose(self, candidates: Candidates, context: RouteContext, state: State) -> tuple[Array, State]:
        """Which candidates each token uses, bool [T, C'] over its first C' ones, and the state for the next step.

        A selection that looks at one token at a time, and remembers nothing, need only say `use`.
        """
        return self.use(candidates.best(self.width).probs_TC), state

    def use(self, probs_TK: Array) -> Array:
        """Which of the best K candidates each token uses, by their scores, descending: bool [T, K]."""
        raise NotImplementedError(f"policy {self.name} says neither `use` nor `choose`")

    def check(self, candidates: Candidates) -> None:
        """Raise `InputError` where the candidates are too few."""
        if candidates.count < self.reads:
            raise InputError(
                f"policy {self.name} needs {self.reads} candidates per token; the trace recorded {candidates.count}: "
                "use fewer, or complete the trace (moeroute trace complete)"
            )
        check_more_candidates(self, self.width, candidates)
        if "full scores" in self.needs and candidates.count < candidates.all_experts:
            raise InputError(
                f"policy {self.name} needs the scores of all {candidates.all_experts} experts; the trace recorded "
                f"{candidates.count} candidates per token: record full scores, or complete the trace to all experts"
            )


class Adjustment(Part):
    """Moves tokens to other candidates once the whole step's choices are known.

    A token gets at most as many experts as the selection gave it, and at least one if that gave it any.
    """

    kind: ClassVar[Kind] = "adjustment"

    @abstractmethod
    def adjust(
        self, used_TC: Array, candidates: Candidates, context: RouteContext, state: State
    ) -> tuple[Array, State]:
        """Which candidates each token uses instead of `used_TC`, bool [T, C] over all its candidates, and the state."""

    def check(self, candidates: Candidates, width: int) -> None:
        """Raise `InputError` where there is nothing to move tokens to."""
        check_more_candidates(self, width, candidates)


def check_more_candidates(part: Part, width: int, candidates: Candidates) -> None:
    """Raise `InputError` where a part chooses among more candidates than a token uses, and there are none."""
    if "more candidates than k" in part.needs and candidates.count <= width < candidates.all_experts:
        raise InputError(
            f"policy {part.name} needs more candidates than the {width} that a token uses; the trace recorded "
            f"{candidates.count}: record more, or complete the trace (moeroute trace complete)"
        )


def widen(used_TC: Array, count: int) -> Array:
    """A mask over the first candidates as one over all `count` of them."""
    missing = count - used_TC.shape[1]
    if not missing:
        return used_TC
    xp = namespace(used_TC)
    none_TX = xp.zeros((used_TC.shape[0], missing), dtype=used_TC.dtype, device=used_TC.device)
    return xp.concat([used_TC, none_TX], axis=1)


def trained_weights(assignment: Assignment, candidates: Candidates, top_k: int) -> Assignment:
    """The assignment with weights as the model was trained: scores over the sum of the token's best `top_k` experts.

    What an expert would have had that the token does not use, or that dropped it, then goes to no other: weights sum to
    less than one. Which of the two costs less loss depends on the model and on which experts go; benchmarks/policies.py
    measures both.
    """
    xp = namespace(assignment.scores_TK)
    best = candidates.best(top_k)
    own_TK = xp.where(best.ids_TC < candidates.experts, best.probs_TC, xp.zeros_like(best.probs_TC))
    total_T1 = xp.sum(own_TK, axis=1, keepdims=True)
    scaled_TK = assignment.scores_TK / xp.where(total_T1 > 0, total_T1, xp.ones_like(total_T1))
    return replace(assignment, weights_TK=xp.where(assignment.kept_TK, scaled_TK, xp.zeros_like(scaled_TK)))


def assign(candidates: Candidates, used_TC: Array, *, width: int, renormalise: bool) -> Assignment:
    """The assignment of the candidates that `used_TC` marks, best first, at most `width` a token, nothing dropped.

    Weights are the scores, scaled to sum to one over a token's experts if `renormalise`. Null experts (ids from E on)
    become no pairs: what a token gives them is kept apart, unscaled, and they take no part in the sum
    (AdaMoE, arXiv 2406.13233).
    """
    candidates = candidates.best(used_TC.shape[1])
    xp = namespace(candidates.probs_TC)
    null_weights_TN = None
    if candidates.null_experts:
        used_TC = used_TC & (xp.cumulative_sum(xp.astype(used_TC, xp.int64), axis=1) <= width)
        null_id_N = xp.arange(candidates.experts, candidates.all_experts, device=used_TC.device)
        is_null_TCN = used_TC[:, :, None] & (candidates.ids_TC[:, :, None] == null_id_N)
        null_weights_TN = xp.sum(xp.where(is_null_TCN, candidates.probs_TC[:, :, None], 0.0), axis=1)
        used_TC = used_TC & (candidates.ids_TC < candidates.experts)
    columns_TK, found_TK = first_columns(used_TC, width)
    probs_TK = xp.take_along_axis(candidates.probs_TC, columns_TK, axis=1)
    scores_TK = xp.where(found_TK, probs_TK, xp.zeros_like(probs_TK))
    weights_TK = scores_TK
    if renormalise:
        total_T1 = xp.sum(scores_TK, axis=-1, keepdims=True)
        # A sigmoid gate can be recorded as 0 for all of a token's experts; they then weigh nothing.
        weights_TK = scores_TK / xp.where(total_T1 > 0, total_T1, xp.ones_like(total_T1))
    ids_TK = xp.take_along_axis(candidates.ids_TC, columns_TK, axis=1)
    return Assignment(
        ids_TK=xp.where(found_TK, ids_TK, xp.full_like(ids_TK, UNUSED)),
        scores_TK=scores_TK,
        weights_TK=weights_TK,
        kept_TK=found_TK,
        rerouted_TK=xp.zeros_like(found_TK),
        null_weights_TN=null_weights_TN,
    )

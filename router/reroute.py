"""Rerouting: pairs that their expert has no place for ask their token's other candidates, in rounds."""

from dataclasses import dataclass, replace

import numba
import numpy as np
from array_api_compat import is_numpy_array
from numpy.typing import NDArray

from router.assignment import Assignment
from router.backends import Array, bincount, first_columns, largest_fitting, mark_largest, namespace
from router.candidates import Candidates
from router.queues import row_totals


def near_experts(share_EG: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which experts lie on a rank that also holds the other one: bool [E, E], from each rank's share of an expert."""
    held_EG = (share_EG > 0).astype(np.float32)
    return (held_EG @ held_EG.T) > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rooms:
    """Where pairs without a place may go, and who goes first.

    `left_X` integer [X]: the places left in each group, expert e's at `group_TK` + e for a pair of [T, K];
    `near_EE` bool [E, E]: which experts may take over from which, None for all; `turn_TK` integer [T, K], no two of
    them equal: among pairs that ask the same expert the lower one goes first; None: the larger score of that expert.
    """

    group_TK: Array
    left_X: Array
    near_EE: Array | None
    turn_TK: Array | None


def reroute(
    assignment: Assignment, over_TK: Array, candidates: Candidates, rooms: Rooms, *, renormalise: bool
) -> Assignment:
    """Move pairs where `over_TK` is true to other candidates of their token, and drop those that find no place.

    Each round, every token's first pair without a place asks for the best candidate that its token has no pair on,
    that has a place left and may take over; a pair that finds none is dropped. Of those that ask one expert, as many
    as it has places move there, the first by `rooms`. The rounds end when no pair is left to ask.

    Weights are the new scores, scaled to sum to one over all that a token chose, dropped pairs included, if
    `renormalise`; tokens that have no rerouted pair keep theirs. Columns keep their order, so that a token's pairs may
    no longer stand best first.
    """
    xp = namespace(over_TK)
    ids_TK, scores_TK = xp.asarray(assignment.ids_TK, copy=True), xp.asarray(assignment.scores_TK, copy=True)
    waits_TK, moved_TK = xp.asarray(over_TK, copy=True), xp.zeros_like(over_TK)
    moving = (ids_TK, scores_TK, waits_TK, moved_TK)
    if is_numpy_array(ids_TK):
        _move_compiled(*moving, candidates, rooms)
    else:
        _move(*moving, candidates, rooms)
    if renormalise:
        total_T = row_totals(scores_TK)
        scaled_TK = scores_TK / xp.where(total_T > 0, total_T, xp.ones_like(total_T))[:, None]
        scaled_TK = xp.where(assignment.kept_TK, scaled_TK, xp.zeros_like(scaled_TK))
        weights_TK = xp.where(xp.any(moved_TK, axis=1, keepdims=True), scaled_TK, assignment.weights_TK)
    else:
        weights_TK = xp.where(moved_TK, scores_TK, assignment.weights_TK)
    return replace(
        assignment,
        ids_TK=ids_TK,
        scores_TK=scores_TK,
        weights_TK=weights_TK,
        rerouted_TK=assignment.rerouted_TK | moved_TK,
    ).drop(over_TK & ~moved_TK)


def _move(
    ids_TK: Array, scores_TK: Array, waits_TK: Array, moved_TK: Array, candidates: Candidates, rooms: Rooms
) -> None:
    """All rounds, in place."""
    xp = namespace(ids_TK)
    left_X = rooms.left_X
    while True:
        column_T1, waits_T1 = first_columns(waits_TK, 1)
        token_N = xp.nonzero(waits_T1[:, 0])[0]
        if token_N.shape[0] == 0:
            return
        column_N = column_T1[token_N, 0]
        asked_N, found_N = _ask(token_N, column_N, ids_TK, candidates, rooms, left_X)
        waits_TK[token_N, column_N] = found_N
        token_N, column_N, asked_N = token_N[found_N], column_N[found_N], asked_N[found_N]
        expert_N, score_N = candidates.ids_TC[token_N, asked_N], candidates.probs_TC[token_N, asked_N]
        key_N = rooms.group_TK[token_N, column_N] + expert_N
        value_N = score_N if rooms.turn_TK is None else -rooms.turn_TK[token_N, column_N]
        in_N = largest_fitting(key_N, left_X, value_N)
        token_M, column_M = token_N[in_N], column_N[in_N]
        ids_TK[token_M, column_M] = xp.astype(expert_N[in_N], ids_TK.dtype)
        scores_TK[token_M, column_M] = xp.astype(score_N[in_N], scores_TK.dtype)
        moved_TK[token_M, column_M] = True
        waits_TK[token_M, column_M] = False
        left_X = left_X - bincount(key_N[in_N], left_X.shape[0])


def _ask(
    token_N: Array, column_N: Array, ids_TK: Array, candidates: Candidates, rooms: Rooms, left_X: Array
) -> tuple[Array, Array]:
    """The best candidate that may take each pair, by its column [N], and whether there is one: bool [N]."""
    xp = namespace(ids_TK)
    offered_NC = xp.astype(candidates.ids_TC[token_N, :], xp.int64)
    real_NC = offered_NC < candidates.experts
    expert_NC = xp.where(real_NC, offered_NC, xp.zeros_like(offered_NC))
    used_NC = xp.any(offered_NC[:, :, None] == ids_TK[token_N, :][:, None, :], axis=2)
    may_NC = real_NC & ~used_NC & (left_X[rooms.group_TK[token_N, column_N][:, None] + expert_NC] > 0)
    if rooms.near_EE is not None:
        own_N = xp.astype(ids_TK[token_N, column_N], xp.int64)
        may_NC = may_NC & rooms.near_EE[own_N[:, None], expert_NC]
    asked_N1, found_N1 = first_columns(may_NC, 1)
    return asked_N1[:, 0], found_N1[:, 0]


def _move_compiled(
    ids_TK: Array, scores_TK: Array, waits_TK: Array, moved_TK: Array, candidates: Candidates, rooms: Rooms
) -> None:
    """`_move` on numpy arrays."""
    _rounds(
        (ids_TK, scores_TK, waits_TK, moved_TK),
        (candidates.ids_TC, candidates.probs_TC, candidates.experts),
        (rooms.group_TK, rooms.left_X.copy()),
        np.ones((0, 0), dtype=np.bool_) if rooms.near_EE is None else rooms.near_EE,
        np.zeros((0, 0), dtype=np.int64) if rooms.turn_TK is None else rooms.turn_TK,
    )


@numba.njit(cache=True)
def _rounds(
    moving: tuple[Array, Array, Array, Array],
    offered: tuple[Array, Array, int],
    groups: tuple[Array, Array],
    near_EE: Array,
    turn_TK: Array,
) -> None:
    """Each round looks at the tokens that still wait, from the column on that each has come to."""
    ids_TK, scores_TK, waits_TK, moved_TK = moving
    offered_TC, probs_TC, experts = offered
    group_TK, left_X = groups
    tokens, width = ids_TK.shape
    anywhere = near_EE.size == 0
    waiting_T, next_T = np.arange(tokens), np.zeros(tokens, dtype=np.int64)
    token_T, column_T = np.empty_like(waiting_T), np.empty_like(waiting_T)
    asked_T, key_T = np.empty_like(waiting_T), np.empty_like(waiting_T)
    value_T, in_T = np.empty(tokens, dtype=np.float64), np.empty(tokens, dtype=np.bool_)
    waiting = tokens
    while waiting:
        asking = still = 0
        for place in range(waiting):
            token, column = waiting_T[place], next_T[place]
            while column < width and not waits_TK[token, column]:
                column += 1
            if column == width:
                continue
            waiting_T[still], next_T[still] = token, column
            still += 1
            own, group = np.uintp(ids_TK[token, column]), np.uintp(group_TK[token, column])
            waits_TK[token, column] = False
            for candidate in range(offered_TC.shape[1]):
                expert = np.uintp(offered_TC[token, candidate])
                if expert >= np.uintp(experts) or not (anywhere or near_EE[own, expert]):
                    continue
                if left_X[group + expert] <= 0:
                    continue
                used = False
                for other in range(width):
                    used |= ids_TK[token, other] == offered_TC[token, candidate]
                if used:
                    continue
                waits_TK[token, column] = True
                token_T[asking], column_T[asking], asked_T[asking] = token, column, candidate
                key_T[asking] = group + expert
                value_T[asking] = -turn_TK[token, column] if turn_TK.size else probs_TC[token, candidate]
                asking += 1
                break
        waiting = still
        mark_largest(key_T[:asking], left_X, value_T[:asking], in_T[:asking])
        for asker in range(asking):
            if in_T[asker]:
                token, column, candidate = token_T[asker], column_T[asker], asked_T[asker]
                ids_TK[token, column] = offered_TC[token, candidate]
                scores_TK[token, column] = probs_TC[token, candidate]
                waits_TK[token, column], moved_TK[token, column] = False, True
                left_X[key_T[asker]] -= 1

"""Queues: in which order the pairs of a step ask for the places of experts, by who goes first when places run out."""

from typing import Literal

from router.assignment import Assignment
from router.backends import Array, namespace

Drop = Literal["position", "probs", "first_choice", "batch_prioritised"]
DROPS: tuple[Drop, ...] = ("position", "probs", "first_choice", "batch_prioritised")


def queue_order(assignment: Assignment, drop: Drop) -> Array | None:
    """All T * K pairs, counted token by token, in the order they queue; None: as they stand, or by their weights."""
    if drop in ("position", "probs"):
        return None
    xp = namespace(assignment.scores_TK)
    tokens, k = assignment.scores_TK.shape
    device = assignment.scores_TK.device
    if drop == "batch_prioritised":
        token_T = xp.argsort(xp.max(assignment.scores_TK, axis=1), descending=True, stable=True)
    else:
        token_T = xp.arange(tokens, device=device)
    return xp.reshape(xp.arange(k, device=device)[:, None] + token_T * k, (-1,))


def queue_weights(assignment: Assignment, *, renormalise: bool) -> Array:
    """The weights of all pairs, [T * K] float64."""
    xp = namespace(assignment.scores_TK)
    if not renormalise:
        return xp.reshape(xp.astype(assignment.weights_TK, xp.float64), (-1,))
    score_TK = xp.astype(assignment.scores_TK, xp.float64)
    total_T = row_totals(score_TK)
    return xp.reshape(score_TK / xp.where(total_T > 0, total_T, xp.ones_like(total_T))[:, None], (-1,))


def row_totals(values_TK: Array) -> Array:
    """The sum of each row: [T], added column by column, so the same to the bit on every backend."""
    total_T = values_TK[:, 0]
    for column in range(1, values_TK.shape[1]):
        total_T = total_T + values_TK[:, column]
    return total_T


def turns(order_N: Array | None, like_TK: Array) -> Array:
    """When the turn of each pair comes, from 0: [T, K]; `order_N` as of `queue_order`."""
    xp = namespace(like_TK)
    turn_N = xp.arange(like_TK.shape[0] * like_TK.shape[1], device=like_TK.device)
    if order_N is not None:
        by_order_N, turn_N = turn_N, xp.empty_like(turn_N)
        turn_N[order_N] = by_order_N
    return xp.reshape(turn_N, like_TK.shape)

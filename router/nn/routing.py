"""Routing inside the real layer: on the host a policy works on numpy's compiled loops, on a GPU on its own arrays."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from router.assignment import Assignment
from router.backends import on_host
from router.candidates import Candidates
from router.context import RouteContext, State
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.replicas import ReplicaChoice, choose_slots

_Arrays = TypeVar("_Arrays", Candidates, Assignment)


def route(
    policy: RoutingPolicy,
    candidates: Candidates,
    placement: Placement,
    replica_choice: ReplicaChoice,
    context: RouteContext,
    state: State,
) -> tuple[Assignment, torch.Tensor, State]:
    """What a policy makes of torch candidates in layer `context.layer`, the slot of each pair [T, K], and its state.

    The candidates' are all tokens that count: a rank that must ask the others assigns and chooses apart.
    """
    assignment, state = assign(policy, candidates, context, state)
    slot_TK = slots_of(assignment, placement, context.layer, candidates.source_rank_T, replica_choice)
    return assignment, slot_TK, state


def assign(
    policy: RoutingPolicy, candidates: Candidates, context: RouteContext, state: State
) -> tuple[Assignment, State]:
    """What a policy makes of torch candidates, as tensors.

    Backends agree, so that only time depends on which one works. Neither way copies: numpy and torch share memory.
    """
    if not on_host(candidates.probs_TC):
        return policy.route(candidates, context, state)
    assignment, state = policy.route(_each(candidates, torch.Tensor.numpy), context, state)
    return _each(assignment, torch.as_tensor), state


def slots_of(
    assignment: Assignment,
    placement: Placement,
    layer: int,
    source_rank_T: torch.Tensor,
    choice: ReplicaChoice,
    *,
    node_of_G: NDArray[np.int64] | None = None,
    rows_GS: NDArray[np.int64] | None = None,
) -> torch.Tensor:
    """`choose_slots` for tensors, compiled where they lie on the host."""
    compiled = on_host(assignment.ids_TK)
    slot_TK: Any = choose_slots(
        _each(assignment, torch.Tensor.numpy) if compiled else assignment,
        placement,
        layer,
        source_rank_T.numpy() if compiled else source_rank_T,
        choice,
        node_of_G=node_of_G,
        rows_GS=rows_GS,
    )
    return torch.as_tensor(slot_TK)


def _each(arrays: _Arrays, change: Callable[[Any], Any]) -> _Arrays:
    """The same with every array changed."""
    named = {field.name: getattr(arrays, field.name) for field in fields(arrays)}
    return replace(arrays, **{name: change(value) for name, value in named.items() if hasattr(value, "shape")})

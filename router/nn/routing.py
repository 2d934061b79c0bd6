"""Routing inside the real layer: on the host a policy works on numpy's compiled loops, on a GPU on its own arrays."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch

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

    Backends agree, so that only time depends on which one works. Neither way copies: numpy and torch share memory.
    """
    compiled = on_host(candidates.probs_TC)
    if compiled:
        candidates = _each(candidates, torch.Tensor.numpy)
    assignment, state = policy.route(candidates, context, state)
    slot_TK = choose_slots(assignment, placement, context.layer, candidates.source_rank_T, replica_choice)
    if compiled:
        assignment, slot_TK = _each(assignment, torch.as_tensor), torch.as_tensor(slot_TK)
    return assignment, slot_TK, state


def _each(arrays: _Arrays, change: Callable[[Any], Any]) -> _Arrays:
    """The same with every array changed."""
    named = {field.name: getattr(arrays, field.name) for field in fields(arrays)}
    return replace(arrays, **{name: change(value) for name, value in named.items() if hasattr(value, "shape")})

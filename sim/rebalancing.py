"""Rebalancing over time: a placement that follows its traffic, and what that saves and costs.

Steps come in order. Before each one the rebalancer is asked, and sees the loads of steps that are over; if it answers
with another placement, weights move while the step waits, and the step then runs on what is in place.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models.ops import CostModel, WeightTransfer
from router.balance import moved_LS
from router.placement.base import Placement
from router.rebalance import MoveSeconds, Rebalancer
from sim.layout import Layout
from traces.errors import InputError
from traces.model import ModelSpec


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class RebalancingRun:
    """What W steps took: `step_s_W` the steps, `stall_s_W` what each waited for weights before it.

    `moved_W`: slots that were filled anew before each step; `rebalanced_W`: where the rebalancer asked for another
    placement.
    """

    name: str
    step_s_W: NDArray[np.float64]
    stall_s_W: NDArray[np.float64]
    moved_W: NDArray[np.int64]
    rebalanced_W: NDArray[np.bool_]

    @property
    def total_s(self) -> float:
        """Steps and stalls."""
        return float(self.step_s_W.sum() + self.stall_s_W.sum())

    @property
    def moved(self) -> int:
        """Slots filled anew, over all steps."""
        return int(self.moved_W.sum())

    @property
    def rebalancings(self) -> int:
        """How often the placement changed."""
        return int(self.rebalanced_W.sum())


def rebalance_over_time(
    rebalancer: Rebalancer,
    start: Placement,
    loads_WLE: NDArray[np.integer],
    *,
    step_s: Callable[[int, Placement], float],
    move_s: MoveSeconds,
    layers_per_step: int | None = None,
) -> RebalancingRun:
    """Serve W steps of `loads_WLE` rows from placement `start` on.

    `step_s`: seconds of a step, by its number, under a placement; `move_s`: seconds to get from one placement to
    another, in which nothing else runs. `layers_per_step`: bring so many layers into place before each step, one after
    another, and ask the rebalancer again when all are (None: all layers at once).

    Errors: `InputError` if loads are not [W, L, E] of the placement's layers and experts, or `layers_per_step` is < 1.
    """
    if loads_WLE.ndim != 3 or loads_WLE.shape[1:] != (start.layers, start.experts):
        raise InputError(
            f"loads of shape {loads_WLE.shape} for a placement of {start.layers} layers of {start.experts} experts; "
            "give one a step, layer and expert"
        )
    if layers_per_step is not None and layers_per_step < 1:
        raise InputError(f"layers_per_step is {layers_per_step}; use at least 1, or none to move all at once")
    steps = len(loads_WLE)
    step_s_W, stall_s_W = np.zeros(steps), np.zeros(steps)
    moved_W, rebalanced_W = np.zeros(steps, dtype=np.int64), np.zeros(steps, dtype=np.bool_)
    current = wanted = start
    for step in range(steps):
        if current is wanted:
            past_WLE = loads_WLE[max(step - rebalancer.window, 0) : step].copy()  # of what comes it has nothing
            wanted = rebalancer.next(step, current, past_WLE)
            if np.array_equal(wanted.slot_to_expert_LS, current.slot_to_expert_LS):
                wanted = current
            rebalanced_W[step] = wanted is not current
        if current is not wanted:
            before, current = current, _nearer(current, wanted, layers_per_step)
            moved_W[step] = moved_LS(before, current).sum()
            stall_s_W[step] = move_s(before, current)
        step_s_W[step] = step_s(step, current)
    return RebalancingRun(
        name=rebalancer.name, step_s_W=step_s_W, stall_s_W=stall_s_W, moved_W=moved_W, rebalanced_W=rebalanced_W
    )


def _nearer(current: Placement, wanted: Placement, layers: int | None) -> Placement:
    """`current` with the first so many layers that differ as in `wanted`; `wanted` itself where no other differ."""
    differ_X = np.flatnonzero((current.slot_to_expert_LS != wanted.slot_to_expert_LS).any(axis=1))
    if layers is None or differ_X.size <= layers:
        return wanted
    slot_to_expert_LS = current.slot_to_expert_LS.copy()
    slot_to_expert_LS[differ_X[:layers]] = wanted.slot_to_expert_LS[differ_X[:layers]]
    return Placement(slot_to_expert_LS=slot_to_expert_LS, experts=current.experts, ranks=current.ranks)


def migration_s(before: Placement, after: Placement, model: ModelSpec, costs: CostModel, layout: Layout) -> float:
    """Seconds to get from one placement to another while nothing else runs; 0 where nothing moves.

    All weights travel at once, from rank to rank, as `cost_models.ops.WeightTransfer`. Where ranks share their experts'
    widths each fetches its own share. Errors: as `fetched_GG`, and `InputError` if the costs know no such transfer.
    """
    tensor = layout.expert_tensor
    experts_XX = fetched_GG(before, after, layout.node_of_G[::tensor])
    if not experts_XX.any():
        return 0.0
    bytes_GG = np.kron(experts_XX, np.eye(tensor)) * (model.expert_bytes / tensor)
    return float(costs.seconds(WeightTransfer(bytes_XGG=bytes_GG[None])).item())


def fetched_GG(before: Placement, after: Placement, node_of_G: NDArray[np.int64]) -> NDArray[np.int64]:
    """Experts' weights, of all layers, that each rank sends to each other one: [G from, G to].

    A slot whose expert was nowhere on its rank fetches it from the nearest rank that held it: from its own node if one
    there did, and of these the next one up, counted around, so that many who fetch one expert ask different ranks.

    Errors: `InputError` if the placements are not of the same layers, experts and ranks, or `node_of_G` not of theirs.
    """
    shape = (before.layers, before.experts, before.ranks)
    if shape != (after.layers, after.experts, after.ranks) or node_of_G.size != before.ranks:
        raise InputError(
            f"from {before.layers} layers of {before.experts} experts on {before.ranks} ranks to {after.layers} of "
            f"{after.experts} on {after.ranks}, on a layout of {node_of_G.size}; give placements of one deployment"
        )
    layer_M, slot_M = np.nonzero(moved_LS(before, after))
    to_M = slot_M // after.slots_per_rank
    slot_MX = before.expert_slots_LEX[layer_M, after.slot_to_expert_LS[layer_M, slot_M]]
    from_MX = slot_MX // before.slots_per_rank
    ranks = before.ranks
    away_MX = (from_MX - to_M[:, None]) % ranks + ranks * (node_of_G[from_MX] != node_of_G[to_M][:, None])
    away_MX = np.where(slot_MX < 0, 3 * ranks, away_MX)
    from_M = np.take_along_axis(from_MX, away_MX.argmin(axis=1)[:, None], axis=1)[:, 0]
    experts_GG = np.zeros((ranks, ranks), dtype=np.int64)
    np.add.at(experts_GG, (from_M, to_M), 1)
    return experts_GG

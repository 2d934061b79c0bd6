"""The load shapes and problems that `placement.py` compares placements on, and how it times them."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from router.placement import PLACEMENTS
from router.placement.base import Placement
from router.placement.problem import PlacementProblem

LAYERS, EXPERTS, RANKS, NODES, GROUPS, SLOTS = 58, 256, 32, 4, 8, 288
SHAPES = ("zipf 0.8", "zipf 1.0", "zipf 1.2", "lognormal 1", "pareto 2")
SEED = 0
_LEAST_S, _LEAST_ROUNDS, _MOST_ROUNDS = 0.25, 3, 25


def loads_of(shape: str, layers: int = LAYERS, experts: int = EXPERTS) -> NDArray[np.float64]:
    """Loads [L, E] of one shape: a permutation of Zipf's law a layer, or independent draws."""
    rng = np.random.default_rng(SEED)
    kind, parameter = shape.split()
    if kind == "lognormal":
        return rng.lognormal(0, float(parameter), (layers, experts))
    if kind == "pareto":  # numpy's starts at 0, Pareto's own at 1
        return 1 + rng.pareto(float(parameter), (layers, experts))
    popularity_E = np.arange(1, experts + 1) ** -float(parameter)
    return np.stack([rng.permutation(popularity_E) for _ in range(layers)])


def drifted(loads_LE: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """The loads later: each expert's times exp(sigma · N(0, 1))."""
    return loads_LE * np.exp(sigma * np.random.default_rng(SEED + 1).standard_normal(loads_LE.shape))


def problem_of(loads_LE: NDArray[np.float64], **more: Any) -> PlacementProblem:
    """A problem of `SLOTS` slots on `RANKS` ranks and `NODES` nodes, unless told otherwise."""
    return PlacementProblem(loads_LE=loads_LE, **{"ranks": RANKS, "slots": SLOTS, "nodes": NODES, **more})


def planned(algorithm: str, problem: PlacementProblem) -> tuple[Placement, float]:
    """The placement and the milliseconds of planning alone, after warm-up."""
    slots_LS, ms = timed(PLACEMENTS[algorithm].plan, problem)
    return Placement(slot_to_expert_LS=slots_LS, experts=problem.experts, ranks=problem.ranks), ms


def timed(work: Callable[..., Any], *of: Any, **named: Any) -> tuple[Any, float]:
    """What `work` returns, and its median CPU time in milliseconds, the first call (which compiles) not counted."""
    result = work(*of, **named)
    rounds_s: list[float] = []
    while len(rounds_s) < _LEAST_ROUNDS or (sum(rounds_s) < _LEAST_S and len(rounds_s) < _MOST_ROUNDS):
        start_s = time.process_time()
        work(*of, **named)
        rounds_s.append(time.process_time() - start_s)
    return result, median(rounds_s) * 1e3


def lpt_and_swaps(problem: PlacementProblem) -> Placement:
    """The yardstick without redundancy: LPT, then swaps of two slots as long as one makes the fullest rank lighter."""
    slots_LS = PLACEMENTS["lpt"].plan(problem).copy()
    for load_E, expert_S in zip(problem.loads_LE, slots_LS, strict=True):
        _swap(load_E, expert_S.reshape(problem.ranks, -1))
    return Placement(slot_to_expert_LS=slots_LS, experts=problem.experts, ranks=problem.ranks)


@numba.njit(cache=True)
def _swap(load_E: Any, expert_GX: Any) -> None:
    """Swap what leaves the fullest rank and its partner lightest, until nothing does; experts have one slot each."""
    ranks, slots = expert_GX.shape
    load_G = np.zeros(ranks)
    for rank in range(ranks):
        for slot in range(slots):
            load_G[rank] += load_E[expert_GX[rank, slot]]
    while True:
        full = np.argmax(load_G)
        best, best_load = (0, 0, 0), load_G[full]
        for rank in range(ranks):
            for mine in range(slots):
                for theirs in range(slots):
                    less = load_E[expert_GX[full, mine]] - load_E[expert_GX[rank, theirs]]
                    larger = max(load_G[full] - less, load_G[rank] + less)
                    if less > 0 and larger < best_load - 1e-12 * load_G[full]:
                        best, best_load = (rank, mine, theirs), larger
        if best_load == load_G[full]:
            return
        rank, mine, theirs = best
        less = load_E[expert_GX[full, mine]] - load_E[expert_GX[rank, theirs]]
        load_G[full] -= less
        load_G[rank] += less
        kept = expert_GX[full, mine]
        expert_GX[full, mine] = expert_GX[rank, theirs]
        expert_GX[rank, theirs] = kept


def away_from_home(placement: Placement, problem: PlacementProblem) -> float:
    """The share of the load on replicas outside their group's home node, the one that holds most of its experts."""
    slots_of_node = placement.slots // problem.nodes
    group_E = np.arange(problem.experts) // (problem.experts // problem.groups)
    of_replica_LE = problem.loads_LE / placement.replicas_LE
    away = 0.0
    for load_E, expert_S in zip(of_replica_LE, placement.slot_to_expert_LS, strict=True):
        held_NE = np.zeros((problem.nodes, problem.experts), dtype=bool)
        node_S = np.arange(placement.slots) // slots_of_node
        held_NE[node_S, expert_S] = True
        home_X = held_NE.reshape(problem.nodes, problem.groups, -1).sum(axis=2).argmax(axis=0)
        away += load_E[expert_S][home_X[group_E[expert_S]] != node_S].sum()
    return float(away / problem.loads_LE.sum())

"""The sections of `placement.py` that need loads alone: balance, hierarchy, replica choice and drift."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from placement_cases import (
    GROUPS,
    SEED,
    SHAPES,
    away_from_home,
    drifted,
    loads_of,
    lpt_and_swaps,
    planned,
    problem_of,
    timed,
)
from placement_plain import eplb_in_python

from router.balance import balancedness, balancedness_bound, moved_share, rank_loads_LG
from router.moves import improve
from router.placement.base import Placement, slots_in
from router.placement.bound import bound_of
from router.placement.problem import PlacementProblem
from router.relabel import relabel
from router.splits import SPLITS, rank_loads_G, split
from router.splits.lp import lp_split

BASELINES = ("contiguous", "round_robin", "random", "lpt", "eplb")
GOLDEN = np.array([[600, 560, 120, 120, 20, 10, 10, 10]], dtype=float)
AWAY_SHARES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
TOKENS, TOP_K = (256, 1024, 4096), 8
SPLITTERS = ("even", "least_loaded", "water_filling")
LP_LAYERS = 6  # HiGHS takes 10 ms and more for one
SIGMAS, BUDGETS = (0.1, 0.3, 0.6), (0.05, 0.1)


def balance_cases() -> Iterator[dict[str, Any]]:
    """Every algorithm of loads on the five shapes: with redundant slots, without, by hand, and at 256 ranks."""
    for shape in SHAPES:
        yield from _cases(shape, problem_of(loads_of(shape)))
    for shape in SHAPES:
        problem = problem_of(loads_of(shape), slots=256)
        yield from _cases(f"{shape}, no redundancy", problem)
        yield _case(f"{shape}, no redundancy", "lpt_and_swaps", problem, lpt_and_swaps(problem), None)
    yield from _cases("8 experts on 8 x 2 slots", problem_of(GOLDEN, ranks=8, slots=16, nodes=1))
    for shape in SHAPES:
        loads_LE = loads_of(shape, layers=60, experts=384)
        yield from _cases(f"{shape}, 384 experts", problem_of(loads_LE, ranks=256, slots=512, nodes=32))


def _cases(load: str, problem: PlacementProblem) -> Iterator[dict[str, Any]]:
    for algorithm in (*BASELINES, "balanced"):
        placement, ms = planned(algorithm, problem)
        yield _case(load, algorithm, problem, placement, ms)
        if algorithm == "eplb":
            in_python_LS, ms = timed(eplb_in_python, problem)
            assert in_python_LS == placement.slot_to_expert_LS.tolist()
            yield _case(load, "eplb_in_python", problem, placement, ms)


def _case(
    load: str, algorithm: str, problem: PlacementProblem, placement: Placement, ms: float | None
) -> dict[str, Any]:
    """One row; slots moved are counted from the contiguous placement, before and after renumbering ranks."""
    contiguous, _ = planned("contiguous", problem)
    rank_load_LG = rank_loads_LG(placement, problem.loads_LE)
    return {
        "load": load,
        "layers": problem.layers,
        "experts": problem.experts,
        "slots": problem.slots,
        "ranks": problem.ranks,
        "algorithm": algorithm,
        "balancedness": balancedness(rank_load_LG),
        "upper_bound": balancedness_bound(problem.loads_LE, problem.ranks, problem.slots),
        "largest_load": float(rank_load_LG.max()),
        "ms": ms,
        "slots_moved_share": moved_share(contiguous, placement),
        "slots_moved_share_renumbered": moved_share(contiguous, relabel(contiguous, placement)),
    }


def hierarchical_cases() -> Iterator[dict[str, Any]]:
    """Groups on nodes: EPLB, ours, and ours where a share of the redundant slots may leave home."""
    for shape in SHAPES:
        loads_LE = loads_of(shape)
        bound = bound_of(problem_of(loads_LE, groups=GROUPS), loads_LE, "hierarchical")
        runs = [("eplb", 0.0), ("hierarchical", 0.0), *(("soft_hierarchical", share) for share in AWAY_SHARES)]
        for algorithm, away_share in runs:
            problem = problem_of(loads_LE, groups=GROUPS, away_share=away_share)
            placement, ms = planned(algorithm, problem)
            yield {
                "load": shape,
                "algorithm": algorithm,
                "away_share": away_share,
                "balancedness": balancedness(rank_loads_LG(placement, loads_LE)),
                "upper_bound": bound,
                "tokens_away_share": away_from_home(placement, problem),
                "ms": ms,
            }


def splitter_cases() -> Iterator[dict[str, Any]]:
    """Batches drawn from the planned loads: how near each split of rows over replicas comes to the LP's.

    The gap is of layers that the LP is solved for; rows are whole, so that the least possible is the LP's, rounded up.
    Balancedness is over all layers.
    """
    for shape in SHAPES:
        loads_LE = loads_of(shape)
        placement, _ = planned("balanced", problem_of(loads_LE))
        probability_LE = loads_LE / loads_LE.sum(axis=1, keepdims=True)
        rng = np.random.default_rng(SEED)
        for tokens in TOKENS:
            counts_LE = np.stack([rng.multinomial(tokens * TOP_K, p_E) for p_E in probability_LE]).astype(np.int64)
            lp = [timed(lp_split, counts_LE[layer], placement, layer) for layer in range(LP_LAYERS)]
            least_L = np.array([largest for (_, largest), _ in lp])
            of_lp = {"load": shape, "tokens": tokens, "lp_us_per_layer": float(np.median([ms for _, ms in lp])) * 1e3}
            for name in SPLITTERS:
                load_LG, ms = _split_all(name, placement, counts_LE)
                gap_L = load_LG[:LP_LAYERS].max(axis=1) / least_L - 1
                whole_gap_L = load_LG[:LP_LAYERS].max(axis=1) / np.ceil(least_L - 1e-6) - 1
                yield {
                    **of_lp,
                    "splitter": name,
                    "lp_gap": float(gap_L.mean()),
                    "lp_gap_worst": float(gap_L.max()),
                    "whole_rows_gap_worst": float(whole_gap_L.max()),
                    "balancedness": balancedness(load_LG),
                    "us_per_layer": None if ms is None else ms * 1e3 / counts_LE.shape[0],
                }


def _split_all(
    name: str, placement: Placement, counts_LE: NDArray[np.int64]
) -> tuple[NDArray[np.float64], float | None]:
    """Rank loads [L, G], and the milliseconds of the splits of all layers; an even split is none."""
    if name == "even":
        return rank_loads_LG(placement, counts_LE), None

    def all_layers() -> None:
        for layer, counts_E in enumerate(counts_LE):
            SPLITS[name](
                counts_E,
                placement.expert_slots_LEX[layer],
                placement.replicas_LE[layer],
                placement.slots_per_rank,
                placement.ranks,
            )

    load_LG = [
        rank_loads_G(split(name, counts_E, placement, layer), placement, layer)
        for layer, counts_E in enumerate(counts_LE)
    ]
    return np.array(load_LG, dtype=float), timed(all_layers)[1]


def drift_cases() -> Iterator[dict[str, Any]]:
    """The plan of yesterday's loads on today's: as it is, planned anew, and improved by a few moves.

    `moved`: the share of slots whose expert was not on that rank before.
    """
    for shape in SHAPES:
        loads_LE = loads_of(shape)
        before, _ = planned("balanced", problem_of(loads_LE))
        for sigma in SIGMAS:
            today_LE = drifted(loads_LE, sigma)
            bound = balancedness_bound(today_LE, before.ranks, before.slots)
            runs: list[tuple[str, float | None, Placement, float | None]] = [("stale", 0.0, before, None)]
            for algorithm in ("eplb", "balanced"):
                anew, ms = planned(algorithm, problem_of(today_LE))
                renumbered, renumber_ms = timed(relabel, before, anew)
                runs += [
                    (algorithm, None, anew, ms),
                    (f"{algorithm}, ranks renumbered", None, renumbered, ms + renumber_ms),
                ]
            for budget in BUDGETS:
                fills = slots_in(budget, before.slot_to_expert_LS.size)
                better, ms = timed(improve, before, today_LE, fills=fills)
                runs.append(("improve", budget, better, ms))
            for algorithm, budget_share, placement, ms in runs:
                yield {
                    "load": shape,
                    "sigma": sigma,
                    "algorithm": algorithm,
                    "budget": budget_share,
                    "moved": moved_share(before, placement),
                    "balancedness": balancedness(rank_loads_LG(placement, today_LE)),
                    "upper_bound": bound,
                    "ms": ms,
                }

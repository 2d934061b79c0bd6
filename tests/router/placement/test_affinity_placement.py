from importlib import import_module
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.affinity import stays, visits
from router.balance import rank_loads_LG
from router.placement.affinity import BALANCE_TOLERANCE, NODE_COST, affinity
from router.placement.affinity_exact import fewest_visits
from router.placement.affinity_layers import align
from router.placement.affinity_search import Layer, Rows, level_of, search, tokens_by_replica
from router.placement.balanced import balanced
from router.placement.base import Placement
from router.placement.lpt import lpt
from router.placement.problem import PlacementProblem
from traces.batching import split_requests
from traces.formats.npz import import_npz
from traces.presets import PRESETS

planning = import_module("router.placement.affinity")  # `router.placement.affinity` is the function there


def problem_of(ids_TLK: Any, experts: int, **more: Any) -> PlacementProblem:
    """A problem whose loads are those of its tokens."""
    loads_LE = np.stack([np.bincount(ids_TK.ravel(), minlength=experts) for ids_TK in ids_TLK.swapaxes(0, 1)])
    return PlacementProblem(loads_LE=loads_LE.astype(float), ids_TLK=ids_TLK, **more)


def placed(problem: PlacementProblem, slots_LS: Any) -> Placement:
    return Placement(slot_to_expert_LS=slots_LS, experts=problem.experts, ranks=problem.ranks)


def cost(problem: PlacementProblem, slots_LS: Any) -> float:
    assert problem.ids_TLK is not None
    visited = visits(placed(problem, slots_LS), problem.ids_TLK, problem.nodes)
    return float((visited.ranks_L + NODE_COST * visited.nodes_L).sum())


def random_ids(seed: int, tokens: int, layers: int, experts: int, k: int) -> Any:
    """Tokens of uneven favourites, each of one of three kinds with its own."""
    rng = np.random.default_rng(seed)
    favour_XLE = 2 * rng.normal(size=(3, layers, experts))
    score_TLE = favour_XLE[rng.integers(0, 3, tokens)] + rng.gumbel(size=(tokens, layers, experts))
    return score_TLE.argsort(axis=2)[:, :, -k:]


@pytest.mark.parametrize(("experts", "ranks", "nodes"), [(4, 2, 2), (12, 6, 3)])
def test_experts_that_fire_together_lie_on_one_rank(experts: int, ranks: int, nodes: int) -> None:
    """Tokens use expert i with i + E/2, all pairs alike: each rank of two slots gets a pair. 4: exact, 12: searched."""
    one_T = np.arange(30 * experts) % (experts // 2)
    problem = problem_of(
        np.stack([one_T, one_T + experts // 2], axis=1)[:, None], experts, ranks=ranks, slots=experts, nodes=nodes
    )
    pairs = sorted(affinity(problem).reshape(-1, 2).tolist())
    assert pairs == [[i, i + experts // 2] for i in range(experts // 2)]


def test_what_a_token_uses_next_lies_on_the_same_rank() -> None:
    """One expert a token, so no layer alone has anything to gain; after expert e comes expert e + 1."""
    first_T = np.arange(400) % 16
    problem = problem_of(
        np.stack([first_T, (first_T + 1) % 16, (first_T + 2) % 16], axis=1)[:, :, None],
        16,
        ranks=8,
        slots=16,
        nodes=2,
    )
    assert problem.ids_TLK is not None
    after = placed(problem, affinity(problem))
    assert stays(after, problem.ids_TLK, nodes=2).nodes_L.min() > 0.8  # 0.5 by chance
    assert stays(after, problem.ids_TLK, nodes=2).ranks_L.min() > 0.8  # 0.125 by chance


def test_ranks_and_nodes_are_renamed_by_hand() -> None:
    """Two nodes of two ranks, a replica a rank. Each token goes from replica s to replica 3 - s: to the other node.

    Renamed, replica 3 lies where replica 0 lay before it, and so on.
    """
    aligned_LS = align(np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), [np.eye(4)[::-1] * 5], 4, 2, NODE_COST)
    assert aligned_LS.tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), nodes=st.sampled_from([1, 2, 4]))
def test_names_change_neither_the_sets_nor_for_the_worse(seed: int, nodes: int) -> None:
    rng = np.random.default_rng(seed)
    rank_LS = np.stack([rng.permutation(8) // 2 for _ in range(3)])
    follows = [rng.integers(0, 9, (8, 8)) for _ in range(2)]
    aligned_LS = align(rank_LS, follows, 4, nodes, NODE_COST)

    def kept(rank_LS: Any) -> list[float]:
        node_LS = rank_LS // (4 // nodes)
        return [
            float((w * (rank_LS[i][:, None] == rank_LS[i + 1])).sum())
            + NODE_COST * float((w * (node_LS[i][:, None] == node_LS[i + 1])).sum())
            for i, w in enumerate(follows)
        ]

    assert sum(kept(aligned_LS)) >= sum(kept(rank_LS)) - 1e-9
    for before_S, after_S in zip(rank_LS, aligned_LS, strict=True):
        for beside in (lambda group_S: group_S, lambda group_S: group_S // (4 // nodes)):
            one, other = beside(before_S), beside(after_S)
            np.testing.assert_array_equal(one[:, None] == one, other[:, None] == other)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 999),
    shape=st.sampled_from([(8, 4, 2, 0), (12, 4, 4, 0), (12, 6, 2, 6), (9, 3, 1, 3), (6, 2, 2, 6)]),
)
def test_ranks_stay_as_balanced_as_allowed(seed: int, shape: tuple[int, int, int, int]) -> None:
    experts, ranks, nodes, redundant = shape
    problem = problem_of(
        random_ids(seed, 60, 2, experts, 3), experts, ranks=ranks, slots=experts + redundant, nodes=nodes
    )
    loads_LG = rank_loads_LG(placed(problem, affinity(problem)), problem.loads_LE)
    even_LG = rank_loads_LG(placed(problem, balanced(problem)), problem.loads_LE)
    mean_L = even_LG.mean(axis=1)
    assert (loads_LG.max(axis=1) <= 1.00001 * np.maximum(even_LG.max(axis=1), (1 + BALANCE_TOLERANCE) * mean_L)).all()
    allowed_L = (even_LG**2).mean(axis=1) + (BALANCE_TOLERANCE * mean_L) ** 2
    assert ((loads_LG**2).mean(axis=1) <= 1.00001 * allowed_L).all()


@pytest.mark.parametrize("nodes", [1, 3])
def test_the_exact_answer_is_the_best_of_all(nodes: int) -> None:
    """Six experts on three ranks, by all 720 orders of them."""
    ids_TLK = random_ids(nodes, 40, 1, 6, 2)
    problem = problem_of(ids_TLK, 6, ranks=3, slots=6, nodes=nodes)
    load_E = problem.loads_LE[0]
    most_rows, most_squares = 1.2 * load_E.sum() / 3, 1.02 * load_E.sum() ** 2 / 3
    rank_E = fewest_visits(
        ids_TLK[:, 0],
        load_E,
        ranks=3,
        nodes=nodes,
        most_rows=most_rows,
        most_squares=most_squares,
        node_cost=NODE_COST,
    )
    every = np.array(list(permutations(range(6))))
    load_XG = load_E[every].reshape(-1, 3, 2).sum(axis=2)
    allowed = every[(load_XG.max(axis=1) <= most_rows) & ((load_XG**2).sum(axis=1) <= most_squares)]
    assert 0 < len(allowed) < len(every)
    assert cost(problem, np.argsort(rank_E, kind="stable")[None]) == pytest.approx(
        min(cost(problem, order[None]) for order in allowed)
    )


def test_the_search_comes_near_the_exact_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    worse = []
    for seed in range(16):
        ranks, nodes = [(4, 2), (2, 2), (4, 1), (4, 4)][seed % 4]
        problem = problem_of(random_ids(seed, 100, 1, 8, 2 + seed % 2), 8, ranks=ranks, slots=8, nodes=nodes)
        exact = cost(problem, affinity(problem))
        monkeypatch.setattr(planning, "EXACT_EXPERTS", 0)
        worse.append(cost(problem, affinity(problem)) / exact - 1)
        monkeypatch.undo()
    assert min(worse) > -1e-9
    assert max(worse) < 0.02


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), nodes=st.sampled_from([1, 2]))
def test_what_swaps_keep_up_to_date_is_what_a_count_gives(seed: int, nodes: int) -> None:
    """Eight experts, the first two with two replicas; a token has one replica of an expert, or none."""
    rng = np.random.default_rng(seed)
    expert_S = np.array([0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    replica_TK = np.where(rng.random((40, 3)) < 0.2, -1, 2 * random_ids(seed, 40, 1, 6, 3)[:, 0])
    first_S, token_P = tokens_by_replica(replica_TK, 12)
    rank_S = np.array([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3])
    load_S = rng.random(12)
    layer = Layer(replica_TK, first_S, token_P, expert_S, load_S, np.zeros((12, 4)))
    more: dict[str, Any] = {"visit_cost": 1.0, "spread_cost": 100.0}
    levels = [level_of(rank_S // width, 4 // width, replica_TK, expert_S, **more) for width in (1, 4 // nodes)]
    rows = Rows(np.bincount(rank_S, weights=load_S), 3.0, np.full(1, 0.5), 10.0)
    final_S = search(layer, levels[0], levels[1], rows, 5, seed)
    np.testing.assert_allclose(rows.load_G, np.bincount(final_S, weights=load_S))
    assert np.bincount(final_S).tolist() == [3, 3, 3, 3]
    for width, level in zip((1, 4 // nodes), levels, strict=True):
        counted = level_of(final_S // width, 4 // width, replica_TK, expert_S, **more)
        for kept, again in zip(level, counted, strict=True):
            np.testing.assert_array_equal(kept, again)


def test_replicas_of_an_expert_go_to_different_nodes() -> None:
    """Twelve slots for six experts on two nodes: experts of two replicas have one on each, those of four two."""
    problem = problem_of(random_ids(5, 200, 2, 6, 2), 6, ranks=4, slots=12, nodes=2)
    for expert_S in affinity(problem):
        one, other = (np.bincount(half, minlength=6) for half in expert_S.reshape(2, 6))
        assert np.abs(one - other).max() <= 1


def test_many_tokens_are_sampled_and_the_seed_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MOST_TOKENS", 20)
    ids_TLK = random_ids(1, 500, 1, 12, 3)
    plans = [affinity(problem_of(ids_TLK, 12, ranks=4, slots=12, seed=seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(plans[0], plans[1])
    assert (plans[0] != plans[2]).any()


def test_recorded_tokens_visit_fewer_nodes_than_those_of_a_balanced_placement(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt-oss-20b, planned on half of its requests and scored on the others, in both orders."""
    monkeypatch.setattr(planning, "KICKED_PAIRS", 0)
    trace = import_npz(shared_data / "traces/gptoss20b/gptoss20b_ship.npz", model=PRESETS["gpt-oss-20b"]).trace
    halves = split_requests(trace, (1, 1))
    for earlier, later in (halves, halves[::-1]):
        problem = problem_of(earlier.expert_ids_TLC.astype(np.int64), 32, ranks=16, slots=32, nodes=4)
        ids_TLK = later.expert_ids_TLC
        ours, theirs = placed(problem, affinity(problem)), placed(problem, lpt(problem))
        assert visits(ours, ids_TLK, 4).nodes_L.mean() < 0.92 * visits(theirs, ids_TLK, 4).nodes_L.mean()
        assert visits(ours, ids_TLK, 4).ranks_L.mean() < visits(theirs, ids_TLK, 4).ranks_L.mean()
        assert stays(ours, ids_TLK, 4).nodes_L.mean() > 1.2 * stays(theirs, ids_TLK, 4).nodes_L.mean()

import numpy as np

from router.placement.problem import PlacementProblem
from router.placement.round_robin import round_robin


def dealt(experts: int, ranks: int, slots: int) -> list[list[int]]:
    """The experts of each rank."""
    problem = PlacementProblem(loads_LE=np.ones((1, experts)), ranks=ranks, slots=slots)
    return round_robin(problem).reshape(ranks, -1).tolist()


def test_expert_e_is_on_rank_e_modulo_the_ranks() -> None:
    assert dealt(6, 3, 6) == [[0, 3], [1, 4], [2, 5]]


def test_redundant_slots_go_on_at_expert_0() -> None:
    # After expert 4 on rank 1 come 0 on rank 2 (a second one, rank 0 has the first).
    assert dealt(5, 3, 6) == [[0, 3], [1, 4], [2, 0]]


def test_experts_that_divide_over_the_ranks_pass_over_one() -> None:
    # The fifth card would put expert 0 on rank 0 again: it goes to rank 1, and the rest of the round one further too.
    assert dealt(4, 2, 8) == [[0, 2, 1, 3], [1, 3, 0, 2]]
    assert dealt(4, 4, 8) == [[0, 3], [1, 0], [2, 1], [3, 2]]


def test_every_layer_is_dealt_alike() -> None:
    slots_LS = round_robin(PlacementProblem(loads_LE=np.random.default_rng(0).random((3, 8)), ranks=4, slots=12))
    assert (slots_LS == slots_LS[0]).all()

"""Least-loaded spill: plans by hand, and what holds of every plan."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.candidates import Candidates
from router.context import RouteContext
from router.policies import RoutingPolicy
from router.policies.top_k import TopK
from router.spill import Move, Spill, SpillPlan, rows_by_source
from traces.errors import InputError

# Two ranks of two slots. Rank 0's slots have 16 and 4 rows, rank 1's none: 20 rows, a mean of 10.
ROWS = np.array([[10, 2, 0, 0], [6, 2, 0, 0]])


def test_the_last_rows_of_the_fullest_expert_go_to_the_least_loaded_rank() -> None:
    plan = Spill(factor=1.0, least_rows=1, guests=1).plan(ROWS, ranks=2)
    # Slot 0's queue is 10 rows of source 0, then 6 of source 1; rows 6 to 15 move: 4 of the first, 6 of the second.
    assert plan.moves == (Move(slot=0, to_rank=1, guest=0, first=6, rows=10),)
    assert plan.rows_GP.tolist() == [[6, 2, 0, 0, 0, 4], [0, 2, 0, 0, 0, 6]]
    assert plan.experts_XX.tolist() == [[0, 1], [0, 0]]


def test_a_rank_keeps_its_factor_over_the_mean() -> None:
    plan = Spill(factor=1.5, least_rows=1, guests=1).plan(ROWS, ranks=2)  # 15 rows may stay
    assert [(move.first, move.rows) for move in plan.moves] == [(11, 5)]


@pytest.mark.parametrize(("least_rows", "moved"), [(10, 10), (11, 0)])
def test_weights_are_not_sent_for_fewer_rows(least_rows: int, moved: int) -> None:
    plan = Spill(factor=1.0, least_rows=least_rows, guests=1).plan(ROWS, ranks=2)
    assert sum(move.rows for move in plan.moves) == moved


def test_one_expert_can_spill_to_several_ranks() -> None:
    plan = Spill(factor=1.0, least_rows=1, guests=1).plan(np.array([[30, 0, 0]]), ranks=3)
    assert [(move.to_rank, move.first, move.rows) for move in plan.moves] == [(1, 20, 10), (2, 10, 10)]
    assert plan.rows_GP.tolist() == [[10, 0, 0, 10, 0, 10]]


def test_what_a_rank_lends_is_in_the_order_of_those_who_get_it() -> None:
    """Rank 2's slots 4 and 5 have 9 and 15 rows, of 24; 8 may stay: 8 of slot 5 go to rank 0, 8 of slot 4 to rank 1."""
    plan = Spill(factor=1.0, least_rows=1, guests=1).plan(np.array([[0, 0, 0, 0, 9, 15]]), ranks=3)
    assert [(move.slot, move.to_rank) for move in plan.lent_by(2)] == [(5, 0), (4, 1)]
    assert plan.rows_GP.tolist() == [[0, 0, 8, 0, 0, 8, 1, 7, 0]]


def test_a_rank_takes_so_many_guests() -> None:
    """Slots of 8, 8 and 8 rows on rank 0; 12 rows may stay, so 12 go: 8 of slot 0, then 4 of slot 1."""
    rows_GS = np.array([[8, 8, 8, 0, 0, 0]])
    one, two = (Spill(factor=1.0, least_rows=1, guests=guests).plan(rows_GS, ranks=2) for guests in (1, 2))
    assert one.rows_GP.tolist() == [[0, 8, 8, 0, 0, 0, 0, 8]]
    assert two.rows_GP.tolist() == [[0, 4, 8, 0, 0, 0, 0, 0, 8, 4]]
    assert [move.guest for move in two.guests_of(1)] == [0, 1]
    assert [move.slot for move in two.lent_by(0)] == [0, 1]
    assert two.lent_by(1) == two.guests_of(0) == []


def test_nothing_moves_where_nothing_is_over() -> None:
    for rows_GS in (np.array([[5, 5]]), np.array([[0, 0]])):
        plan = Spill(factor=1.0, least_rows=1, guests=1).plan(rows_GS, ranks=2)
        assert plan.moves == ()
        assert plan.rows_GP[:, [0, 2]].tolist() == rows_GS.tolist()


def test_it_is_no_limit() -> None:
    """The policy's assignment is the one without it."""
    rng = np.random.default_rng(0)
    candidates = Candidates.from_logits(rng.normal(size=(40, 8)) * 3, np.arange(40) % 2)
    context = RouteContext(layer=0, ranks=2, renormalise=True)
    free = RoutingPolicy(selection=TopK(k=2))
    spilled = RoutingPolicy(selection=TopK(k=2), capacity=Spill(factor=1.0, least_rows=1, guests=1))
    (without, _), (with_spill, _) = (policy.route(candidates, context, {}) for policy in (free, spilled))
    for name in ("ids_TK", "weights_TK", "kept_TK", "rerouted_TK"):
        np.testing.assert_array_equal(getattr(with_spill, name), getattr(without, name))
    assert Spill().places_of(with_spill, candidates, context) == (20, 20)
    assert spilled.describe() == "top_k(k=2) spill=1 least 1 guests 1"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"factor": 0.9}, r"policy least_loaded_spill: factor is 0.9; it must be a number of at least 1"),
        ({"least_rows": 0}, r"policy least_loaded_spill: least_rows is 0; it must be a whole number of at least 1"),
        ({"guests": 1.5}, r"policy least_loaded_spill: guests is 1.5; it must be a whole number of at least 1"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Spill(**parameters)


@dataclass(frozen=True, kw_only=True)
class Spilled:
    """A step's slots, some unused, on a few ranks; and its plan."""

    slot_TK: Any
    source_rank_T: Any
    spill: Spill
    plan: SpillPlan


@st.composite
def spilled(draw: st.DrawFn) -> Spilled:
    ranks, slots_per_rank, sources = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    slots = ranks * slots_per_rank
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tokens, width = draw(st.integers(0, 60)), draw(st.integers(1, 3))
    popularity = rng.dirichlet(np.full(slots, draw(st.sampled_from([0.1, 1.0]))))
    slot_TK = rng.choice(slots, size=(tokens, width), p=popularity)
    slot_TK[rng.random(slot_TK.shape) < 0.1] = -1
    source_rank_T = rng.integers(0, sources, tokens)
    spill = Spill(
        factor=draw(st.sampled_from([1.0, 1.1, 1.5])),
        least_rows=draw(st.sampled_from([1, 2, 5])),
        guests=draw(st.integers(1, 3)),
    )
    plan = spill.plan(rows_by_source(slot_TK, source_rank_T, (sources, slots)), ranks)
    return Spilled(slot_TK=slot_TK, source_rank_T=source_rank_T, spill=spill, plan=plan)


@settings(max_examples=150, deadline=None)
@given(step=spilled())
def test_every_row_goes_to_its_slot_or_to_a_guest_place_of_it(step: Spilled) -> None:
    plan = step.plan
    place_TK = plan.place_of(step.slot_TK, step.source_rank_T)
    np.testing.assert_array_equal(place_TK < 0, step.slot_TK < 0)
    sources, places = plan.rows_GP.shape
    np.testing.assert_array_equal(rows_by_source(place_TK, step.source_rank_T, (sources, places)), plan.rows_GP)
    guests = {(move.to_rank, move.guest): move.slot for move in plan.moves}
    assert len(guests) == len(plan.moves)
    order = np.argsort(step.source_rank_T, kind="stable")
    queue_of: dict[int, list[int]] = {}
    for slot, place in zip(step.slot_TK[order].reshape(-1).tolist(), place_TK[order].reshape(-1).tolist(), strict=True):
        if slot < 0:
            continue
        rank, index = divmod(place, plan.places_per_rank)
        home = divmod(slot, plan.slots_per_rank)
        assert (
            guests[rank, index - plan.slots_per_rank] == slot
            if index >= plan.slots_per_rank
            else ((rank, index) == home)
        )
        queue_of.setdefault(slot, []).append(place)
    # The first rows of a queue stay, and each place takes one run of it.
    for slot, queue in queue_of.items():
        runs = [place for n, place in enumerate(queue) if n == 0 or queue[n - 1] != place]
        assert len(runs) == len(set(runs))
        stays = slot // plan.slots_per_rank * plan.places_per_rank + slot % plan.slots_per_rank
        assert stays not in runs[1:]


@settings(max_examples=150, deadline=None)
@given(step=spilled())
def test_loads_come_closer_and_nobody_is_filled_beyond_the_limit(step: Spilled) -> None:
    plan, spill = step.plan, step.spill
    before_X = plan.rows_GS.sum(axis=0).reshape(plan.ranks, -1).sum(axis=1)
    after_X = plan.rows_GP.sum(axis=0).reshape(plan.ranks, -1).sum(axis=1)
    limit = int(np.ceil(spill.factor * before_X.sum() / plan.ranks))
    assert before_X.sum() == after_X.sum()
    assert (after_X <= np.maximum(before_X, limit)).all()
    assert (after_X >= np.minimum(before_X, limit)).all()
    assert all(move.rows >= spill.least_rows for move in plan.moves)
    assert (plan.experts_XX.sum(axis=0) <= spill.guests).all()
    assert (plan.experts_XX.diagonal() == 0).all()


@settings(max_examples=100, deadline=None)
@given(step=spilled())
def test_a_rank_alone_and_torch_find_the_same_places(step: Spilled) -> None:
    place_TK = step.plan.place_of(step.slot_TK, step.source_rank_T)
    for source in range(step.plan.rows_GS.shape[0]):
        own_T = step.source_rank_T == source
        alone_TK = step.plan.place_of(torch.as_tensor(step.slot_TK[own_T]), torch.as_tensor(step.source_rank_T[own_T]))
        np.testing.assert_array_equal(alone_TK.numpy(), place_TK[own_T])

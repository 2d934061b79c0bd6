"""What remains of a placement when a rank is gone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.lost_ranks import without_rank
from router.placement import place
from router.placement.base import Placement
from traces.errors import InputError

THREE = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 0, 1, 3]]), experts=4, ranks=3)


def test_an_expert_that_is_nowhere_else_takes_the_replicas_slot_that_is_missed_least() -> None:
    """Without rank 2 expert 3 (load 2) has no slot, and only expert 0 (4, so 2 a replica) has two: slots 0 and 3.

    Ranks have 2 + 1 = 3 and 5 + 2 = 7. In slot 0 it makes rank 1 take all of expert 0: 5 + 4 = 9. In slot 3 it leaves
    rank 1 at 5 + 2 = 7, and rank 0 has 4 + 1 = 5.
    """
    after = without_rank(THREE, 2, np.array([[4, 1, 5, 2]]))
    assert after.ranks == 2
    assert after.slot_to_expert_LS.tolist() == [[0, 1, 2, 3]]


def test_ranks_behind_the_lost_one_move_up() -> None:
    """Rank 0 is gone; ranks 1 and 2 hold all four experts as they are."""
    assert without_rank(THREE, 0, np.ones((1, 4))).slot_to_expert_LS.tolist() == [[2, 0, 1, 3]]


def test_too_few_slots_are_refused_with_the_mend() -> None:
    placement = place("contiguous", np.ones((1, 256)), ranks=32, slots=256)
    with pytest.raises(InputError) as refused:
        without_rank(placement, 3, np.ones((1, 256)))
    assert str(refused.value) == "31 ranks × 8 slots hold 248, fewer than 256 experts; add redundant slots"
    with pytest.raises(InputError, match="rank 3 is gone, but there are only ranks 0 to 2"):
        without_rank(THREE, 3, np.ones((1, 4)))
    with pytest.raises(InputError, match="rank 0 is gone, and there is no other"):
        without_rank(place("lpt", np.ones((1, 2)), ranks=1, slots=2), 0, np.ones((1, 2)))
    with pytest.raises(InputError, match=r"loads of shape \(1, 3\) for a placement of 1 layers of 4 experts"):
        without_rank(THREE, 0, np.ones((1, 3)))


@settings(max_examples=60, deadline=None)
@given(ranks=st.integers(2, 6), experts=st.integers(1, 12), more=st.integers(0, 2), seed=st.integers(0, 99))
def test_only_as_many_slots_change_as_experts_were_left_without(ranks: int, experts: int, more: int, seed: int) -> None:
    size = min(-(-experts // (ranks - 1)) + more, experts)
    rng = np.random.default_rng(seed)
    loads_LE = rng.integers(0, 9, size=(2, experts))
    placement = place("lpt", loads_LE, ranks=ranks, slots=ranks * size)
    lost = int(rng.integers(ranks))
    after = without_rank(placement, lost, loads_LE)  # a Placement has a slot for every expert
    kept_LS = np.delete(placement.slot_to_expert_LS.reshape(2, ranks, size), lost, axis=1).reshape(2, -1)
    for kept_S, after_S in zip(kept_LS, after.slot_to_expert_LS, strict=True):
        assert (kept_S != after_S).sum() == experts - np.unique(kept_S).size

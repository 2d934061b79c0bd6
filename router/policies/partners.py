"""Collaboration-constrained routing: beside its best expert a token uses only experts that usually go with it."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from router.backends import Array, first_true, namespace
from router.candidates import Candidates
from router.context import RouteContext, State
from router.parameters import whole
from router.part import Need
from router.policies.base import Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class Partners(Selection):
    """Every token uses its best expert, and the best `k` - 1 others among that one's `partners`.

    The partners of an expert are those that earlier tokens used most often together with it (of equal ones the lower
    id; one never used with it is no partner). Fewer pairs of experts then share a token, so that a placement which
    keeps partners on one rank sends each token to fewer ranks; without such a placement it only costs gate mass. It
    needs earlier traffic, and more candidates than k: a token whose candidates hold fewer partners uses fewer experts.
    The paper trains the model on with the constraint; here it meets a model that has not seen it.
    """

    name: ClassVar[str] = "partners"
    source: ClassVar[str] = "Collaboration-constrained routing, arXiv 2504.01337"
    needs: ClassVar[tuple[Need, ...]] = ("more candidates than k", "earlier traffic")
    k: int = field(metadata=whole(2, 8, "experts a token"))
    partners: int = field(metadata=whole(2, 16, "experts that may stand beside the best one"))

    @property
    def width(self) -> int:
        """K is k itself."""
        return self.k

    def choose(self, candidates: Candidates, context: RouteContext, state: State) -> tuple[Array, State]:
        """The best candidate and the first k - 1 of its partners."""
        history = context.history_for(self.name)
        history.check_layer(context.layer, experts=candidates.all_experts)
        together_EE = history.together_LEE[context.layer]
        ids_TC = candidates.ids_TC
        xp = namespace(ids_TC)
        partner_EE = _partners_of(together_EE.tobytes(), together_EE.shape[0], self.partners)
        partner_TE = xp.asarray(partner_EE, device=ids_TC.device)[ids_TC[:, 0]]
        allowed_TC = xp.take_along_axis(partner_TE, ids_TC, axis=1)
        allowed_TC[:, 0] = True
        return first_true(allowed_TC, self.k), state


def partners_of(together_EE: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """Whether the second expert is a partner of the first: bool [E, E], at most `count` true in a row, no diagonal.

    >>> partners_of(np.array([[9, 1, 2], [1, 5, 0], [2, 0, 5]]), 1).tolist()
    [[False, False, True], [True, False, False], [True, False, False]]
    """
    others_EE = together_EE.copy()
    np.fill_diagonal(others_EE, 0)
    ids_EX = np.argsort(-others_EE, axis=1, kind="stable")[:, :count]
    partner_EE = np.zeros(others_EE.shape, dtype=np.bool_)
    np.put_along_axis(partner_EE, ids_EX, values=True, axis=1)
    return partner_EE & (others_EE > 0)


@lru_cache(maxsize=128)  # as many as models have layers
def _partners_of(together_bytes: bytes, experts: int, count: int) -> NDArray[np.bool_]:
    return partners_of(np.frombuffer(together_bytes, dtype=np.int64).reshape(experts, experts), count)

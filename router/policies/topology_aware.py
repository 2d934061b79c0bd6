"""Topology-aware routing: experts far away must be better to be chosen."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from router.backends import Array, best_of_row, namespace
from router.candidates import Candidates
from router.context import RouteContext, State
from router.openings import UNIT
from router.parameters import number
from router.part import Need
from router.policies.base import Adjustment


@dataclass(frozen=True, slots=True, kw_only=True)
class TopologyAware(Adjustment):
    """A token's candidates lose `price` times how far away they are, and it takes the best ones after that.

    Scores count as shares of the token's best one, distances as shares of the longest in the cluster: the time of a row
    on the links between the token's rank and the expert's, there and back. Traffic moves to near ranks, so this helps
    where some links are much slower than others, between nodes; inside one node all others are equally far, and only
    the own rank is nearer. It needs candidates beyond k, a placement and prices. TA-MoE trains the router with a loss
    that shapes dispatch by link bandwidth; from general knowledge, and not checked against its text, this is the same
    aim at inference: a price on each choice. At price 0 nothing changes.
    """

    name: ClassVar[str] = "topology_aware"
    source: ClassVar[str] = "after TA-MoE, arXiv 2302.09915"
    needs: ClassVar[tuple[Need, ...]] = ("placement and prices", "more candidates than k")
    price: float = field(metadata=number(0, 1, "score, as a share of the best, that the longest way costs"))

    def adjust(
        self, used_TC: Array, candidates: Candidates, context: RouteContext, state: State
    ) -> tuple[Array, State]:
        """The best after the price of the way."""
        prices = context.prices_for(self.name)
        longest_s = float(prices.hop_s_GG.max())
        if not self.price or not longest_s or not candidates.tokens:
            return used_TC, state
        xp = namespace(used_TC)
        way_GE = np.zeros((prices.ranks, candidates.all_experts))
        way_GE[:, : candidates.experts] = (prices.hop_s_GG / longest_s) @ prices.share_LEG[context.layer].T
        price_GE = xp.asarray(np.round(self.price * way_GE / UNIT), device=used_TC.device)
        probs_TC = xp.astype(candidates.probs_TC, xp.float64)
        best_T1 = xp.where(probs_TC[:, :1] > 0, probs_TC[:, :1], xp.ones_like(probs_TC[:, :1]))
        score_TC = xp.round(probs_TC / best_T1 / UNIT)
        worth_TC = score_TC - price_GE[candidates.source_rank_T[:, None], candidates.ids_TC]
        return best_of_row(worth_TC, xp.sum(xp.astype(used_TC, xp.int64), axis=1)), state

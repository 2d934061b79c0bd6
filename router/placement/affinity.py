"""Affinity: experts that fire together lie together, so that tokens visit few nodes and few ranks.

Inside a layer that cuts what the wire protocols send (`per_rank`: one copy a rank, `per_node`: one a node). From layer
to layer it cuts traffic only where tokens stay with their experts (ExFlow, arXiv 2401.08383; MoETuner, 2502.06643);
where attention is data-parallel they go home in between. So it counts for less here.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
from numpy.typing import NDArray

from router.placement.affinity_exact import fewest_visits
from router.placement.affinity_layers import align, follows_SS, pull_SG
from router.placement.affinity_search import Layer, Rows, level_of, search, tokens_by_replica
from router.placement.affinity_turns import replicas_in_turn
from router.placement.balanced import balanced
from router.placement.problem import PlacementProblem

# How uneven ranks may get, as a share of their mean rows: none has more beyond it (or than the balanced placement's
# fullest, if that is more), and the mean square of their deviations grows by its square at most. Measured on recorded
# gpt-oss-20b on 16 ranks, planned on one half and scored on the other: half as much leaves 5% more visits of nodes,
# twice as much spares 0.3%; later requests are less balanced with each (0.48, 0.47, 0.45), for experts that fire
# together also get busy together.
BALANCE_TOLERANCE = 0.1
# A copy over the network takes so much longer than one inside a node: an H100's NVLink 450 GB/s, its NIC 50 GB/s.
NODE_COST = 9.0
# What a pair of experts on one node (or rank) in consecutive layers counts, in visits of one. Measured: 0.1 to 1 keep
# alike, and up to 0.25 costs no visits.
STAY_SHARE = 0.25
# The search starts anew so often that a sweep over all pairs of replicas, each time, looks at so many: 19 times for 32
# slots, never for 256; but no more often than 50 times. Measured on gpt-oss-20b (32 slots): that cuts visits of nodes
# by 4 to 6%, and five times as many by 0.4% more.
KICKED_PAIRS, MOST_KICKS = 20_000, 50
# More tokens than this are sampled: the search takes time in proportion.
MOST_TOKENS = 4096
# Up to so many experts without replicas the best placement of a layer is found and proven, in 15 ms; with 16 it takes
# 0.1 to 1 s. The search finds it in 53 of 56 cases and comes within 1.5% of it. Measured on random sets.
EXACT_EXPERTS = 8


def affinity(problem: PlacementProblem) -> NDArray[np.int64]:
    """Slots [L, S] that let a token visit few nodes and, second, few ranks, and stay there from layer to layer.

    1. Replicas and ranks as the balanced placement has them; tokens take an expert's replicas in turn.
    2. Each layer alone: swaps of replicas while they spare visits and no rank gets too full (`affinity_search`);
       by HiGHS where there are few experts (`affinity_exact`). Replicas of an expert go to different nodes.
    3. Nodes and ranks change names from layer to layer, so that most tokens stay: an assignment problem for each
       pair of layers (`affinity_layers`), which costs neither visits nor balance.
    4. Layer by layer again, with what stays between it and its neighbours as they lie, and names once more.
    """
    assert problem.ids_TLK is not None
    ranks, nodes = problem.ranks, problem.nodes
    ids_TLK = _sampled(problem.ids_TLK, problem.seed)
    layers = [_Layer.of(problem, place, start_S, ids_TLK[:, place]) for place, start_S in enumerate(balanced(problem))]
    follows = [follows_SS(one.replica_TK, later.replica_TK, problem.slots) for one, later in pairwise(layers)]
    rank_LS = align(np.stack([layer.alone() for layer in layers]), follows, ranks, nodes, NODE_COST)
    for place, layer in enumerate(layers):
        kept_SG = STAY_SHARE / ids_TLK.shape[2] * pull_SG(rank_LS, follows, place, ranks, nodes, NODE_COST)
        rank_LS[place] = layer.searched(rank_LS[place], kept_SG, kicks=0)
    rank_LS = align(rank_LS, follows, ranks, nodes, NODE_COST)
    slots_LS = np.argsort(rank_LS, axis=1, kind="stable")
    return np.take_along_axis(np.stack([layer.expert_S for layer in layers]), slots_LS, axis=1)


def _sampled(ids_TLK: NDArray[np.integer], seed: int) -> NDArray[np.integer]:
    tokens = ids_TLK.shape[0]
    if tokens <= MOST_TOKENS:
        return ids_TLK
    return ids_TLK[np.sort(np.random.default_rng(seed).choice(tokens, MOST_TOKENS, replace=False))]


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class _Layer:
    """A layer's S replicas, in the order of their experts.

    `expert_S`, `rank_S` where the balanced placement has them, `load_S` rows in a unit of their own; `replica_TK` of
    each token, -1: none. `most_rows` that a rank may have, and `most_squares` that of all ranks may sum up to.
    """

    problem: PlacementProblem
    expert_S: NDArray[np.int64]
    rank_S: NDArray[np.int64]
    load_S: NDArray[np.float64]
    replica_TK: NDArray[np.int64]
    most_rows: float
    most_squares: float

    @classmethod
    def of(cls, problem: PlacementProblem, layer: int, start_S: NDArray[np.int64], ids_TK: NDArray[np.integer]) -> Self:
        """The replicas that the slots `start_S` hold, and the tokens' turns at them."""
        order_S = np.argsort(start_S, kind="stable")
        expert_S, rank_S = start_S[order_S], order_S // problem.slots_per_rank
        replicas_E = np.bincount(start_S, minlength=problem.experts)
        load_E = problem.even_where_none_LE[layer]
        # In a unit of about the mean, or squares of loads overflow; a power of two, which rounds nothing.
        load_E = np.ldexp(load_E, -int(np.frexp(load_E.mean())[1]))
        load_S = (load_E / replicas_E)[expert_S]
        rows_G = np.bincount(rank_S, weights=load_S, minlength=problem.ranks)
        mean, rounded_up = float(rows_G.mean()), 1 + 1e-9
        turn_TK = replicas_in_turn(ids_TK, replicas_E)
        first_E = np.cumsum(replicas_E) - replicas_E
        return cls(
            problem=problem,
            expert_S=expert_S,
            rank_S=rank_S,
            load_S=load_S,
            replica_TK=np.where(turn_TK < 0, -1, first_E[np.where(turn_TK < 0, 0, ids_TK)] + turn_TK),
            most_rows=rounded_up * max(float(rows_G.max()), (1 + BALANCE_TOLERANCE) * mean),
            most_squares=rounded_up * (float((rows_G**2).sum()) + problem.ranks * (BALANCE_TOLERANCE * mean) ** 2),
        )

    def alone(self) -> NDArray[np.int64]:
        """The rank of each replica [S], whatever the other layers are."""
        problem = self.problem
        if problem.slots == problem.experts <= EXACT_EXPERTS:
            return fewest_visits(
                self.replica_TK,
                self.load_S,
                ranks=problem.ranks,
                nodes=problem.nodes,
                most_rows=self.most_rows,
                most_squares=self.most_squares,
                node_cost=NODE_COST,
            )
        kicks = min(MOST_KICKS, KICKED_PAIRS // problem.slots**2)
        return self.searched(self.rank_S, np.zeros((problem.slots, problem.ranks)), kicks=kicks)

    def searched(self, rank_S: NDArray[np.int64], kept_SG: NDArray[np.float64], *, kicks: int) -> NDArray[np.int64]:
        """The rank of each replica [S], sought from `rank_S`; `kept_SG`: what each spares where, beside visits."""
        problem = self.problem
        replica_TK, expert_S = self.replica_TK, self.expert_S
        first_S, token_P = tokens_by_replica(replica_TK, problem.slots)
        most_a_swap = 4 * (NODE_COST + 1) * len(replica_TK)  # no swap spares more visits
        layer = Layer(
            replica_TK=replica_TK,
            first_S=first_S,
            token_P=token_P,
            expert_S=expert_S,
            load_S=self.load_S,
            kept_SG=np.ascontiguousarray(kept_SG),  # one layout: one compilation
        )
        rows_G = np.bincount(rank_S, weights=self.load_S, minlength=problem.ranks).astype(np.float64)
        rows = Rows(
            load_G=rows_G,
            most=self.most_rows,
            room=np.array([self.most_squares - (rows_G**2).sum()]),
            # As much as a pair of a token can spare, in rows of these tokens.
            cost=(NODE_COST + 1) * np.count_nonzero(replica_TK >= 0) / float(rows_G.sum()),
        )
        node_S = rank_S // problem.ranks_per_node
        return np.asarray(
            search(
                layer,
                level_of(rank_S, problem.ranks, replica_TK, expert_S, visit_cost=1.0, spread_cost=np.inf),
                level_of(node_S, problem.nodes, replica_TK, expert_S, visit_cost=NODE_COST, spread_cost=most_a_swap),
                rows,
                kicks,
                problem.seed,
            )
        )

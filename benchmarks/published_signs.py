"""The claims of `published.yaml` of which only the sign counts: the least simulation that tests each.

Every function gives the time without what the claim is about over the time with it: above 1 is a gain.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from published_steps import (
    Case,
    Drawing,
    Ids,
    cluster_of,
    contiguous,
    dispatch_of,
    drawn,
    kernels,
    planned_loads,
    timeline_of,
    works_of,
)

import moeroute as mr
from router.placement.base import Placement
from sim.layout import Layout
from traces.routing import choose_experts, power_law_popularity

_A100_FRAMEWORKS = ("trtllm", "nccl")
_PLANNED = 1000  # seeds of the tokens that a placement is planned on start here
_SHARED_BY = (1, 2, 4, 8)  # GPUs that share an expert's width


def adaptive_parallelism(given: Case, drawing: Drawing) -> float:
    """The best single layout over the best one for each load."""
    loads = [
        {**given, "tokens_per_rank": tokens, "routing": routing}
        for routing in given["routing_of_loads"]
        for tokens in given["tokens_of_loads"]
    ]
    seconds_WX = np.array([[_layers_s(load, drawing, shared) for shared in _SHARED_BY] for load in loads])
    seconds_WX /= np.array([[load["tokens_per_rank"]] for load in loads])  # as many tokens of each
    return float(seconds_WX.sum(axis=0).min() / seconds_WX.min(axis=1).sum())


def adaptive_pipelining(given: Case, drawing: Drawing) -> float:
    """A large batch at once over the same in two halves."""
    return _layers_s(given, drawing) / _layers_s({**given, "overlap": "two_batch"}, drawing)


def _layers_s(given: Case, drawing: Drawing, expert_tensor: int = 1) -> float:
    model, ranks = mr.preset(given["model"]), given["ranks"]
    ids_LTK = drawn(model, given["routing"], ranks * given["tokens_per_rank"], drawing)
    placement = contiguous(model, ranks // expert_tensor, drawing.layers)
    layout = Layout(node_of_G=np.zeros(ranks, dtype=np.int64), expert_tensor=expert_tensor)
    works = works_of(given, model, ids_LTK, placement, layout=layout)
    return timeline_of(given, works, kernels(given["device"], ranks, _A100_FRAMEWORKS)).step_s


def hierarchical_all_to_all(given: Case, drawing: Drawing) -> float:
    """Straight sends over sends by node."""
    costs = mr.Roofline(cluster_of(given["device"], given["ranks"]))
    once = replace(drawing, layers=1)  # 32 MB of pairs of ranks a layer
    straight, by_node = (
        float(costs.seconds(dispatch_of({**given, "protocol": protocol}, once)).mean())
        for protocol in ("per_rank", "per_node")
    )
    return straight / by_node


def placement_by_loads_and_nodes(given: Case, drawing: Drawing) -> float:
    """Contiguous pairs of experts over the pairing that is best on other tokens."""
    model, ranks, tensor = mr.preset(given["model"]), given["ranks"], given["expert_tensor"]
    node_of_G = np.arange(ranks) // (ranks // given["nodes"])
    layout = Layout(node_of_G=node_of_G, expert_tensor=tensor)
    costs = kernels(given["device"], ranks)
    pairings = np.array(list(_pairings(range(model.experts))))  # both pairs of the first half lie on the first node
    best_LS = []
    for layer in range(drawing.layers):
        ids_TK = _by_domain(given, drawing, layer, first_seed=_PLANNED)
        candidates = Placement(slot_to_expert_LS=pairings, experts=model.experts, ranks=layout.expert_groups)
        one_a_layer = replace(model, layers=len(pairings))
        works = works_of(given, one_a_layer, [ids_TK] * len(pairings), candidates, layout=layout)
        timeline = timeline_of({**given, "extent": "moe"}, works, costs)
        ended_O = np.nanmax(timeline.end_OG, axis=1)
        ended_L = np.array([ended_O[timeline.program.layer_O == candidate].max() for candidate in range(len(pairings))])
        best_LS.append(pairings[np.argmin(np.diff(ended_L, prepend=0))])
    chosen = Placement(slot_to_expert_LS=np.stack(best_LS), experts=model.experts, ranks=layout.expert_groups)
    ids_LTK = [_by_domain(given, drawing, layer) for layer in range(drawing.layers)]
    before_s, after_s = (
        timeline_of(given, works_of(given, model, ids_LTK, placement, layout=layout), costs).step_s
        for placement in (contiguous(model, layout.expert_groups, drawing.layers), chosen)
    )
    return before_s / after_s


def _pairings(experts: Sequence[int]) -> Iterator[list[int]]:
    """All ways to put eight experts in pairs, and two pairs in each half, whatever the order."""
    first, *others = experts
    for mates in combinations(others, len(experts) // 2 - 1):
        half = [first, *mates]
        rest = [expert for expert in others if expert not in mates]
        for one in _in_pairs(half):
            for other in _in_pairs(rest):
                yield [*one, *other]


def _in_pairs(experts: list[int]) -> Iterator[list[int]]:
    first, *others = experts
    for mate in others:
        yield [first, mate, *(expert for expert in others if expert != mate)]


def _by_domain(given: Case, drawing: Drawing, layer: int, *, first_seed: int = 0) -> Ids:
    """Experts of tokens whose domain, drawn for each, makes a part of the experts more popular."""
    model, domains = mr.preset(given["model"]), given["domains"]
    tokens = given["ranks"] * given["tokens_per_rank"]
    popularity_E = power_law_popularity(model.experts, exponent=drawing.exponent, tokens=tokens, seed=layer)
    domain_of_E = np.random.default_rng(layer).permutation(model.experts) % domains
    domain_of_T = np.random.default_rng(first_seed + layer).integers(domains, size=tokens)
    ids_TK = np.empty((tokens, model.top_k), dtype=np.int32)
    for domain in range(domains):
        own_E = popularity_E * np.where(domain_of_E == domain, given["domain_factor"], 1)
        seed = first_seed + domains * layer + domain
        drawn_TK = choose_experts(own_E / own_E.sum(), tokens=tokens, top_k=model.top_k, seed=seed)
        ids_TK[domain_of_T == domain] = drawn_TK[domain_of_T == domain]
    return ids_TK


def activated_experts(given: Case, drawing: Drawing) -> float:
    """Replicas that share an expert's tokens over one replica for all of them, over several batch sizes."""
    before_s = after_s = 0.0
    for tokens in given["tokens_of_loads"]:
        of_size = {**given, "tokens_per_rank": tokens}
        one_s, other_s = _activated_experts_s(of_size, drawing)
        before_s, after_s = before_s + one_s, after_s + other_s
    return before_s / after_s


def _activated_experts_s(given: Case, drawing: Drawing) -> tuple[float, float]:
    model, ranks = mr.preset(given["model"]), given["ranks"]
    tokens = ranks * given["tokens_per_rank"]
    loads_LE = planned_loads(model, given["routing"], tokens, drawing)
    slots = model.experts + given["redundant_slots"]
    placement = mr.place("lpt", loads_LE, ranks=ranks, slots=slots)
    ids_LTK = drawn(model, given["routing"], tokens, drawing)
    costs = kernels(given["device"], ranks, _A100_FRAMEWORKS)
    balanced_tokens = works_of(given, model, ids_LTK, placement)
    # One slot for each expert: slots are experts of their own.
    slot_LTK = [
        one_replica_each(placement, layer, ids_TK)[ids_TK].astype(np.int32) for layer, ids_TK in enumerate(ids_LTK)
    ]
    of_slots = replace(model, experts=slots)
    balanced_experts = works_of(given, of_slots, slot_LTK, contiguous(of_slots, ranks, drawing.layers))
    return timeline_of(given, balanced_tokens, costs).step_s, timeline_of(given, balanced_experts, costs).step_s


def one_replica_each(placement: Placement, layer: int, ids_TK: Ids) -> NDArray[np.int64]:
    """The slot for each expert, [E], that keeps active experts even over ranks.

    Experts with the fewest replicas choose first; each takes the rank with the fewest active experts, then the fewest
    rows. That is the greedy rule of METRO (arXiv 2512.09277).
    """
    rows_E = np.bincount(ids_TK.ravel(), minlength=placement.experts)
    slot_E = placement.expert_slots_LEX[layer, :, 0].copy()
    load_G = [(0, 0)] * placement.ranks
    active = np.flatnonzero(rows_E)
    for expert in active[np.lexsort((-rows_E[active], placement.replicas_LE[layer, active]))]:
        slots = [int(slot) for slot in placement.expert_slots_LEX[layer, expert] if slot >= 0]
        slot = min(slots, key=lambda slot: load_G[slot // placement.slots_per_rank])
        slot_E[expert] = slot
        experts, rows = load_G[slot // placement.slots_per_rank]
        load_G[slot // placement.slots_per_rank] = experts + 1, rows + int(rows_E[expert])
    return slot_E


SIGNS: dict[str, Callable[[Case, Drawing], float]] = {
    "tutel-adaptive-parallelism": adaptive_parallelism,
    "tutel-adaptive-pipelining": adaptive_pipelining,
    "tutel-hierarchical-all-to-all": hierarchical_all_to_all,
    "moetuner-one-node": placement_by_loads_and_nodes,
    "moetuner-nodes": placement_by_loads_and_nodes,
    "metro-activated-experts": activated_experts,
}

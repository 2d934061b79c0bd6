"""How long every part of a routing policy takes for a step of 8,192 tokens, and how much memory the step takes.

64 experts, 16 candidates a token (all 64 where a part needs full scores), top-8, eight source ranks, numpy. Seconds of
one core (CPU time): the median of calls after the first, which compiles. Peak memory: what Python and numpy hold at
most beyond the candidates while the policy with this part routes the step.

python benchmarks/policy_speed.py [--json]
"""

import argparse
import json
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

import moeroute as mr
from router.backends import topk
from router.candidates import Candidates
from router.capacity import Limit
from router.context import RouteContext
from router.history import RoutingHistory
from router.part import Part
from router.policies import POLICIES, RoutingPolicy
from router.policies.base import Adjustment, Selection, assign, widen
from router.policies.top_k import TopK
from router.prices import RoutePrices

TOKENS, EXPERTS, CANDIDATES, TOP_K, RANKS = 8192, 64, 16, 8, 8
ROUNDS = 15
LIMIT_MS = {"selection": 3.0, "capacity": 3.0, "adjustment": 10.0}
LIMIT_BYTES = 200e6
# Parts with the parameters that each must be given; the settings that look at most come too.
PARAMETERS: list[tuple[str, dict[str, Any]]] = [
    ("top_k", {"k": TOP_K}),
    ("top_k_by_layer", {"mean_k": 6.0, "k_max": TOP_K}),
    ("top_p", {"p": 0.6, "k_max": TOP_K}),
    ("held_top_p", {"target": 5.0, "k_max": TOP_K}),
    ("skip", {"threshold": 0.2, "k_max": TOP_K}),
    ("skip_by_ratio", {"quantile": 0.5, "k_max": TOP_K}),
    ("null_experts", {"k": TOP_K}),
    ("balance_bias", {"k": TOP_K}),
    ("group_limited", {"k": TOP_K, "groups": 8, "kept_groups": 4}),
    ("expert_choice", {"factor": 1.0, "k_max": TOP_K}),
    ("partners", {"k": TOP_K, "partners": 12}),
    ("opportunistic", {"k0": 4}),
    ("batch_set", {"active_share": 0.5}),
    ("batch_set", {"active_share": 0.5, "scope": "global"}),
    ("cache_aware", {"bonus": 0.3, "cache_share": 0.5}),
    ("topology_aware", {"price": 0.1}),
    *(
        ("hardware_aware", {"price": price, "scope": scope})
        for price in (0.1, 1.0, 10.0)
        for scope in ("source_rank", "global")
    ),
    ("capacity", {"factor": 1.25}),
    ("capacity", {"factor": 1.25, "drop": "position"}),
    ("capacity", {"factor": 1.0, "scope": "global", "reroute": "any"}),
    ("capacity_aware", {"gamma": 1.0, "expanded": True}),
    ("least_loaded_spill", {}),
]


@cache
def step(candidates: int, null_experts: int) -> Candidates:
    """Experts of lognormal popularity, chosen by Gumbel noise; the last are the null ones."""
    rng = np.random.default_rng(0)
    logits_TE = rng.normal(scale=0.5, size=EXPERTS + null_experts) + rng.gumbel(size=(TOKENS, EXPERTS + null_experts))
    exp_TE = np.exp(logits_TE)
    probs_TC, ids_TC = topk((exp_TE / exp_TE.sum(axis=1, keepdims=True)).astype(np.float32), candidates)
    return Candidates(
        ids_TC=ids_TC.astype(np.int32),
        probs_TC=probs_TC,
        source_rank_T=np.repeat(np.arange(RANKS), TOKENS // RANKS),
        experts=EXPERTS,
        score_kind="softmax",
        null_experts=null_experts,
    )


@cache
def context() -> RouteContext:
    """Earlier traffic, and prices of a decode step: an active expert costs as much as 500 rows."""
    model = replace(mr.preset("qwen3-30b-a3b"), experts=EXPERTS, top_k=TOP_K, layers=1)
    share_LEG = np.zeros((1, EXPERTS, RANKS), dtype=np.float32)
    share_LEG[0, np.arange(EXPERTS), np.arange(EXPERTS) * RANKS // EXPERTS] = 1
    return RouteContext(
        layer=0,
        ranks=RANKS,
        renormalise=True,
        history=RoutingHistory.of(mr.synthetic_trace(model, tokens=2048, zipf=0.5, seed=1)),
        prices=RoutePrices(
            share_LEG=share_LEG,
            row_s=2e-8,
            active_s=1e-5,
            hop_s_GG=2e-8 * (1 - np.eye(RANKS)),
            load_s_LE=np.zeros((1, EXPERTS)),
            node_of_G=np.zeros(RANKS, dtype=np.int64),
        ),
    )


def call_of(part: Part, candidates: Candidates) -> tuple[Callable[[], object], RoutingPolicy]:
    """The part's own work on a step, its second one where it remembers the first, and a policy that has the part."""
    top_k = TopK(k=TOP_K)
    used_TC = widen(top_k.choose(candidates, context(), {})[0], candidates.count)
    match part:
        case Selection():
            _, state = part.choose(candidates, context(), {})
            return lambda: part.choose(candidates, context(), state), RoutingPolicy(selection=part)
        case Adjustment():
            _, state = part.adjust(used_TC, candidates, context(), {})
            policy = RoutingPolicy(selection=top_k, adjustment=part)
            return lambda: part.adjust(used_TC, candidates, context(), state), policy
        case Limit():
            assignment = assign(candidates, used_TC, width=TOP_K, renormalise=True)
            policy = RoutingPolicy(selection=top_k, capacity=part)
            return lambda: part.limit(assignment, candidates, context()), policy
    raise AssertionError(f"{part.name} is no part of a policy")


def measure(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Time and memory of one part."""
    part = POLICIES[name](**parameters)
    null_experts = 8 if "null experts" in part.needs else 0
    candidates = step(EXPERTS if "full scores" in part.needs else CANDIDATES, null_experts)
    call, policy = call_of(part, candidates)
    call()
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    policy.route(candidates, context(), {})
    tracemalloc.start()
    policy.route(candidates, context(), {})
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    cpu_ms = statistics.median(seconds) * 1e3
    return {
        "policy": name,
        "kind": part.kind,
        "parameters": parameters,
        "candidates": candidates.count,
        "cpu_s": cpu_ms / 1e3,
        "step_peak_bytes": peak_bytes,
        "within": cpu_ms <= LIMIT_MS[part.kind] and peak_bytes <= LIMIT_BYTES,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parser.parse_args()
    assert {name for name, _ in PARAMETERS} == set(POLICIES), "a policy is missing from the benchmark"
    rows = [measure(name, parameters) for name, parameters in PARAMETERS]
    if arguments.json:
        print(json.dumps({"tokens": TOKENS, "experts": EXPERTS, "rows": rows}))
        return
    for row in rows:
        settings = ", ".join(f"{name}={value}" for name, value in row["parameters"].items())
        print(
            f"{row['policy']:18} {row['candidates']:3} candidates {row['cpu_s'] * 1e3:6.2f} ms "
            f"{row['step_peak_bytes'] / 1e6:6.1f} MB {'' if row['within'] else 'OVER '}{settings}"
        )


if __name__ == "__main__":
    main()

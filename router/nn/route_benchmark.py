"""The microbenchmark of routing: every part of a policy, on one rank's tokens of one layer."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
import torch

from cost_models.microbench.ranks import RankGroup
from cost_models.microbench.timer import Clock
from cost_models.ops import Operation, Route
from router.candidates import Candidates
from router.context import RouteContext
from router.history import RoutingHistory
from router.nn.routing import route
from router.parameters import parameters_of
from router.part import Part
from router.placement import place
from router.policies import ADJUSTMENTS, CAPACITIES, SELECTIONS, RoutingPolicy
from router.policies.top_k import TopK
from router.prices import RoutePrices
from traces.model import ModelSpec
from traces.synthetic import synthetic_trace

_TOKENS = (128, 512, 2048, 1024)  # every other one is held out: not the ends
_REPLICAS = "replicas"
_HISTORY_TOKENS = 512
# Parameters that change what a part costs, and values to time it at; all others are as they are by default.
_TIMED = {
    "drop": ("position", "probs", "first_choice", "batch_prioritised"),
    "reroute": ("same_rank", "any"),
    "pricing_rounds": (1, 5),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteBenchmark:
    """Selections alone, adjustments and capacities after a top-k, and the choice of replicas.

    Parts that need null experts are left out: models that have them are not calibrated for.
    """

    experts: int
    ranks: int
    clock: Clock = "compute"

    def cases(self) -> list[Operation]:
        """Each part at several widths and sizes, in order."""
        widths = sorted({max(self.experts // 8, 1), max(self.experts // 2, 1)})
        return [
            Route(tokens_X=np.array(tokens), width=width, parts=parts)
            for width in widths
            for parts in self.policies(width)
            for tokens in _TOKENS
        ]

    def policies(self, width: int) -> Mapping[tuple[str, ...], RoutingPolicy]:
        """A policy for each tuple of parts, of so many experts a token."""
        top_k = TopK(k=width)
        alone = RoutingPolicy(selection=top_k)
        named: dict[tuple[str, ...], RoutingPolicy] = {(*alone.work, _REPLICAS): alone}
        policies = [RoutingPolicy(selection=part) for part in _typical_of(SELECTIONS, width, self.experts)]
        if width < self.experts:
            policies += [
                RoutingPolicy(selection=top_k, adjustment=part)
                for part in _typical_of(ADJUSTMENTS, width, self.experts)
            ]
            policies += [
                RoutingPolicy(selection=top_k, capacity=part) for part in _typical_of(CAPACITIES, width, self.experts)
            ]
        return named | {policy.work: policy for policy in policies}

    def prepare(self, case: Operation, group: RankGroup) -> Callable[[], object]:
        """Random scores, and a placement with replicas where the case has them."""
        assert isinstance(case, Route)
        tokens, ranks = int(case.tokens_X), self.ranks
        source_rank_T = torch.full((tokens,), group.rank, device=group.device)
        candidates = Candidates.from_logits(torch.randn(tokens, self.experts, device=group.device), source_rank_T)
        policy = self.policies(case.width)[case.parts]
        slots = -(-self.experts // ranks) * ranks + ranks * (_REPLICAS in case.parts)
        placement = place("lpt", np.ones((1, self.experts)), ranks=ranks, slots=slots)
        context = RouteContext(
            layer=0,
            ranks=ranks,
            renormalise=True,
            history=_history(self.experts, case.width),
            prices=RoutePrices(
                share_LEG=placement.share_LEG,
                row_s=1e-6,
                active_s=1e-5,
                hop_s_GG=1e-7 * (1 - np.eye(ranks)),
                load_s_LE=np.zeros((1, self.experts)),
                node_of_G=np.zeros(ranks, dtype=np.int64),
            ),
        )
        # A policy that remembers does so from its second step on.
        _, _, state = route(policy, candidates, placement, "local", context, {})
        return lambda: route(policy, candidates, placement, "local", context, state)


def _typical_of(known: Mapping[str, type[Any]], width: int, experts: int) -> list[Any]:
    """Every part of `known` with middling parameters, once for each choice that changes what it costs."""
    return [
        part(**values)
        for part in known.values()
        if "null experts" not in part.needs
        for values in _typical_values(part, width, experts)
    ]


def _typical_values(part: type[Part], width: int, experts: int) -> list[dict[str, Any]]:
    groups = next(size for size in (4, 2, 1) if experts % size == 0 and experts // size >= width)
    special = {"groups": groups, "kept_groups": max(groups // 2, -(-width * groups // experts)), "scope": "source_rank"}
    defaults = {field.name: field.default for field in fields(part)}  # type: ignore[arg-type]  # leaves are dataclasses
    plain: dict[str, Any] = {}
    for name, parameter in parameters_of(part).items():
        if name in special:
            plain[name] = special[name]
        elif defaults[name] is not MISSING:
            plain[name] = defaults[name]
        elif parameter.experts:
            plain[name] = width
        else:
            plain[name] = (parameter.low + parameter.high) / 2
    others = [plain | {name: value} for name in plain for value in _TIMED.get(name, ()) if value != plain[name]]
    return [plain, *others]


def _history(experts: int, width: int) -> RoutingHistory:
    model = ModelSpec(name="any", layers=1, experts=experts, top_k=width, hidden=1, expert_hidden=1)
    return RoutingHistory.of(
        synthetic_trace(model, tokens=_HISTORY_TOKENS, zipf=0.5, candidates=experts, seed=0),
    )

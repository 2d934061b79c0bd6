"""The policies that `policies.py` compares, and the deployments that it compares them on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from router.history import RoutingHistory
from router.placement.base import Placement
from router.policies import ADJUSTMENTS, CAPACITIES, SELECTIONS, RoutingPolicy, Weights
from router.prices import RoutePrices
from sim.replay import Replay
from sim.report import Report
from traces.model import ModelSpec
from traces.synthetic import synthetic_trace
from traces.trace import RoutingTrace
from tuner.replays import Replays
from tuner.scenario import parse_scenario

Scope = Literal["source_rank", "global"]
# What hardware-aware routing is held against: published policies that anyone can run without training.
PUBLISHED = ("top_k", "opportunistic", "capacity_aware", "group_limited")
OURS = "hardware_aware"
_PRICES = (0.1, 0.2, 0.4, 0.6, 0.8, 1.1)
_ROUNDS = ((0, 1), (0, 2), (2, 2))  # of closing and of pricing
# Policies that leave experts out, and so run with weights as they were trained too.
_DROPPING = ("top_k", "top_p", "skip", "opportunistic", OURS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One policy: `family` names it in comparisons; the three parts as (name, parameters)."""

    id: str
    family: str
    index: int = 0
    selection: tuple[str, Mapping[str, Any]]
    adjustment: tuple[str, Mapping[str, Any]] | None = None
    capacity: tuple[str, Mapping[str, Any]] | None = None
    weights: Weights = "renormalised"

    @property
    def key(self) -> tuple[str, int]:
        """What is the same policy at the same relative setting on another model."""
        return self.family, self.index

    @property
    def policy(self) -> RoutingPolicy:
        """As the simulator and the real layer run it."""
        name, parameters = self.selection
        return RoutingPolicy(
            selection=SELECTIONS[name](**parameters),
            adjustment=None if self.adjustment is None else ADJUSTMENTS[self.adjustment[0]](**self.adjustment[1]),
            capacity=None if self.capacity is None else CAPACITIES[self.capacity[0]](**self.capacity[1]),
            weights=self.weights,
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """Of all parts, by `part.parameter`."""
        parts = [part for part in (self.selection, self.adjustment, self.capacity) if part is not None]
        named = {f"{name}.{parameter}": value for name, values in parts for parameter, value in values.items()}
        return named if self.weights == "renormalised" else {**named, "weights": self.weights}


def cases_for(model: ModelSpec, trace: RoutingTrace, *, scope: Scope) -> list[Case]:
    """Every policy at a few settings, in terms of the model's own top k and of what `trace`, an earlier one, shows."""
    assert trace.gates_TLC is not None
    k = model.top_k
    mass = float(trace.gates_TLC[:, :, :k].astype(np.float32).sum(axis=2).mean())  # of the top k, 1 if recorded so
    full = trace.candidates == model.experts
    own = ("top_k", {"k": k})
    fewer = sorted({max(round(k * part), 1) for part in (0.25, 0.5, 0.75)})
    found = [Case(id=f"top_k-{n}", family="top_k", selection=("top_k", {"k": n})) for n in (*fewer, k)]

    def select(name: str, settings: Sequence[Mapping[str, Any]]) -> None:
        found.extend(
            Case(id=f"{name}-{'-'.join(map(_short, values.values()))}", family=name, selection=(name, values))
            for values in settings
        )

    def adjust(name: str, settings: Sequence[Mapping[str, Any]]) -> None:
        for values in settings:
            where = "@global" if values.get("scope") == "global" else ""
            label = "-".join(_short(value) for key, value in values.items() if key != "scope")
            found.append(Case(id=f"{name}-{label}{where}", family=name, selection=own, adjustment=(name, values)))

    def limit(name: str, settings: Sequence[Mapping[str, Any]]) -> None:
        for values in settings:
            where = "@global" if values.get("scope") == "global" else ""
            label = "-".join(_short(value) for key, value in values.items() if key != "scope")
            found.append(Case(id=f"{name}-{label}{where}", family=name, selection=own, capacity=(name, values)))

    select("top_k_by_layer", [{"mean_k": round(k * part, 3), "k_max": k} for part in (0.5, 0.75, 0.875)])
    select("top_p", [{"p": round(mass * part, 3), "k_max": k} for part in (0.5, 0.65, 0.8, 0.9, 0.97)])
    select("held_top_p", [{"target": round(k * part, 3), "k_max": k} for part in (0.5, 0.75)])
    select("skip", [{"threshold": threshold, "k_max": k} for threshold in (0.1, 0.25, 0.5)])
    select("skip_by_ratio", [{"quantile": quantile, "k_max": k} for quantile in (0.1, 0.25, 0.5)])
    select("balance_bias", [{"k": k, "rate": rate} for rate in (1e-3, 1e-2)])
    select("partners", [{"k": k, "partners": max(k * part, 2)} for part in (1, 2)])
    if full:
        groups = 4 if model.experts < 64 else 8
        kept_groups = [groups * part // 4 for part in (1, 2, 3)]
        select("group_limited", [{"k": k, "groups": groups, "kept_groups": kept} for kept in kept_groups])
        select("expert_choice", [{"factor": float(k), "k_max": 2 * k, "mode": mode} for mode in ("batch", "threshold")])
    adjust("opportunistic", [{"k0": n, "scope": scope} for n in fewer])
    adjust("batch_set", [{"active_share": share, "scope": scope} for share in (0.5, 0.7, 0.85)])
    adjust("cache_aware", [{"bonus": bonus, "cache_share": 0.5, "protected": 1} for bonus in (0.1, 0.3)])
    adjust("topology_aware", [{"price": price} for price in (0.02, 0.1)])
    limit(
        "capacity",
        [{"factor": factor, "drop": drop, "scope": scope} for factor in (1.0, 1.5) for drop in ("position", "probs")],
    )
    limit(
        "capacity_aware",
        [
            {"gamma": gamma, "expanded": expanded, "scope": scope}
            for gamma in (0.75, 1.0, 1.25, 1.5)
            for expanded in (False, True)
        ],
    )
    limit("least_loaded_spill", [{"factor": 1.1}, {"factor": 1.1, "least_rows": 64}])
    adjust(
        OURS,
        [
            {"price": price, "closing_rounds": closing, "pricing_rounds": pricing, "scope": scope}
            for closing, pricing in _ROUNDS
            for price in _PRICES
        ],
    )
    found += [
        replace(case, id=f"{case.id}+trained", family=f"{case.family}+trained", weights="trained")
        for case in found
        if case.family in _DROPPING
    ]
    seen: dict[str, int] = {}
    numbered = []
    for case in found:
        seen[case.family] = seen.get(case.family, -1) + 1
        numbered.append(replace(case, index=seen[case.family]))
    return numbered


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One trace on one cluster: what a policy keeps and what its step takes there, on requests after the plan's."""

    name: str
    replays: Replays
    scope: Scope = "source_rank"

    @classmethod
    def of(
        cls,
        name: str,
        trace: RoutingTrace,
        document: Mapping[str, Any],
        *,
        history: RoutingHistory | None = None,
        redundant_slots: int = 0,
    ) -> "Setting":
        """A scenario's, on `trace`, with experts placed by LPT on earlier requests; `history` None: the trace's own."""
        scenario = parse_scenario(
            {
                "version": 1,
                "name": name,
                "trace": "given",
                "config": {
                    "policy": "top_k",
                    "parameters": {"k": trace.model.top_k},
                    "placement": {"algorithm": "lpt", "redundant_slots": redundant_slots},
                },
                **document,
            },
            source=name,
        )
        replays = Replays.of(scenario, trace)
        if history is not None:
            windows = {window: replace(replay, history=history) for window, replay in replays.windows.items()}
            replays = replace(replays, windows=windows)
        return cls(name=name, replays=replays)

    @property
    def replay(self) -> Replay:
        """Of the scored window."""
        return self.replays.windows["validate"]

    @cached_property
    def placement(self) -> Placement:
        """Planned on the first window."""
        return self.replays.placement(self.replays.scenario.config)

    @cached_property
    def cases(self) -> list[Case]:
        """Every policy that the deployment's trace can serve."""
        return cases_for(self.replay.trace.model, self.replays.windows["tune"].trace, scope=self.scope)

    def prices(self, case: Case) -> RoutePrices | None:
        """What the case's policy may ask for."""
        return self.replay.prices(case.policy, self.placement)

    def prices_of_simulated(self, case: Case) -> RoutePrices | None:
        """The same, of the layers that are simulated alone."""
        prices, layers = self.prices(case), self.replay.layers
        if prices is None:
            return None
        return replace(prices, share_LEG=prices.share_LEG[layers], load_s_LE=prices.load_s_LE[layers])

    def run(self, case: Case) -> Report:
        """The simulated report."""
        return self.replay.run(case.policy, self.placement, fidelity=self.replays.scenario.fidelity)[0]


def as_model(trace: RoutingTrace, model: ModelSpec) -> RoutingTrace:
    """A trace of few layers as that of a deeper model of as many experts: each layer stands for its neighbours."""
    assert trace.gates_TLC is not None
    if (trace.model.experts, trace.model.top_k) != (model.experts, model.top_k):
        raise ValueError(f"{trace.model.name} and {model.name} differ in experts or top k")
    layer_L = layers_of(trace.model, model)
    return replace(
        trace,
        model=model,
        expert_ids_TLC=trace.expert_ids_TLC[:, layer_L],
        gates_TLC=trace.gates_TLC[:, layer_L],
        source=f"{trace.source}, at the widths of {model.name}",
    )


def layers_of(shallow: ModelSpec, deep: ModelSpec) -> NDArray[np.int64]:
    """For each layer of a deeper model, the one of the shallow model that stands for it."""
    return np.arange(deep.layers) * shallow.layers // deep.layers


def large_scale(model: ModelSpec, *, layers: int, tokens: int, zipf: float, candidates: int) -> RoutingTrace:
    """A synthetic trace of `layers` distinct layers that stand for the model's."""
    drawn = synthetic_trace(
        replace(model, layers=layers), tokens=tokens, zipf=zipf, candidates=candidates, seed=0, phase="decode"
    )
    return as_model(drawn, model)

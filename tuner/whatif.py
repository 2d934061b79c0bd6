"""What-if: one scenario at every combination of some of its fields. For capacity planning, so nothing is searched."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import yaml

from sim.report import Report
from traces.errors import InputError
from traces.trace import RoutingTrace
from tuner.replays import Replays, load_trace, parts_of
from tuner.scenario import Scenario, parse_scenario

# Short names for what planners vary most; any other field goes by its path in the scenario file.
FIELDS = {
    "ranks": "cluster.ranks",
    "gpu": "cluster.device",
    "top_k": "config.parameters.k",
    "tokens_per_rank": "batch.tokens_per_rank",
    "price": "config.adjustment.price",
    "capacity_factor": "config.capacity.factor",
    "placement": "config.placement.algorithm",
    "redundant_slots": "config.placement.redundant_slots",
    "overlap": "execution.overlap",
    "oversubscription": "cluster.oversubscription",
}
# What the windows of a trace hang on: they are cut, and completed, once for all points that agree in these.
_CUT_BY = {"candidates", "windows", "weights", "seed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One combination: the values by name as given, and its report, or why there is none."""

    values: Mapping[str, Any]
    report: Report | None
    problem: str | None


def parse_variations(variations: Sequence[str]) -> dict[str, list[Any]]:
    """Read `name=value,value,…` as typed on a command line; values are YAML scalars.

    >>> parse_variations(["ranks=8,16", "gpu=h100_sxm"])
    {'ranks': [8, 16], 'gpu': ['h100_sxm']}
    """
    parsed = {}
    for variation in variations:
        name, equals, values = variation.partition("=")
        if not equals or not values:
            raise InputError(f"--vary {variation}: expected name=value,value,…, as in --vary ranks=8,16")
        parsed[name] = [yaml.safe_load(value) for value in values.split(",")]
    return parsed


def what_if(scenario: Scenario, vary: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Replay the scenario at every combination of `vary`, in order, the last name varying fastest.

    A combination that cannot be (more ranks than slots, say) is a point with a problem; a name or value that the
    scenario cannot hold is an `InputError`.
    """
    if scenario.elastic is not None:
        raise InputError("elastic: a what-if replays one trace, and parts of a model have their own; use moeroute tune")
    document = scenario.model_dump(mode="json", by_alias=True, exclude={"study"})  # nothing is searched
    trace = load_trace(scenario)
    points = []
    parts: dict[str, list[RoutingTrace]] = {}
    for values in product(*vary.values()):
        point = dict(zip(vary, values, strict=True))
        varied = document
        for name, value in point.items():
            varied = _with(varied, FIELDS.get(name, name).split("."), value, name)
        changed = parse_scenario(varied, source="--vary " + " ".join(f"{n}={v}" for n, v in point.items()))
        try:
            cut = changed.model_dump_json(include=_CUT_BY)
            if cut not in parts:
                parts[cut] = parts_of(changed, trace)
            report = Replays.of(changed, trace, parts[cut]).run(changed.config, intervals=True)[0]
        except InputError as problem:
            points.append(Point(values=point, report=None, problem=str(problem)))
        else:
            points.append(Point(values=point, report=report, problem=None))
    return points


def _with(document: dict[str, Any], path: Sequence[str], value: Any, name: str) -> dict[str, Any]:
    first, *rest = path
    if first not in document:
        raise InputError(
            f"--vary {name}: the scenario has no field {first!r}; known are {', '.join(document)}; a field inside "
            "another goes by its path, as config.adjustment.scope"
        )
    if not rest:
        return {**document, first: value}
    if not isinstance(document[first], dict):
        raise InputError(
            f"--vary {name}: {first!r} has no fields of its own in this scenario; give it some there first"
        )
    return {**document, first: _with(document[first], rest, value, name)}

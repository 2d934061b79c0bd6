"""All that is known of a trace, in one place for the command and the page that show it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router.waste import Waste, capacity_waste, why_no_gates
from traces.errors import InputError
from traces.reuse import ActiveSet, ExpertCache, active_set, expert_cache
from traces.specialisation import Specialisation, specialisation
from traces.stats import Compute, TraceStats, trace_stats
from traces.trace import RoutingTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceAnalysis:
    """All that is known of a trace; `left_out` says why a part is missing. `wastes`: by rising capacity factor."""

    trace: RoutingTrace
    stats: TraceStats
    compute: Compute
    active: ActiveSet
    cache: ExpertCache
    wastes: Sequence[Waste]
    specialisation: Specialisation | None
    left_out: Mapping[str, str]


def analyse(
    trace: RoutingTrace,
    *,
    capacity_factors: Sequence[float] = (1.25,),
    gate_threshold: float = 0.05,
    tokens_per_step: int | None = None,
) -> TraceAnalysis:
    """Everything about `trace` at its model's own top k; `capacity_waste` says what the options mean.

    What a trace has not what it takes for (domains, gates, several requests) is left out, with the reason. Errors:
    `InputError` from `capacity_waste`.
    """
    wastes = capacity_waste(
        trace,
        capacity_factors=sorted(capacity_factors),
        gate_threshold=gate_threshold,
        tokens_per_step=tokens_per_step,
    )
    left_out = {}
    found = None
    try:
        found = specialisation(trace)
    except InputError as error:
        left_out["specialisation"] = str(error)
    no_gates = why_no_gates(trace)
    if no_gates:
        left_out["gates below a threshold"] = no_gates
    active = active_set(trace)
    if all(reuse_L is None for reuse_L in active.reuse_BL):
        left_out["reuse between steps"] = "no stream has two tokens"
    return TraceAnalysis(
        trace=trace,
        stats=trace_stats(trace),
        compute=Compute.of(trace.model),
        active=active,
        cache=expert_cache(trace),
        wastes=wastes,
        specialisation=found,
        left_out=left_out,
    )

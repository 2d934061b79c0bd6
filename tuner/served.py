"""Served: what of the policies a trace can serve, and the search space cut to that."""

from router.parameters import parameters_of
from router.part import Part
from router.placement import PLACEMENTS
from router.placement.base import check_slots
from router.policies import POLICIES, RoutingPolicy, needs_with
from router.policies.group_limited import GroupLimited
from router.policies.top_k import TopK
from sim.layout import Layout
from traces.errors import InputError
from traces.model import ModelSpec
from traces.trace import RoutingTrace
from tuner.scenario import Scenario, Space
from tuner.space import NONE, SubnetworkSpace, Values, Written

_GROUPS, _TOP_K = "group_limited.groups", "top_k.k"
_MORE = "more candidates than k"
_ASKED_BY = ("policies", "adjustments", "capacities")


def check_policy(field: str, policy: RoutingPolicy, trace: RoutingTrace) -> None:
    """Raise `InputError` if the policy that `field` of a scenario names asks for what the trace has not."""
    check_width(field, policy.selection.reads, trace)
    for part in policy.parts:
        if lack := _lacking(part.needs, trace, width=policy.width):
            raise InputError(f"{field}: policy {part.name} {lack}")


def check_width(field: str, width: int, trace: RoutingTrace) -> None:
    """Raise `InputError` if `field` of a scenario wants more experts a token than the model has or the trace holds."""
    if width > trace.model.all_experts:
        raise InputError(f"{field}: {width} experts a token, but the model has {trace.model.all_experts}; use fewer")
    if width > trace.candidates:
        raise InputError(
            f"{field}: the policy needs {width} candidates per token; the trace recorded {trace.candidates}"
        )


def fit_space(scenario: Scenario, trace: RoutingTrace, layout: Layout, no_steps: str) -> Scenario:
    """The scenario with a search space that the trace and cluster can serve.

    Out of what is default go the parts, and the choices of a parameter, that ask for what the trace has not; default
    counts of experts end at its candidates, below them where some part needs others to choose from; the default slots,
    residency and weights are the config's. What the user wrote is not touched: `InputError` if it asks for more than
    there is, or for redundant slots that do not divide over the layout's groups of experts. `no_steps`: why placements
    cannot be planned on single steps; empty where they can. Of an elastic scenario, `trace` is the whole model's.
    """
    space = _fit_placements(_fit_parts(scenario.study.space, trace), trace, layout, no_steps)
    config = scenario.config
    of_baseline = {
        "redundant_slots": [config.placement.redundant_slots],
        "resident_share": config.placement.resident_share,
        "weights": config.weights,
    }
    unset = {field: value for field, value in of_baseline.items() if field not in space.model_fields_set}
    space = space.model_copy(update=unset)
    for redundant in space.redundant_slots:
        check_slots(trace.model.experts + redundant, layout.expert_groups, trace.model.experts)
    if scenario.elastic is not None:
        subnetworks = _fit_subnetworks(space, trace.model, layout)
        space = space.model_copy(update={"subnetworks": subnetworks, "capacities": _fit_capacities(space, subnetworks)})
    space = space.model_copy(update={"ranges": _fit_ranges(space, trace)})
    return scenario.model_copy(update={"study": scenario.study.model_copy(update={"space": space})})


def _fit_parts(space: Space, trace: RoutingTrace) -> Space:
    fitting = {}
    for field in _ASKED_BY:
        names: list[str] = getattr(space, field)
        lacks = {name: _lacking(POLICIES[name].needs, trace) for name in names if name != NONE}
        if field in space.model_fields_set:
            for name, lack in lacks.items():
                if lack:
                    raise InputError(f"study.space.{field}: {name} {lack}, or leave it out")
        fitting[field] = [name for name in names if not lacks.get(name)]
    if GroupLimited.name in fitting["policies"] and not _legal_groups(space, trace):
        if "policies" in space.model_fields_set:
            raise InputError(
                f"study.space.policies: group_limited finds no number of groups that divides the "
                f"{trace.model.all_experts} experts into groups of at least {_grouped_k(space, trace)}; leave it out, "
                "or narrow study.space.ranges.group_limited.k"
            )
        fitting["policies"].remove(GroupLimited.name)
    return space.model_copy(update=fitting)


def _fit_subnetworks(space: Space, model: ModelSpec, layout: Layout) -> SubnetworkSpace:
    """The parts of the model that may be drawn, in full: those that fit with any of the space's redundant slots."""
    written = space.subnetworks or SubnetworkSpace()
    field = "study.space.subnetworks"
    for what, values, most in (
        ("depths", written.depths, model.layers),
        ("experts", written.experts, model.experts),
        ("top_ks", written.top_ks, model.experts),
    ):
        if values and max(values) > most:
            raise InputError(f"{field}.{what}: {max(values)} is more than the model has; use 1 to {most}")
    if _TOP_K in space.ranges:
        raise InputError(f"study.space.ranges.{_TOP_K}: parts of a model have their own k; write {field}.top_ks")
    if space.weights != "renormalised" and TopK.name in space.policies:
        field = "study.space.weights" if "weights" in space.model_fields_set else "config.weights"
        raise InputError(f"{field}: a part scales the weights of its own k to one; not {space.weights}")
    for experts in written.experts:
        for redundant in space.redundant_slots:
            try:
                check_slots(experts + redundant, layout.expert_groups, experts)
            except InputError as error:
                raise InputError(f"{field}.experts: {experts}, and {redundant} redundant slots: {error}") from error
    quarters = sorted({max(1, quarter * model.experts // 4) for quarter in (1, 2, 3, 4)})
    divide = [
        experts
        for experts in quarters
        if all(
            experts + redundant >= layout.expert_groups and (experts + redundant) % layout.expert_groups == 0
            for redundant in space.redundant_slots
        )
    ]
    fitted = {
        "depths": written.depths or list(range(-(-model.layers // 2), model.layers + 1)),
        "experts": written.experts or divide,
        "top_ks": written.top_ks or list(range(1, model.top_k + 1)),
    }
    if min(fitted["top_ks"]) > min(fitted["experts"]):
        raise InputError(
            f"{field}: {min(fitted['top_ks'])} experts a token of {min(fitted['experts'])}; add a smaller one to top_ks"
        )
    return written.model_copy(update=fitted)


def _fit_capacities(space: Space, subnetworks: SubnetworkSpace) -> list[str]:
    """The capacities: none where k is drawn by layer, for a capacity counts one k for all of them."""
    if not subnetworks.per_layer or TopK.name not in space.policies:
        return space.capacities
    if "capacities" in space.model_fields_set and space.capacities != [NONE]:
        raise InputError(
            "study.space.capacities: a capacity counts one k for all layers; write [none], or leave out "
            "study.space.subnetworks.per_layer"
        )
    return [NONE]


def _fit_placements(space: Space, trace: RoutingTrace, layout: Layout, no_steps: str) -> Space:
    lacks = {name: placement_lacks(name, trace, layout, no_steps) for name in space.placements}
    if "placements" in space.model_fields_set:
        for name, lack in lacks.items():
            if lack:
                raise InputError(f"study.space.placements: {name} {lack}, or leave it out")
    return space.model_copy(update={"placements": [name for name in space.placements if not lacks[name]]})


def placement_lacks(name: str, trace: RoutingTrace, layout: Layout, no_steps: str) -> str:
    """What a placement algorithm asks for and does not get, with the mend; empty where it gets all."""
    needs, groups = PLACEMENTS[name].needs, trace.model.expert_groups
    if PLACEMENTS[name].keeps_groups and groups % layout.nodes:
        return f"packs groups of experts on nodes, and {trace.model.name} has {groups} for {layout.nodes}: use balanced"
    if "tokens" in needs and trace.model.null_experts:
        return f"looks at the K experts of a token, of which some are null in {trace.model.name}: use another"
    return f"is planned on steps of the plan window: {no_steps}" if needs and no_steps else ""


def _fit_ranges(space: Space, trace: RoutingTrace) -> dict[str, Written]:
    """The written ranges, and some for default ones that go too far. `InputError` where what the user wrote does."""
    fitting: dict[str, Written] = {}
    for part in space.parts():
        for name, parameter in parameters_of(part).items():
            key, drawn = f"{part.name}.{name}", space.range(part, name)
            if parameter.choices:
                lacks = {value: _lacking(needs_with(part, name, value), trace) for value in drawn.values}
                refused = [value for value, lack in lacks.items() if lack]
                if refused and key in space.ranges:
                    raise InputError(f"study.space.ranges.{key}: {refused[0]} {lacks[refused[0]]}, or leave it out")
                if refused:
                    fitting[key] = Values(values=[value for value in drawn.values if value not in refused])
            elif parameter.experts and key in space.ranges:
                check_width(f"study.space.ranges.{key}", drawn.most, trace)
    if GroupLimited.name in space.policies:
        fitting |= _fit_groups(space, trace)
    cut = space.model_copy(update={"ranges": {**fitting, **space.ranges}})
    others = any(_MORE in needs for part in cut.parts() for needs in _all_needs(cut, part))
    most = trace.candidates - (1 if others and trace.candidates < trace.model.all_experts else 0)
    for part in cut.parts():
        for name, parameter in parameters_of(part).items():
            key, drawn = f"{part.name}.{name}", cut.range(part, name)
            if parameter.experts and key not in space.ranges and drawn.most > most:
                fitting[key] = [min(int(drawn.least), most), most]
    legal = {key: fitting[key] for key in fitting if key == _GROUPS}  # of written ones too, only those that divide
    return {**fitting, **space.ranges, **legal}


def _all_needs(space: Space, part: type[Part]) -> list[tuple[str, ...]]:
    """What a part needs, whatever the choices of its parameters."""
    return [part.needs] + [
        needs_with(part, name, value)
        for name, parameter in parameters_of(part).items()
        if parameter.choices
        for value in space.range(part, name).values
    ]


def _fit_groups(space: Space, trace: RoutingTrace) -> dict[str, Written]:
    """Ranges of `group_limited` in which every draw is a legal one."""
    legal = _legal_groups(space, trace)
    size = trace.model.all_experts // max(legal)
    k, kept = space.range(GroupLimited, "k"), space.range(GroupLimited, "kept_groups")
    most_k = k.most if "group_limited.k" in space.ranges else min(k.most, size * int(kept.least))
    if most_k > size * kept.least or kept.least > min(legal):
        raise InputError(
            f"study.space.ranges: group_limited may draw {most_k} experts from {kept.least} of {max(legal)} groups of "
            f"{size}, or {kept.least} of {min(legal)} groups; narrow group_limited.k, .groups or .kept_groups"
        )
    fitting: dict[str, Written] = {_GROUPS: Values(values=legal)}
    if most_k < k.most:
        fitting["group_limited.k"] = [min(int(k.least), most_k), most_k]
    return fitting


def _legal_groups(space: Space, trace: RoutingTrace) -> list[int]:
    """The numbers of groups that divide the experts; of default ones those whose groups hold a token's experts."""
    groups, experts = space.range(GroupLimited, "groups"), trace.model.all_experts
    counts = groups.values or tuple(range(int(groups.low), int(groups.high) + 1))
    at_least = 1 if _GROUPS in space.ranges else _grouped_k(space, trace)
    return [count for count in counts if experts % count == 0 and experts // count >= at_least]


def _grouped_k(space: Space, trace: RoutingTrace) -> int:
    most_k = int(space.range(GroupLimited, "k").most)
    return most_k if "group_limited.k" in space.ranges else min(most_k, trace.model.top_k)


def _lacking(needs: tuple[str, ...], trace: RoutingTrace, width: int | None = None) -> str:
    """What the trace lacks of `needs`, with the mend; empty where it lacks nothing. `width`: experts a token."""
    model, candidates = trace.model, trace.candidates
    width = model.top_k if width is None else width
    if "null experts" in needs and not model.null_experts:
        return f"needs null experts, and {model.name} has none: use a trace of a model that has"
    recorded = f"the trace recorded {candidates} of {model.all_experts} candidates a token"
    mend = "record more, or complete the trace with candidates"
    if "full scores" in needs and candidates < model.all_experts:
        return f"needs the scores of all experts; {recorded}: {mend}: {model.all_experts}"
    if _MORE in needs and candidates <= width < model.all_experts:
        return f"needs more candidates than the {width} that a token uses; {recorded}: {mend}: {model.all_experts}"
    return ""

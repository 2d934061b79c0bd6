"""EPLB once more, in plain Python over lists, as engines run it: what `placement.py` times beside the compiled one.

The same algorithm to the last tie, so that both must give one placement. The published implementation is plain Python
too, over elements of torch tensors, each of which costs about a microsecond more than one of a list.
"""

from router.placement.problem import PlacementProblem


def eplb_in_python(problem: PlacementProblem) -> list[list[int]]:
    """The expert of each slot, layer by layer."""
    hierarchical = problem.groups % problem.nodes == 0
    groups, nodes = (problem.groups, problem.nodes) if hierarchical else (1, 1)
    return [
        _plan_layer(load_E, groups, nodes, problem.ranks // nodes, problem.slots // nodes)
        for load_E in problem.loads_LE.tolist()
    ]


def _plan_layer(load_E: list[float], groups: int, nodes: int, ranks: int, slots: int) -> list[int]:
    in_group = len(load_E) // groups
    members = [range(group * in_group, (group + 1) * in_group) for group in range(groups)]
    placed: list[int] = []
    for on_node in _pack([sum(load_E[expert] for expert in group) for group in members], nodes):
        experts = [expert for group in on_node for expert in members[group]]
        copied = list(experts)
        replicas = dict.fromkeys(experts, 1)
        level = {expert: load_E[expert] for expert in experts}
        for _ in range(slots - len(experts)):
            heaviest = max(experts, key=level.__getitem__)
            replicas[heaviest] += 1
            level[heaviest] = load_E[heaviest] / replicas[heaviest]
            copied.append(heaviest)
        for on_rank in _pack([level[expert] for expert in copied], ranks):
            placed += [copied[item] for item in on_rank]
    return placed


def _pack(loads: list[float], bins: int) -> list[list[int]]:
    """Longest processing time into bins of equally many items."""
    room = len(loads) // bins
    packed: list[list[int]] = [[] for _ in range(bins)]
    filled = [0.0] * bins
    for item in sorted(range(len(loads)), key=lambda item: -loads[item]):
        lightest = min((b for b in range(bins) if len(packed[b]) < room), key=filled.__getitem__)
        packed[lightest].append(item)
        filled[lightest] += loads[item]
    return packed

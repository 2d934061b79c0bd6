"""A cluster with parts that are slow or lost."""

import re
from collections.abc import Sequence

from cost_models.cluster import Cluster, Edge, vertex_name
from traces.errors import InputError

_CHANGE = re.compile(r"(?:link\s+)?([A-Za-z][\w.:]*)(?:-([A-Za-z][\w.:]*))?\s*=\s*(lost|[-+.\w]+)")


def degrade(cluster: Cluster, changes: Sequence[str]) -> Cluster:
    """The cluster with parts that are slow or lost, each change a `what=how` in the names of the cluster as it was.

    | what | how | |
    |---|---|---|
    | `gpu3` or `rank3` | 0.8 | computes at 0.8 of its speed |
    | `nic5`, `switch0`, `leaf2`, … | 0.5 | all its links have half their bandwidth |
    | `nic5-leaf5` | 0.25 | the link between the two has a quarter, both ways |

    What is slow keeps its traffic; `0` or `lost` takes it away: traffic finds another way, through a neighbour's NIC if
    need be, and `InputError` says which pair has none left. Ranks after a lost one move up by one and keep their nodes;
    NICs keep their names.
    """
    share: dict[Edge, float] = {}
    speed_G = cluster.speed_G.copy()
    seen: set[frozenset[object]] = set()
    for change in changes:
        ends, factor = _parse_change(change, cluster)
        if frozenset(ends) in seen:
            raise InputError(f"degrade {change!r}: {'-'.join(map(vertex_name, ends))} is named twice; keep one")
        seen.add(frozenset(ends))
        rank = ends[0]
        if len(ends) == 1 and isinstance(rank, int):
            speed_G[rank] *= factor
            continue
        for edge in _edges_of(cluster, ends, change):
            share[edge] = share.get(edge, 1.0) * factor
    joint = "," if cluster.healthy else " with"
    name = f"{cluster.name}{joint} {', '.join(changes)}" if changes else cluster.name
    return cluster.slowed(share, speed_G=speed_G, name=name)


def _parse_change(change: str, cluster: Cluster) -> tuple[tuple[object, ...], float]:
    """The vertex, or the two ends of the link, that a change names, and the factor."""
    parts = _CHANGE.fullmatch(change.strip())
    if parts is None:
        raise InputError(f"degrade {change!r}: not of the form what=how, as gpu3=0.8, nic5=lost or nic5-leaf5=0.25")
    one, two, how = parts.groups()
    try:
        factor = 0.0 if how == "lost" else float(how)
    except ValueError:
        factor = -1.0
    if not 0 <= factor <= 1:
        raise InputError(f"degrade {change!r}: {how!r} is neither lost nor a share between 0 and 1")
    try:
        return tuple(cluster.vertex(name) for name in (one, two) if name), factor
    except InputError as error:
        raise InputError(f"degrade {change!r}: {error}") from error


def _edges_of(cluster: Cluster, ends: tuple[object, ...], change: str) -> list[Edge]:
    if len(ends) == 1:
        return cluster.edges_of(ends[0])
    one, two = ends
    edges = cluster.edges_between(one, two)
    if not edges:
        joined = ", ".join(map(vertex_name, cluster.neighbours(one)))
        raise InputError(
            f"degrade {change!r}: {vertex_name(one)} has no link to {vertex_name(two)}; it has to {joined or 'none'}"
        )
    return edges

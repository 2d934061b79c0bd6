"""A picture of a cluster as one SVG: spine, leaves, NICs, GPUs in their nodes, and what is slow or lost in red."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from math import isclose, log
from textwrap import wrap
from typing import TypeVar

from cost_models.cluster import Cluster, vertex_name
from cost_models.topology import TIERS, Tier
from cost_models.units import GB

_COLOUR: dict[Tier, str] = {"scale_up": "#00805e", "scale_out": "#2563a8", "fabric": "#6b4fa0", "host": "#8a94a0"}
_TIER_NAME: dict[Tier, str] = {
    "scale_up": "scale-up (NVLink)",
    "scale_out": "scale-out (NIC)",
    "fabric": "fabric (between switches)",
    "host": "host (PCIe, C2C)",
}
_RED, _INK, _PALE, _LINE = "#c81e1e", "#1f2933", "#f3f5f7", "#9aa5b1"
_T = TypeVar("_T")
_GPUS_IN_A_ROW, _GPUS_IN_ALL, _SWITCHES = 8, 24, 12  # more than these are told, not drawn
_GPU, _GAP, _PAD, _MARGIN, _GUTTER, _STOREY = 38, 10, 14, 24, 16, 84  # pixels
_THIN, _THICK = 1.0, 5.0  # width of the narrowest and the widest link
_HEALTHY = 1 - 1e-9
_ARROW = (
    '<marker id="arrow" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="9" markerHeight="9" '
    'markerUnits="userSpaceOnUse" orient="auto-start-reverse"><path d="M0 0L6 3L0 6z" fill="context-stroke"/></marker>'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Box:
    """Where something is drawn: its middle and its size, in pixels."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Link:
    """A link: its ends, bytes/s, the share of them that is left (0: lost), whether it also goes from `two` to `one`.

    Where the two ways differ it is the one with less left.
    """

    one: object
    two: object
    tier: Tier
    bandwidth_bytes_s: float
    share: float
    both_ways: bool

    @property
    def is_well(self) -> bool:
        """Whether it is as it was."""
        return self.share >= _HEALTHY


@dataclass(slots=True, kw_only=True)
class _Parts:
    """What there is to draw of the healthy cluster, by vertex: the node of what is in one, the level of what is not.

    `told` is what is left of a vertex (1: it is well): a rank's speed, or the share that all its links have in common.
    """

    links: list[_Link]
    told: dict[object, float]
    nics: dict[object, int] = field(default_factory=dict)
    switches: dict[object, int] = field(default_factory=dict)
    hosts: dict[object, int] = field(default_factory=dict)
    levels: dict[object, int] = field(default_factory=dict)
    neighbours: dict[object, list[object]] = field(default_factory=dict)


def cluster_svg(cluster: Cluster) -> str:
    """The cluster as an SVG document that needs nothing else.

    A degraded cluster is drawn as it was (so are its numbers), with slow GPUs and links in red and lost ones dashed.
    Of a big one the first nodes, GPUs and switches are drawn, and those that are not well; the others are counted.
    """
    was = cluster.healthy or cluster
    parts = _parts(cluster, was)
    layout = _place(parts, was)
    boxes = layout.boxes
    drawn = [link for link in parts.links if link.one in boxes and link.two in boxes]
    # What is well first, so that red lies on top.
    drawn.sort(key=lambda link: (not link.is_well, link.tier != "host"))
    head, top = _head(cluster, was, layout.x)
    entries = _legend(parts.links, cluster.healthy is not None, layout.bottom + top)
    body = [*layout.behind, *_wires(drawn, parts, boxes), *(_vertex(vertex, parts, boxes[vertex]) for vertex in boxes)]
    width, height = layout.x, layout.bottom + top + 20 * len(entries) + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" font-size="12" fill="{_INK}" '
        "font-family=\"system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif\">\n"
        f"<title>{escape(cluster.name)}</title>\n"
        f'<defs>{_ARROW}</defs>\n<rect width="100%" height="100%" fill="#fff"/>\n{head}'
        f'<g transform="translate(0 {top:.0f})">\n{"".join(body)}</g>\n{"".join(entries)}</svg>\n'
    )


def _parts(cluster: Cluster, was: Cluster) -> _Parts:
    now_of = {int(old): new for new, old in enumerate(cluster.was_G)}
    ends = {vertex: now_of.get(vertex) if isinstance(vertex, int) else vertex for vertex in was.graph}
    ways: dict[frozenset[object], list[_Link]] = {}
    for one, two, figures in was.graph.edges(data=True):
        edge, bandwidth = (ends[one], ends[two]), figures["bandwidth_bytes_s"]
        left = cluster.graph.edges[edge]["bandwidth_bytes_s"] if cluster.graph.has_edge(*edge) else 0.0
        way = _Link(
            one=one,
            two=two,
            tier=figures.get("tier", "scale_up"),
            bandwidth_bytes_s=bandwidth,
            share=left / bandwidth,
            both_ways=was.graph.has_edge(two, one),
        )
        ways.setdefault(frozenset((one, two)), []).append(way)
    parts = _Parts(
        links=[min(both, key=lambda way: (way.share, -way.bandwidth_bytes_s)) for both in ways.values()],
        told={rank: float(cluster.speed_G[now_of[rank]]) if rank in now_of else 0.0 for rank in range(was.ranks)},
    )
    tiers: dict[object, set[Tier]] = {}
    shares: dict[object, set[float]] = {}
    for link in parts.links:
        for one, two in ((link.one, link.two), (link.two, link.one)):
            parts.neighbours.setdefault(one, []).append(two)
            tiers.setdefault(one, set()).add(link.tier)
            shares.setdefault(one, set()).add(link.share)
    for vertex, neighbours in parts.neighbours.items():
        nodes = {int(was.node_of_G[rank]) for rank in neighbours if isinstance(rank, int)}
        if isinstance(vertex, int):
            continue
        parts.told[vertex] = shares[vertex].pop() if len(shares[vertex]) == 1 else 1.0
        if len(nodes) != 1:
            continue
        only_ranks = all(isinstance(neighbour, int) for neighbour in neighbours)
        kind = parts.nics if not only_ranks else parts.hosts if tiers[vertex] == {"host"} else parts.switches
        kind[vertex] = nodes.pop()
    _add_levels(parts)
    return parts


def _add_levels(parts: _Parts) -> None:
    """How many links every switch of the network is away from the nodes."""
    edge: list[object] = [*(v for v in parts.told if isinstance(v, int)), *parts.nics, *parts.switches, *parts.hosts]
    seen, level = set(edge), 0
    while edge:
        level += 1
        edge = [v for v in dict.fromkeys(n for e in edge for n in parts.neighbours.get(e, ())) if v not in seen]
        seen.update(edge)
        parts.levels.update(dict.fromkeys(edge, level))


def _some(things: Sequence[_T], most: int, concern: Mapping[_T, int]) -> list[_T]:
    """At most `most` things in their order, those of most concern before others."""
    chosen = sorted(range(len(things)), key=lambda index: (-concern.get(things[index], 0), index))[:most]
    return [things[index] for index in sorted(chosen)]


def _concerns(parts: _Parts, was: Cluster) -> tuple[dict[object, int], dict[int, int]]:
    """How much each vertex and each node should be seen: 2 where it is slow or lost itself, 1 where a link of it is."""
    of_vertex: dict[object, int] = {}
    for link in parts.links:
        if not link.is_well:
            of_vertex |= {link.one: 1, link.two: 1}
    of_vertex |= {vertex: 2 for vertex, left in parts.told.items() if left < _HEALTHY}
    node_of = {rank: int(was.node_of_G[rank]) for rank in range(was.ranks)} | parts.nics | parts.switches | parts.hosts
    of_node: dict[int, int] = {}
    for vertex, concern in of_vertex.items():
        if vertex in node_of:
            of_node[node_of[vertex]] = max(of_node.get(node_of[vertex], 0), concern)
    return of_vertex, of_node


@dataclass(slots=True, kw_only=True)
class _Layout:
    """Where things are drawn: boxes, the frames and words `behind` them, how far it reaches; y of each kind in a node.

    `hidden` holds, for nodes that are counted and not drawn, where that is said and what joins them to the network.
    """

    y_nic: float
    y_gpu: float
    y_switch: float
    y_host: float
    bottom: float
    x: float = _MARGIN
    boxes: dict[object, _Box] = field(default_factory=dict)
    behind: list[str] = field(default_factory=list)
    hidden: list[tuple[float, set[object]]] = field(default_factory=list)


def _place(parts: _Parts, was: Cluster) -> _Layout:
    """All that is drawn, in its place. `x` ends as the picture's width."""
    ranks_of: dict[int, list[object]] = {}
    for rank in range(was.ranks):
        ranks_of.setdefault(int(was.node_of_G[rank]), []).append(rank)
    concern, concern_of_node = _concerns(parts, was)
    tops = max(parts.levels.values(), default=0)
    y_nic = 34.0 + _STOREY * tops
    has_cables = any(isinstance(link.one, int) and isinstance(link.two, int) for link in parts.links)
    y_gpu = y_nic + (58 if parts.nics else 40 if has_cables else 8)
    y_switch = y_gpu + (58 if parts.switches else 0)
    y_host = y_switch + (58 if parts.hosts else 0)
    layout = _Layout(y_nic=y_nic, y_gpu=y_gpu, y_switch=y_switch, y_host=y_host, bottom=y_host + 42)
    widest = min(_GPUS_IN_A_ROW, max(map(len, ranks_of.values())))
    waiting = list(ranks_of)
    for node in _some(waiting, max(2, _GPUS_IN_ALL // widest), concern_of_node):
        _count_hidden(layout, parts, ranks_of, waiting[: waiting.index(node)])
        _place_node(layout, parts, node, _some(ranks_of[node], _GPUS_IN_A_ROW, concern), len(ranks_of[node]))
        waiting = waiting[waiting.index(node) + 1 :]
    _count_hidden(layout, parts, ranks_of, waiting)
    layout.x = max(layout.x - _GUTTER + _MARGIN, 560.0)
    for level in range(1, tops + 1):
        switches = [vertex for vertex, at in parts.levels.items() if at == level]
        _place_switches(layout, switches, _some(switches, _SWITCHES, concern), 24 + _STOREY * (tops - level))
    _join_hidden(layout, parts)
    return layout


def _place_node(layout: _Layout, parts: _Parts, node: int, gpus: Sequence[object], ranks: int) -> None:
    """A frame with the node's GPUs, its NICs above and its switches and host below them."""
    boxes = layout.boxes
    row = len(gpus) * (_GPU + _GAP) - _GAP
    inner = max(row, 2 * _GPU + _GAP)
    left = layout.x + _PAD
    for index, gpu in enumerate(gpus):
        x = left + (inner - row) / 2 + index * (_GPU + _GAP) + _GPU / 2
        boxes[gpu] = _Box(x=x, y=layout.y_gpu, width=_GPU, height=30)
    nics_at: dict[float, int] = {}
    for nic in _members(parts.nics, node):
        below = [boxes[rank].x for rank in parts.neighbours[nic] if rank in boxes]
        if below:
            x = sum(below) / len(below)
            nics_at[x] = nics_at.get(x, 0) + 1  # several of one GPU lie a little aside
            boxes[nic] = _Box(x=x + 6 * (nics_at[x] - 1), y=layout.y_nic, width=_GPU, height=28)
    for kind, y in ((parts.switches, layout.y_switch), (parts.hosts, layout.y_host)):
        mine = _members(kind, node)
        for index, vertex in enumerate(mine):
            each = inner / len(mine)
            boxes[vertex] = _Box(x=left + each * (index + 0.5), y=y, width=each - 4 * (len(mine) > 1), height=24)
    label = f"node {node}" + (f", … {ranks - len(gpus)} more GPUs" if ranks > len(gpus) else "")
    top = layout.y_nic - 26
    layout.behind.append(
        f'<rect x="{layout.x:.0f}" y="{top:.0f}" width="{inner + 2 * _PAD:.0f}" height="{layout.bottom - top:.0f}" '
        f'rx="8" fill="{_PALE}" stroke="#d5dbe1"/>\n'
        + _text(left + inner / 2, layout.bottom - 9, label, anchor="middle", colour="#465362")
    )
    layout.x += inner + 2 * _PAD + _GUTTER


def _members(kind: Mapping[object, int], node: int) -> list[object]:
    return [vertex for vertex, owner in kind.items() if owner == node]


def _count_hidden(
    layout: _Layout, parts: _Parts, ranks_of: Mapping[int, Sequence[object]], nodes: Sequence[int]
) -> None:
    """Say how many nodes are not drawn here."""
    if not nodes:
        return
    text = f"… {len(nodes)} more node{'s' if len(nodes) > 1 else ''}"
    layout.behind.append(_text(layout.x + 48, layout.y_nic + 4, text, anchor="middle"))
    ranks = {rank for node in nodes for rank in ranks_of[node]}
    layout.hidden.append((layout.x + 48, ranks | {nic for nic, node in parts.nics.items() if node in set(nodes)}))
    layout.x += 94 + _GUTTER


def _place_switches(layout: _Layout, switches: Sequence[object], drawn: Sequence[object], y: float) -> None:
    """One level of the network."""
    hidden = len(switches) - len(drawn)
    pitch = (layout.x - 2 * _MARGIN - (90 if hidden else 0)) / len(drawn)
    text_width = 8.0 * max(len(str(vertex)) for vertex in drawn) + 16
    width = layout.x * 0.7 if len(switches) == 1 else min(pitch - 8, max(text_width, 64))
    for index, vertex in enumerate(drawn):
        layout.boxes[vertex] = _Box(x=_MARGIN + pitch * (index + 0.5), y=y, width=width, height=26)
    if hidden:
        layout.behind.append(_text(layout.x - _MARGIN, y + 4, f"… {hidden} more", anchor="end"))


def _join_hidden(layout: _Layout, parts: _Parts) -> None:
    """Dotted lines from what is not drawn to its switches, behind all frames."""
    for x, ends in layout.hidden:
        for vertex, box in layout.boxes.items():
            if parts.levels.get(vertex) == 1 and ends & set(parts.neighbours[vertex]):
                layout.behind.insert(
                    0,
                    f'<path d="M{x:.1f} {layout.y_nic - 12:.1f}L{box.x:.1f} {box.y + box.height / 2:.1f}" fill="none" '
                    f'stroke="{_LINE}" stroke-dasharray="1 3"/>\n',
                )


def _text(x: float, y: float, text: str, *, anchor: str, colour: str = _INK, size: float = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:.3g}" fill="{colour}">'
        f"{escape(text)}</text>\n"
    )


def _wires(links: Iterable[_Link], parts: _Parts, boxes: dict[object, _Box]) -> list[str]:
    rates = [link.bandwidth_bytes_s for link in parts.links]
    drawn, labels = [], []
    for link in links:
        one, two = sorted((boxes[link.one], boxes[link.two]), key=lambda box: (box.y, box.x))
        path, label_x, label_y = _path(one, two, is_host=link.tier == "host")
        colour = _COLOUR[link.tier] if link.is_well else _RED
        dash = ' stroke-dasharray="5 4"' if link.share == 0 else ""
        if not link.both_ways:
            dash += f' marker-{"end" if one is boxes[link.one] else "start"}="url(#arrow)"'
        is_upside_down = link.both_ways and boxes[link.one].y < boxes[link.two].y
        ends = (link.two, link.one) if is_upside_down else (link.one, link.two)
        joint = " – " if link.both_ways else " → "
        name = f"{joint.join(map(vertex_name, ends))}: {_rate(link.bandwidth_bytes_s)}"
        state = "" if link.is_well else ", lost" if link.share == 0 else f", {link.share:.3g} of it left"
        drawn.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{_thickness(link, rates):.1f}"{dash}>'
            f"<title>{escape(name + state)}</title></path>\n"
        )
        told = {parts.told[link.one], parts.told[link.two]}
        if not link.is_well and link.share not in told:  # else one of its ends says so
            text = "lost" if link.share == 0 else f"×{link.share:.3g}"
            labels.append(
                f'<text x="{label_x + 5:.1f}" y="{label_y + 4:.1f}" font-size="11" font-weight="600" fill="{_RED}" '
                f'stroke="#fff" stroke-width="3" paint-order="stroke">{text}</text>\n'
            )
    return drawn + labels


def _path(one: _Box, two: _Box, *, is_host: bool) -> tuple[str, float, float]:
    """The line between two boxes, the first no lower than the second, and where its label goes."""
    if isclose(one.y, two.y):
        high = one.y - one.height / 2
        if two.x - one.x <= _GPU + 2 * _GAP:
            right, left = one.x + one.width / 2, two.x - two.width / 2
            return f"M{right:.1f} {one.y:.1f}L{left:.1f} {one.y:.1f}", (right + left) / 2 - 14, high - 6
        bend = min(14 + (two.x - one.x) / 12, 44)
        return (
            f"M{one.x:.1f} {high:.1f}Q{(one.x + two.x) / 2:.1f} {high - 2 * bend:.1f} {two.x:.1f} {high:.1f}",
            (one.x + two.x) / 2,
            high - bend,
        )
    start_x, end_x = _meet(one, two), _meet(two, one)
    if is_host:  # beside the link to the switch that it passes behind
        start_x, end_x = start_x + 11, end_x + 11
    start_y, end_y = one.y + one.height / 2, two.y - two.height / 2
    share = 0.3 if not is_host else 0.85  # labels of lines that meet above would lie on each other there
    return (
        f"M{start_x:.1f} {start_y:.1f}L{end_x:.1f} {end_y:.1f}",
        end_x + (start_x - end_x) * (1 - share if is_host else share),
        end_y + (start_y - end_y) * (1 - share if is_host else share),
    )


def _meet(box: _Box, other: _Box) -> float:
    """Where on a box a line to another begins: a narrow one's middle, and the place nearest to that on a wide one."""
    if box.width < other.width:
        return box.x
    reach = max(box.width / 2 - 6, 0)
    towards = other.x - box.x
    if box.width < 3 * other.width:  # too narrow for a place of its own: fanned out
        towards *= reach / 500
    return box.x + max(-reach, min(reach, towards))


def _thickness(link: _Link, rates: Sequence[float]) -> float:
    """Pixels for what is left of a link's bandwidth, by its logarithm."""
    least, most = min(rates), max(rates)
    if isclose(least, most):
        return 2.0
    left = max(link.bandwidth_bytes_s * (link.share or 1), least)
    return _THIN + (_THICK - _THIN) * log(left / least) / log(most / least)


def _vertex(vertex: object, parts: _Parts, box: _Box) -> str:
    left = parts.told[vertex]
    kinds: list[tuple[Collection[object], str, str]] = [
        (parts.nics, "#e6eef7", _COLOUR["scale_out"]),
        (parts.switches, "#e0f0ea", _COLOUR["scale_up"]),
        (parts.hosts, "#e9ecef", _COLOUR["host"]),
        (parts.levels, "#ece7f5", _COLOUR["fabric"]),
        (parts.told, "#fff", _INK),  # the ranks, after all others
    ]
    fill, stroke = next((fill, stroke) for members, fill, stroke in kinds if vertex in members)
    is_well = left >= _HEALTHY
    if not is_well:
        fill, stroke = "#fdeaea", _RED
    dash = ' stroke-dasharray="4 3"' if left == 0 else ""
    name = vertex_name(vertex)
    size = min(11.0, 1.5 * box.width / max(len(name), 1))
    lines = [(name, _INK)] if is_well else [(name, _RED), ("lost" if left == 0 else f"×{left:.3g}", _RED)]
    words = "".join(
        _text(box.x, box.y + 4 + 12 * (index - (len(lines) - 1) / 2), text, anchor="middle", colour=colour, size=size)
        for index, (text, colour) in enumerate(lines)
    )
    return (
        f'<rect x="{box.x - box.width / 2:.1f}" y="{box.y - box.height / 2:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="4" fill="{fill}" stroke="{stroke}"{dash}/>\n{words}'
    )


def _head(cluster: Cluster, was: Cluster, width: float) -> tuple[str, float]:
    """Title, what is degraded, and the pixels they take."""
    kind = was.device.name if was.device else "rank"
    nodes = f"{was.ranks} × {kind} on {was.nodes} node{'s' if was.nodes > 1 else ''}"
    lines = [f'<tspan font-size="17" font-weight="600">{escape(was.name)}</tspan>', escape(nodes)]
    changes = cluster.name.removeprefix(was.name).removeprefix(" with ") if cluster.healthy else ""
    if changes:
        told = wrap(f"Degraded: {changes}", max(40, int(width / 7)))
        told = [*told[:3], f"… {len(told) - 3} more lines"] if len(told) > 4 else told
        lines += [f'<tspan fill="{_RED}">{escape(line)}</tspan>' for line in told]
    if cluster.ranks < was.ranks:
        lines.append(
            f"Numbers are those from before; {cluster.ranks} ranks are left and take 0 to {cluster.ranks - 1}."
        )
    words = "".join(f'<text x="{_MARGIN}" y="{30 + 19 * index}">{line}</text>\n' for index, line in enumerate(lines))
    return words, 30 + 19 * len(lines)


def _legend(links: Sequence[_Link], is_degraded: bool, y: float) -> list[str]:
    """One line for each tier, with the bandwidths of its links."""
    rates = [link.bandwidth_bytes_s for link in links]
    entries = []
    for tier in TIERS:
        mine = [link for link in links if link.tier == tier]
        if mine:
            least, most = (pick(link.bandwidth_bytes_s for link in mine) for pick in (min, max))
            text = _rate(least) if isclose(least, most) else f"{_rate(least)} to {_rate(most)}"
            ways = " each way" if all(link.both_ways for link in mine) else ""
            widest = max(mine, key=lambda link: link.bandwidth_bytes_s)
            healthy = _Link(
                one=0, two=0, tier=tier, bandwidth_bytes_s=widest.bandwidth_bytes_s, share=1.0, both_ways=True
            )
            entries.append((_COLOUR[tier], _thickness(healthy, rates), "", f"{_TIER_NAME[tier]}: {text}{ways}"))
    if is_degraded:
        entries.append((_RED, 3.0, "", "slow: × what is left of speed or bandwidth"))
        entries.append((_RED, 2.0, ' stroke-dasharray="5 4"', "lost"))
    return [
        f'<path d="M{_MARGIN} {y + 24 + 20 * index:.1f}h36" stroke="{colour}" stroke-width="{wide:.1f}"{dash}/>'
        + _text(_MARGIN + 46, y + 28 + 20 * index, text, anchor="start")
        for index, (colour, wide, dash, text) in enumerate(entries)
    ]


def _rate(bytes_s: float) -> str:
    for unit, factor in (("TB/s", 1e3 * GB), ("GB/s", GB), ("MB/s", 1e6)):
        if bytes_s >= factor:
            return f"{bytes_s / factor:.4g} {unit}"
    return f"{bytes_s:.4g} B/s"

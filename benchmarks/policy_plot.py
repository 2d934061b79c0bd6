"""The picture of `policies.py`: quality against the time of a step, by policy."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from policy_cases import OURS, PUBLISHED

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "moeroute", "font.size": 9})
from matplotlib import pyplot as plt  # noqa: E402  # after the backend is chosen

_COLOURS = {
    OURS: "#d55e00",
    "top_k": "#1f2933",
    "opportunistic": "#0072b2",
    "capacity_aware": "#00805e",
    "group_limited": "#8e4585",
}
_OTHERS = "#b3bac2"
_LEAST_MASS = 0.6
_MOST_LOSS = 0.08  # what lies beyond is of no use to anyone


def write_plot(path: Path, result: Mapping[str, Any]) -> None:
    """Loss against measured and simulated steps of the reference model, then gate mass of each setting."""
    fronts = [front for front in result["fronts"] if front["scope"] == "global"]
    panels = 2 + len(fronts)
    rows = -(-panels // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(10, 3.6 * rows))
    flat = list(axes.flat)
    reference = [row for row in result["rows"] if row["cpu_step_s"] is not None]
    _scatter(flat[0], reference, "cpu_step_s", "loss_delta", "measured step on 2 CPU ranks (ms)")
    _scatter(flat[1], reference, "sim_h100x8_s", "loss_h100x8_delta", "simulated step on 8 H100 (ms)")
    for axis, front in zip(flat[2:], fronts, strict=False):
        for family in (*PUBLISHED, OURS):
            if family in front["points"]:
                _family(axis, family, [(s * 1e3, -mass) for mass, s in front["points"][family]], sign=-1)
        axis.set_ylim(_LEAST_MASS, 1.01)
        axis.set_xlabel("simulated step (ms)")
        axis.set_ylabel("gate mass kept")
        axis.set_title(front["setting"], fontsize=9)
    for axis in flat[panels:]:
        axis.set_axis_off()
    handles, labels = flat[2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _scatter(axis: Any, rows: Sequence[Mapping[str, Any]], time: str, loss: str, label: str) -> None:
    others = [row for row in rows if row["policy"] not in _COLOURS]
    axis.scatter([row[time] * 1e3 for row in others], [row[loss] for row in others], color=_OTHERS, s=14)
    for family in (*PUBLISHED, OURS):
        _family(axis, family, [(row[time] * 1e3, row[loss]) for row in rows if row["policy"] == family], sign=1)
    axis.set_ylim(-0.003, _MOST_LOSS)
    axis.set_xlabel(label)
    axis.set_ylabel("loss over top-k (nats a byte)")
    axis.set_title("reference model, held-out text; grey: the other policies", fontsize=9)


def _family(axis: Any, family: str, points: Sequence[tuple[float, float]], *, sign: int) -> None:
    """Points of (time, what is lost), and a line through those that no other of the family beats."""
    best: list[tuple[float, float]] = []
    for time, lost in sorted(points):
        if not best or lost < best[-1][1]:
            best.append((time, lost))
    colour = _COLOURS[family]
    axis.scatter([time for time, _ in points], [sign * lost for _, lost in points], color=colour, s=12)
    axis.plot(
        [time for time, _ in best],
        [sign * lost for _, lost in best],
        "o-",
        color=colour,
        label=family.replace("_", " "),
        markersize=4,
        linewidth=1,
    )

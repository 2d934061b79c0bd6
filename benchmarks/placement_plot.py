"""The pictures of `placement.py`: balance, hierarchy, drift and simulated steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from placement_cases import SHAPES
from placement_tables import deployment_of

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "moeroute", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
from matplotlib import pyplot as plt  # noqa: E402  # after the backend is chosen

Row = Mapping[str, Any]
_COLOURS = {
    "contiguous": "#b3bac2",
    "random": "#7b8794",
    "round_robin": "#8e4585",
    "lpt": "#56b4e9",
    "eplb": "#1f2933",
    "balanced": "#d55e00",
    "active_aware": "#0072b2",
    "cost_aware": "#00805e",
    "affinity": "#e69f00",
}
_SHAPE_COLOURS = dict(zip(SHAPES, ("#0072b2", "#00805e", "#d55e00", "#8e4585", "#1f2933"), strict=True))
_OURS = ("balanced", "active_aware", "cost_aware", "affinity")


def write_plots(folder: Path, result: Mapping[str, Any]) -> None:
    """One SVG for each section that has rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("cases", _balance), ("hierarchical", _hierarchy), ("drift", _drift), ("recorded", _recorded)):
        if result[name]:
            figure = draw(result[name])
            figure.savefig(folder / f"placement_{name}.svg", metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)


def _balance(rows: Sequence[Row]) -> Any:
    """What is lost to imbalance, on a logarithmic axis, by load shape."""
    figure, axis = plt.subplots(figsize=(9, 3.4), layout="constrained")
    algorithms = ("contiguous", "round_robin", "random", "lpt", "eplb", "balanced")
    for index, algorithm in enumerate(algorithms):
        lost = {row["load"]: 1 - row["balancedness"] for row in rows if row["algorithm"] == algorithm}
        beside = (index - len(algorithms) / 2) * 0.06  # so that equal ones are seen
        axis.plot(
            [place + beside for place in range(len(SHAPES))],
            [lost[shape] for shape in SHAPES],
            "o",
            color=_COLOURS[algorithm],
            label=algorithm.replace("_", " "),
        )
    axis.set_xticks(range(len(SHAPES)), SHAPES)
    axis.axhline(1e-3, color="#b3bac2", linewidth=0.8, linestyle="--")
    axis.set_yscale("log")
    axis.set_ylabel("1 − balancedness (lower is better)")
    axis.set_title("256 experts in 288 slots on 32 ranks, 58 layers", fontsize=9)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _hierarchy(rows: Sequence[Row]) -> Any:
    """Balancedness against tokens that leave their group's home node; a dashed line is the bound of staying."""
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for shape, colour in _SHAPE_COLOURS.items():
        of_shape = [row for row in rows if row["load"] == shape]
        soft = sorted(
            (row["tokens_away_share"], row["balancedness"])
            for row in of_shape
            if row["algorithm"] == "soft_hierarchical"
        )
        axis.plot(*zip(*soft, strict=True), "o-", color=colour, label=shape, markersize=4, linewidth=1)
        axis.plot(0, next(r["balancedness"] for r in of_shape if r["algorithm"] == "eplb"), "x", color=colour)
        axis.axhline(of_shape[0]["upper_bound"], color=colour, linewidth=0.6, linestyle="--")
    axis.plot([], [], "x", color="#1f2933", label="EPLB hierarchical")
    axis.plot([], [], "--", color="#1f2933", linewidth=0.6, label="bound without leaving home")
    axis.set_xlabel("share of tokens on replicas away from their group's home node")
    axis.set_ylabel("balancedness")
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _drift(rows: Sequence[Row]) -> Any:
    """Balancedness against slots moved: a stale plan, a few moves, a plan made anew."""
    sigmas = sorted({row["sigma"] for row in rows})
    figure, axes = plt.subplots(1, len(sigmas), figsize=(10, 3.4), sharey=True, layout="constrained")
    for axis, sigma in zip(axes, sigmas, strict=True):
        for shape, colour in _SHAPE_COLOURS.items():
            of_shape = [row for row in rows if row["load"] == shape and row["sigma"] == sigma]
            line = [(r["moved"], r["balancedness"]) for r in of_shape if r["algorithm"] in ("stale", "improve")]
            axis.plot(*zip(*sorted(line), strict=True), "o-", color=colour, label=shape, markersize=4, linewidth=1)
            for algorithm, mark in (("eplb", "x"), ("eplb, ranks renumbered", "+")):
                anew = next(row for row in of_shape if row["algorithm"] == algorithm)
                axis.plot(anew["moved"], anew["balancedness"], mark, color=colour)
        axis.set_title(f"drift σ = {sigma:g}", fontsize=9)
        axis.set_xlabel("slots moved (share)")
    axes[0].set_ylabel("balancedness")
    axes[0].plot([], [], "x", color="#1f2933", label="EPLB anew")
    axes[0].plot([], [], "+", color="#1f2933", label="EPLB anew, ranks renumbered")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _recorded(rows: Sequence[Row]) -> Any:
    """Step time over EPLB's by deployment, each algorithm with the replica choice that is fastest there."""
    deployments = list(dict.fromkeys(map(deployment_of, rows)))
    figure, axis = plt.subplots(figsize=(9, 0.5 * len(deployments) + 1.2), layout="constrained")
    for height, deployment in enumerate(deployments):
        of_it = [row for row in rows if deployment_of(row) == deployment]
        for algorithm in ("contiguous", "random", "eplb", *_OURS):
            own = [row for row in of_it if row["algorithm"] == algorithm]
            best = min(own, key=lambda row: row["step_s"])
            low, high = best["vs_eplb_ci"]
            place = height + (0.0 if algorithm not in _OURS else 0.11 * (1 + _OURS.index(algorithm)))
            axis.plot([low, high], [place, place], color=_COLOURS[algorithm], linewidth=1)
            axis.plot(
                best["vs_eplb"],
                place,
                "o",
                color=_COLOURS[algorithm],
                markersize=4,
                label=algorithm.replace("_", " ") if height == 0 else None,
            )
    axis.axvline(1, color="#1f2933", linewidth=0.8)
    axis.set_yticks(
        range(len(deployments)),
        [f"{trace}, {ranks} ranks, {slots} slots, {tokens}/rank" for trace, ranks, slots, tokens in deployments],
    )
    axis.invert_yaxis()
    axis.set_xlabel("simulated decode step over that of EPLB's plan with evenly used replicas")
    axis.set_title("planned on one window, scored on the next; each with its fastest replica choice", fontsize=9)
    figure.legend(loc="outside right center", frameon=False)
    return figure

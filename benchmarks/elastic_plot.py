"""The pictures of `elastic.py`: the k′ curve, parts beside models trained alone, and experts kept for one domain."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from elastic_claims import Results, interval
from elastic_rows import CUT_RECIPES, K_CURVE, SHARES, Cut
from elastic_trainings import CONFIG, SHAPES

from router.elastic import RECIPES

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "moeroute", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
from matplotlib import pyplot as plt  # noqa: E402  # after the backend is chosen

_COLOURS = {
    "plain": "#1f2933",
    "larger_k": "#7b8794",
    "emoe": "#d55e00",
    "matryoshka": "#0072b2",
    "once_for_all": "#00805e",
    "alone": "#8e4585",
}
# The numbers of experts a token that each recipe trains with.
_TRAINED_K = {"plain": (4, 4), "larger_k": (8, 8), "emoe": (4, 4), "matryoshka": (1, 7), "once_for_all": (1, 4)}


def write_plots(folder: Path, result: Mapping[str, Any]) -> None:
    """One SVG a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(result["rows"], result["decode"])
    for name, draw in (("k_curve", _k_curve), ("parts", _parts), ("domains", _domains)):
        figure = draw(results)
        figure.savefig(folder / f"elastic_{name}.svg", metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)


def _k_curve(results: Results) -> Any:
    """Loss by experts a token, and its change against the k trained with; large marks: what the recipe trained with."""
    figure, (absolute, relative) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for index, recipe in enumerate(RECIPES):
        beside = [k + (index - 2) * 0.06 for k in K_CURVE]  # so that intervals are seen
        losses = [[results.loss(recipe, seed, Cut(top_k=k)) for seed in results.seeds] for k in K_CURVE]
        rises = [[100 * rise for rise in results.rise(recipe, k)] for k in K_CURVE]
        for axis, values in ((absolute, losses), (relative, rises)):
            _line(axis, beside, values, _COLOURS[recipe], recipe)
            low, high = _TRAINED_K[recipe]
            trained = [place for place, k in enumerate(K_CURVE) if low <= k <= high]
            axis.plot(
                [beside[place] for place in trained],
                [np.mean(values[place]) for place in trained],
                "o",
                color=_COLOURS[recipe],
                markersize=6,
            )
    absolute.set_ylabel("loss (nats a byte)")
    relative.set_ylabel("loss over that at the k trained with (%)")
    relative.axhline(0, color="#b3bac2", linewidth=0.8, zorder=0)
    for axis in (absolute, relative):
        axis.set_xticks(K_CURVE)
        axis.set_xlabel("experts a token, k′")
    handles, labels = absolute.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    seeds = len(results.seeds)
    figure.suptitle(
        f"{seeds} seed{'s'[: seeds > 1]}, 95% intervals; large marks: k that the recipe trains with", size=9
    )
    return figure


def _parts(results: Results) -> Any:
    """Loss of parts of one model beside that of models trained alone in the same shapes, by FLOPs a token."""
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    cuts = [Cut(depth=depth, experts=experts, top_k=top_k) for depth, experts, top_k in SHAPES]
    sizes = {cut: results.row("once_for_all", results.seeds[0], cut) for cut in cuts}
    cuts.sort(key=lambda cut: (sizes[cut]["flops_per_token"], sizes[cut]["total_share"]))
    for recipe, mark, beside in (("alone", "s", -0.15), ("once_for_all", "o", 0.0), ("plain", "D", 0.15)):
        for place, cut in enumerate(cuts):
            losses = [results.loss(recipe, seed, cut) for seed in results.seeds]
            axis.plot(
                place + beside,
                np.mean(losses),
                mark,
                color=_COLOURS[recipe],
                label=_NAMES[recipe] if place == 0 else None,
                markersize=5,
            )
            _bar(axis, place + beside, losses, _COLOURS[recipe])
    for recipe in CUT_RECIPES:
        whole = float(np.mean([results.loss(recipe, seed, Cut()) for seed in results.seeds]))
        axis.axhline(whole, color=_COLOURS[recipe], linewidth=0.8, linestyle="--", label=f"{recipe}, whole", zorder=0)
    axis.set_xticks(range(len(cuts)), [_described(sizes[cut]) for cut in cuts])
    axis.set_ylabel("loss (nats a byte)")
    axis.set_title("bars: 95% intervals over seeds", fontsize=9)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _described(row: Mapping[str, Any]) -> str:
    """A shape on an axis."""
    return (
        f"{row['depth']} layers of {row['experts']}\nk = {row['k']}\n{row['flops_per_token'] / 1e6:.2f} MFLOPs\n"
        f"{row['total_share']:.0%} of weights"
    )


_NAMES = {"alone": "trained alone", "once_for_all": "cut from once_for_all", "plain": "cut from plain"}


def _domains(results: Results) -> Any:
    """The change of loss inside and outside a domain, when its own experts are kept in place of the best overall."""
    figure, axes = plt.subplots(1, len(CUT_RECIPES), figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, recipe in zip(axes, CUT_RECIPES, strict=True):
        for place, (where, colour) in enumerate((("inside its domain", "#00805e"), ("outside", "#d55e00"))):
            counts = [round(share * CONFIG.experts) for share in SHARES]
            values = [
                [100 * results.mean_in_and_out(recipe, seed, experts)[place] for seed in results.seeds]
                for experts in counts
            ]
            single = [
                [
                    100 * results.in_and_out(recipe, seed, experts, domain)[place]
                    for seed in results.seeds
                    for domain in results.domains
                ]
                for experts in counts
            ]
            for share, of_share in zip(SHARES, single, strict=True):
                axis.plot([100 * share + place - 0.5] * len(of_share), of_share, ".", color=colour, alpha=0.35, ms=4)
            _line(axis, [100 * share + place - 0.5 for share in SHARES], values, colour, where)
        axis.axhline(0, color="#b3bac2", linewidth=0.8, zorder=0)
        axis.set_xticks([100 * share for share in SHARES])
        axis.set_xlabel("experts kept (%)")
        axis.set_title(f"{recipe}; dots: a domain of a seed", fontsize=9)
    axes[0].set_ylabel("loss over that of the part\nkept for all text (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _line(axis: Any, places: Sequence[float], values: Sequence[Sequence[float]], colour: str, label: str) -> None:
    """Means with a line through them, and their intervals."""
    axis.plot(places, [np.mean(of) for of in values], "o-", color=colour, label=label, markersize=3, linewidth=1)
    for place, of in zip(places, values, strict=True):
        _bar(axis, place, of, colour)


def _bar(axis: Any, place: float, values: Sequence[float], colour: str) -> None:
    if (ci := interval(values)) is not None:
        axis.plot([place, place], ci, color=colour, linewidth=1, alpha=0.6)

"""The tables of `moeroute trace show` beyond the loads: specialisation, reuse, compute and wasted capacity."""

from collections.abc import Callable, Sequence

import numpy as np

from cost_models.units import human_seconds
from moeroute.cli.console import print_table
from router.waste import CLAIM, Waste
from traces.specialisation import SPECIALIST_LIFT
from traces.stats import Compute
from tuner.trace_analysis import TraceAnalysis


def print_specialisation(analysis: TraceAnalysis) -> None:
    """How far loads of domains lie apart, what experts tell of domains, and which specialise; nothing without any."""
    found = analysis.specialisation
    if found is None:
        return
    print_table(
        f"specialisation: distance of loads, mean over layers; chance: {found.permutations} permutations of the "
        f"domains of {found.requests} requests",
        ["domain", "total variation", "by chance"],
        [
            *(
                [f"{name} to all", f"{tv_L.mean():.3f}", f"{chance_L.mean():.3f}"]
                for name, tv_L, chance_L in zip(found.domains, found.tv_DL, found.tv_chance_DL, strict=True)
            ),
            ["two domains, mean", f"{found.tv_pair_mean_L.mean():.3f}", f"{found.tv_pair_mean_chance_L.mean():.3f}"],
            ["two domains, largest", f"{found.tv_pair_max_L.mean():.3f}", f"{found.tv_pair_max_chance_L.mean():.3f}"],
        ],
    )
    most = int(found.information_above_chance_L.argmax())
    print_table(
        f"mutual information of domain and expert, bits of {found.entropy_bits:.2f}",
        ["layer", "measured", "by chance", "above chance", "p"],
        [
            [
                "mean",
                f"{found.information_L.mean():.4f}",
                f"{found.information_chance_L.mean():.4f}",
                f"{found.information_above_chance_L.mean():.4f}",
                f"{int((found.p_L <= 0.05).sum())} of {found.p_L.size} layers <= 0.05",
            ],
            [
                f"{most} (most)",
                f"{found.information_L[most]:.4f}",
                f"{found.information_chance_L[most]:.4f}",
                f"{found.information_above_chance_L[most]:.4f}",
                f"{found.p_L[most]:.3f}",
            ],
        ],
    )
    print_table(
        f"specialists, at least {SPECIALIST_LIFT:g} times a domain's share: {len(found.specialists)}, "
        f"by chance {found.specialists_chance:.1f}",
        ["domain", "layer", "expert", "share of its tokens", "over the domain's share", "p"],
        [
            [s.domain, str(s.layer), str(s.expert), f"{s.share:.1%}", f"{s.lift:.2f}", f"{s.p:.3f}"]
            for s in found.specialists[:5]
        ],
    )


def print_reuse(analysis: TraceAnalysis, load_s: Callable[[float], float] | None) -> None:
    """Active experts and their reuse by step size, and what caches of experts hit; `load_s` is seconds of bytes."""
    active, cache = analysis.active, analysis.cache

    def share(value_L: Sequence[float] | None) -> str:
        return "" if value_L is None else f"{np.mean(value_L):.3f}"

    print_table(
        "reuse and active set, mean over layers; streams in lockstep",
        ["tokens a step", "active experts", "uniform", "active in the step before", "in any other step", "uniform"],
        [
            [
                str(batch),
                f"{np.mean(active.active_BL[row]):.2f}",
                f"{active.uniform_B[row]:.2f}",
                share(active.reuse_BL[row]),
                share(active.reuse_any_BL[row]),
                f"{active.uniform_reuse_B[row]:.3f}",
            ]
            for row, batch in enumerate(active.batch_B)
        ],
    )
    print_table(
        "expert cache (least recently used, one token at a time); a token without it loads "
        f"{_size(cache.uncached_bytes)}",
        [
            "resident a layer",
            "size",
            "hits",
            "shuffled",
            "uniform",
            "saved a token",
            "loaded a token",
            *(["loading, s a token"] if load_s else []),
        ],
        [
            [
                f"{entry['slots']} of {analysis.trace.model.experts}",
                _size(entry["resident_bytes"]),
                f"{entry['hit']:.3f}",
                f"{entry['shuffled']:.3f}",
                f"{entry['uniform']:.3f}",
                _size(entry["saved_bytes_per_token"]),
                _size(entry["loaded_bytes_per_token"]),
                *([human_seconds(load_s(entry["loaded_bytes_per_token"]))] if load_s else []),
            ]
            for entry in cache.to_json()["caches"]
        ],
    )


def print_compute(compute: Compute) -> None:
    """Operations of a token, sparse and dense."""
    print_table(
        "compute in the MoE layers",
        ["a token", "FLOPs", "share"],
        [
            ["sparse: its own experts", f"{compute.sparse_flops:.3e}", f"{compute.active_parameters:.1%}"],
            ["dense: all experts", f"{compute.dense_flops:.3e}", "100.0%"],
        ],
    )


def print_waste(waste: Waste) -> None:
    """Padding, drops and low gates."""

    def row(name: str, total: float, value_L: Sequence[float]) -> list[str]:
        return [name, f"{total:.1%}", f"{min(value_L):.1%}", f"{max(value_L):.1%}"]

    rows = [
        row("empty places of all experts", waste.padding, waste.padding_L),
        row("empty places of active experts", waste.active_padding, waste.active_padding_L),
        row("dropped pairs", waste.dropped, waste.dropped_L),
    ]
    if waste.below is not None and waste.below_L is not None:
        rows.append(row(f"pairs with a gate below {waste.gate_threshold:g}", waste.below, waste.below_L))
    if waste.wasted is not None and waste.wasted_L is not None:
        rows.append(row(f"wasted by active experts (claimed: up to {CLAIM:.0%})", waste.wasted, waste.wasted_L))
    print_table(
        f"wasted capacity: factor {waste.capacity_factor:g}, {waste.places} places an expert, {waste.steps} steps of "
        f"{waste.tokens_per_step} tokens",
        ["share", "all layers", "lowest", "highest"],
        rows,
    )


def _size(bytes_: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if bytes_ >= size:
            return f"{bytes_ / size:.2f} {unit}"
    return f"{bytes_ / 1e3:.2f} kB"

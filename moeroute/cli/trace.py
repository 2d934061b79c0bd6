"""`moeroute trace`: record, import, make and look at routing traces."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeroute.cli.complete import complete
from moeroute.cli.console import Json, Out, Seed, print_json, print_table, say

if TYPE_CHECKING:
    from router.waste import Waste
    from traces.stats import TraceStats
    from traces.trace import RoutingTrace
    from tuner.trace_analysis import TraceAnalysis

TRACE_FILE = "trace.parquet"
DEFAULT_TOKENS = 24_576
WASTE_FACTORS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)

app = typer.Typer(help="Routing traces: record, import, show, synth.", no_args_is_help=True)
TraceFile = Annotated[Path, typer.Argument(metavar="TRACE", help="A trace file (Parquet).")]
ModelName = Annotated[str, typer.Option("--model", help="Shape of the model, by its preset's name.")]


@app.command()
def record(
    out: Out = Path("out"),
    tokens: Annotated[int, typer.Option(help="Tokens of held-out text, a multiple of 128.")] = DEFAULT_TOKENS,
    seed: Seed = 0,
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of a model, whole or a part; the reference model if left out.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Run held-out text through the reference model, or another, and store what its routers say."""
    from moeroute.cli.model import load_from
    from router.nn.record import record as record_trace

    trained = load_from(model)
    if len(set(trained.part.top_k_L)) > 1:
        say(
            f"its layers differ in k ({trained.part.describe()}); the trace and its statistics count the largest in all"
        )
    _store(record_trace(trained, tokens=tokens, seed=seed), out, json)


@app.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A trace in npz form.")],
    model: ModelName,
    out: Out = Path("out"),
    json: Json = False,
) -> None:
    """Read another tool's trace and store it as ours."""
    from traces.formats.npz import import_npz
    from traces.presets import preset

    imported = import_npz(file, model=preset(model))
    if imported.skipped_tokens:
        say(f"{file}: skipped {imported.skipped_tokens} tokens that were padding")
    _store(imported.trace, out, json)


@app.command()
def synth(
    model: ModelName,
    tokens: Annotated[int, typer.Option(help="Tokens to make.")] = 8192,
    zipf: Annotated[float, typer.Option(help="Zipf exponent of the experts' popularity; 0 is uniform.")] = 0.8,
    candidates: Annotated[int | None, typer.Option(help="Candidates a token; the model's top k by default.")] = None,
    seed: Seed = 0,
    out: Out = Path("out"),
    json: Json = False,
) -> None:
    """Make a synthetic trace of a known unevenness."""
    from traces.presets import preset
    from traces.synthetic import synthetic_trace

    _store(synthetic_trace(preset(model), tokens=tokens, zipf=zipf, candidates=candidates, seed=seed), out, json)


app.command()(complete)


@app.command()
def show(
    file: TraceFile,
    html: Annotated[Path | None, typer.Option(help="Write the pictures to this HTML file.")] = None,
    capacity_factor: Annotated[float, typer.Option(help="Places of an expert over its mean load.")] = 1.25,
    gate_threshold: Annotated[float, typer.Option(help="Share of a token's gates below which a pair is waste.")] = 0.05,
    tokens_per_step: Annotated[
        int | None, typer.Option(help="Tokens of a step whose capacity is counted; 256, or as many as there are.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="GPU whose datasheet says how fast experts load.")] = None,
    json: Json = False,
) -> None:
    """Say what a trace tells: loads, reuse, specialisation by domain, compute and wasted capacity."""
    from traces.store import read_trace
    from tuner.trace_analysis import analyse

    load_s = _loader(gpu)  # an unknown GPU is refused before anything is computed
    analysis = analyse(
        read_trace(file),
        capacity_factors=sorted({capacity_factor, *(WASTE_FACTORS if html else ())}),
        gate_threshold=gate_threshold,
        tokens_per_step=tokens_per_step,
    )
    waste = next(waste for waste in analysis.wastes if waste.capacity_factor == capacity_factor)
    if html:
        from tuner.trace_html import write_trace_html

        write_trace_html(html, analysis)
        say(f"wrote {html}")
    if json:
        print_json(_document(file, analysis, waste, load_s))
    else:
        from moeroute.cli import trace_tables as tables

        print_stats(analysis.trace, analysis.stats)
        tables.print_specialisation(analysis)
        tables.print_reuse(analysis, load_s)
        tables.print_compute(analysis.compute)
        tables.print_waste(waste)
        for name, reason in analysis.left_out.items():
            say(f"no {name}: {reason}")


def print_stats(trace: "RoutingTrace", stats: "TraceStats") -> None:
    """The statistics as tables."""
    import numpy as np

    def row(name: str, max_over_mean: float, gini: float, reuse: float | None) -> list[str]:
        return [name, f"{max_over_mean:.2f}", f"{gini:.3f}", "" if reuse is None else f"{reuse:.3f}"]

    reuse_L = stats.reuse_L or [None] * trace.model.layers
    by_layer = zip(stats.max_over_mean_L, stats.gini_L, reuse_L, strict=True)
    mean_reuse = None if stats.reuse_L is None else float(np.mean(stats.reuse_L))
    print_table(
        f"{trace.source}: {trace.tokens} tokens in {stats.requests} requests, {trace.model.layers} layers, "
        f"{trace.model.experts} experts, top {stats.top_k}",
        ["layer", "load max/mean", "Gini", "reuse between tokens"],
        [
            *(row(str(layer), *figures) for layer, figures in enumerate(by_layer)),
            row("mean", float(np.mean(stats.max_over_mean_L)), float(np.mean(stats.gini_L)), mean_reuse),
            row("uniform routing", stats.uniform.max_over_mean, stats.uniform.gini, stats.uniform_reuse),
        ],
    )
    if stats.by_domain:
        print_table(
            "by domain, mean over layers",
            ["domain", "load max/mean", "Gini"],
            [row(name, b.max_over_mean, b.gini, None)[:3] for name, b in stats.by_domain.items()],
        )


def _store(trace: "RoutingTrace", out: Path, json: bool) -> None:
    from traces.stats import trace_stats
    from traces.store import write_trace

    path = out / TRACE_FILE
    write_trace(path, trace)
    stats = trace_stats(trace)
    if json:
        print_json({"file": str(path), "source": trace.source, **stats.to_json()})
    else:
        print_stats(trace, stats)
        say(f"wrote {path}")


def _loader(gpu: str | None) -> Callable[[float], float] | None:
    """Seconds that bytes take from the host's memory, at the datasheet's bandwidth."""
    if gpu is None:
        return None
    import numpy as np

    from cost_models.cluster import gpu_cluster
    from cost_models.devices import device
    from cost_models.ops import HostToDevice
    from cost_models.roofline import Roofline

    costs = Roofline(gpu_cluster(device(gpu), 1))
    return lambda bytes_: float(costs.seconds(HostToDevice(bytes_X=np.array([bytes_])))[0])


def _document(
    file: Path, analysis: "TraceAnalysis", waste: "Waste", load_s: Callable[[float], float] | None
) -> dict[str, Any]:
    trace, found = analysis.trace, analysis.specialisation
    cache = analysis.cache.to_json()
    if load_s is not None:
        for entry in cache["caches"]:
            entry["load_s_per_token"] = load_s(entry["loaded_bytes_per_token"])
            entry["saved_s_per_token"] = load_s(entry["saved_bytes_per_token"])
    return {
        "file": str(file),
        "source": trace.source,
        "model": trace.model.to_json(),
        **analysis.stats.to_json(),
        "specialisation": None if found is None else found.to_json(),
        "reuse": cache,
        "active_set": analysis.active.to_json(),
        "flops": analysis.compute.to_json(),
        "waste": waste.to_json(),
        "left_out": dict(analysis.left_out),
    }

"""`moeroute model`: models that are trained here, and parts of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeroute.cli.console import Json, Out, Seed, print_json, print_table, progress_bar, say

if TYPE_CHECKING:
    from router.nn.store import TrainedModel
    from router.subnetwork import SubNetwork
    from traces.progress import Progress

ERRORS_FILE = "output_errors.json"
DEFAULT_SCORE = "gate_mass"

app = typer.Typer(help="Small mixtures of experts, trained here, and parts of them.", no_args_is_help=True)
ModelFolder = Annotated[
    Path | None,
    typer.Argument(metavar="MODEL", help="Folder of a model; the reference model if left out.", show_default=False),
]


@app.command()
def train(
    recipe: Annotated[
        str, typer.Option(help="How to train: plain, larger_k, emoe, matryoshka or once_for_all.")
    ] = "plain",
    seed: Seed = 0,
    budget: Annotated[
        float | None, typer.Option(help="Seconds to train; 800 steps or 72 seconds if left out.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the model; one in your cache if left out.", show_default=False),
    ] = None,
    retrain: Annotated[bool, typer.Option(help="Train again even if the model is there.")] = False,
    json: Json = False,
) -> None:
    """Train a model, unless it is there, and say how good it is on held-out text. Stopped, it goes on when restarted.

    Without options it is the reference model.
    """
    import math

    from router.elastic import make_recipe
    from router.nn.store import trained_model
    from router.nn.train import Hyperparameters
    from traces.errors import InputError

    how = make_recipe(recipe)
    hyper = Hyperparameters(seed=seed)
    if budget is not None:
        if not 0 < budget < math.inf:
            raise InputError(f"--budget is {budget:g}; give seconds, more than 0")
        hyper = Hyperparameters(seed=seed, steps=None, limit_s=budget)
    with progress_bar("reference model" if how.name == "plain" else f"{how.name} model") as progress:
        progress(0.0, "looking into the cache" if out is None else f"looking into {out}")
        trained = trained_model(how, hyper=hyper, folder=out, retrain=retrain, progress=progress)
    if json:
        print_json(summary(trained))
        return
    print_table(
        f"{trained.spec.name} model {trained.key} in {trained.path}",
        ["held-out text", "loss, nats/byte"],
        [[domain, f"{loss:.3f}"] for domain, loss in trained.info["held_out"].items()],
    )


@app.command()
def extract(
    model: ModelFolder = None,
    depth: Annotated[int | None, typer.Option(help="Layers to keep.", show_default=False)] = None,
    experts: Annotated[int | None, typer.Option(help="Experts to keep in each layer.", show_default=False)] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts a token uses.", show_default=False)] = None,
    per_layer: Annotated[
        Path | None,
        typer.Option(help='JSON: {"layers": [0, 2], "top_k": [4, 1]}, and perhaps "experts".', show_default=False),
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="Score that experts are kept by: gate_mass (the default) or reap.")
    ] = None,
    domain: Annotated[
        str | None, typer.Option(help="Keep the experts that this domain's text needs.", show_default=False)
    ] = None,
    out: Out = Path("out"),
    json: Json = False,
) -> None:
    """Cut the part that matters most out of a model, without training, and say what it loses and saves."""
    from moeroute.cli import model_tables as tables
    from router.elastic.evaluation import compare
    from router.elastic.extract import extract as write_part
    from traces.errors import InputError

    if all(option is None for option in (depth, experts, top_k, per_layer)):
        raise InputError("nothing to cut; give --depth, --experts, --top-k or --per-layer")
    whole = load_from(model)
    with progress_bar("extracting") as progress:
        part = _chosen(
            whole, progress, depth=depth, experts=experts, top_k=top_k, per_layer=per_layer, by=by, domain=domain
        )
        progress(0.6, f"keeping {part.describe()}")
        cut = write_part(whole, part, out)
        progress(0.8, "measuring both on held-out text")
        comparison = compare(whole, cut)
        progress(1.0, "measured")
    if json:
        print_json({"key": cut.key, "path": str(cut.path), "by": by, "domain": domain, **comparison.to_json()})
        return
    tables.print_extraction(cut, comparison)
    say(f"wrote {out}")


@app.command(name="eval")
def eval_(
    model: ModelFolder = None,
    top_ks: Annotated[
        str | None, typer.Option(help="Experts a token to try, such as 1,2,4,8 (the default).", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Measure a model: loss by domain and by experts a token, size, CPU time, and a decode step as if deployed."""
    from moeroute.cli import model_tables as tables
    from router.elastic.evaluation import evaluate

    wanted = None if top_ks is None else _numbers("--top-ks", top_ks)
    trained = load_from(model)
    with progress_bar("measuring") as progress:
        evaluation = evaluate(trained, top_ks=wanted, progress=lambda done, message: progress(0.9 * done, message))
        progress(0.9, "a decode step, simulated")
        step = tables.deployed_step(trained)
        progress(1.0, "measured")
    if json:
        print_json(tables.evaluation_json(trained, evaluation, step))
    else:
        tables.print_evaluation(trained, evaluation, step)


@app.command()
def errors(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace of the reference model (Parquet).")],
    share: Annotated[float, typer.Option(help="Share of the trace's first requests to measure on.")] = 0.25,
    out: Out = Path("out"),
    json: Json = False,
) -> None:
    """Measure how far each layer's output lies off with fewer experts, for `output_errors` in a scenario."""
    from router.nn.output_error import measured_output_error
    from traces.batching import split_requests
    from traces.errors import InputError
    from traces.files import write_json
    from traces.store import read_trace

    if not 0 < share < 1:
        raise InputError(f"--share is {share:g}; use a share above 0 and below 1, so that later requests stay unseen")
    first, _ = split_requests(read_trace(trace), (share, 1 - share))
    error_LK = measured_output_error(load(), first)
    path = out / ERRORS_FILE
    document = {"output_error_LK": error_LK.tolist(), "tokens": first.tokens, "source": first.source}
    write_json(path, document)
    if json:
        print_json({"file": str(path), **document})
        return
    print_table(
        f"output error over the output's size, on {first.tokens} tokens of the first requests",
        ["layer", *(f"k={k}" for k in range(1, error_LK.shape[1] + 1))],
        [[str(layer), *(f"{error:.3f}" for error in error_K)] for layer, error_K in enumerate(error_LK)],
    )
    say(f"wrote {path}")


def load(*, retrain: bool = False) -> "TrainedModel":
    """The reference model, with a progress bar while it trains."""
    with progress_bar("reference model") as progress:
        progress(0.0, "looking into the cache")
        from router.nn.store import reference_model

        return reference_model(retrain=retrain, progress=progress)


def load_from(folder: Path | None) -> "TrainedModel":
    """The model in a folder; the reference model where none is named."""
    if folder is None:
        return load()
    from router.nn.store import load_model

    return load_model(folder)


def summary(reference: "TrainedModel") -> dict[str, Any]:
    """The model in JSON."""
    return {
        "key": reference.key,
        "path": str(reference.path),
        "trained_now": reference.trained_now,
        "spec": reference.spec.to_json(),
        **reference.info,
    }


def _chosen(
    whole: "TrainedModel",
    progress: "Progress",
    *,
    depth: int | None,
    experts: int | None,
    top_k: int | None,
    per_layer: Path | None,
    by: str | None,
    domain: str | None,
) -> "SubNetwork":
    """The part that the options ask for. Errors: `InputError` where they contradict each other."""
    from dataclasses import replace

    from router.elastic.extract import choose_part
    from router.elastic.importance import SCORES
    from router.elastic.per_layer import PerLayer
    from traces.errors import InputError

    score = next((score for score in SCORES if score == (by or DEFAULT_SCORE)), None)
    if score is None:
        raise InputError(f"--by is {by!r}; use {' or '.join(SCORES)}")
    file = PerLayer() if per_layer is None else PerLayer.read(per_layer)
    for option, value, listed in (
        ("--depth", depth, file.layers),
        ("--top-k", top_k, file.top_k),
        ("--experts", experts, file.experts),
    ):
        if value is not None and listed is not None:
            raise InputError(f"{option} is given, and {per_layer} says it too; give one of them")
    for option, name in (("--by", by), ("--domain", domain)):
        if name is not None and experts is None:
            raise InputError(f"{option} {name} chooses experts; say how many to keep with --experts")
    progress(0.0, "measuring what matters")
    part = choose_part(
        whole.model,
        whole.corpus,
        depth=depth,
        layers=file.layers,
        experts=experts,
        top_k=top_k if file.top_k is None else file.top_k,
        by=score,
        domain=domain,
    )
    return part if file.experts is None else replace(part, experts_LE=file.experts)


def _numbers(option: str, text: str) -> list[int]:
    from traces.errors import InputError

    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} is {text!r}; give whole numbers with commas between, such as 1,2,4") from error

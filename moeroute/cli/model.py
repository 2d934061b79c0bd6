"""`moeroute model`: the reference model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeroute.cli.console import Json, Out, print_json, print_table, progress_bar, say

if TYPE_CHECKING:
    from router.nn.store import TrainedModel

ERRORS_FILE = "output_errors.json"

app = typer.Typer(help="The reference model: a small mixture of experts, trained here.", no_args_is_help=True)


@app.command()
def train(
    retrain: Annotated[bool, typer.Option(help="Train again even if the model is in the cache.")] = False,
    json: Json = False,
) -> None:
    """Train the reference model, unless it is in the cache, and say how good it is on held-out text."""
    reference = load(retrain=retrain)
    if json:
        print_json(summary(reference))
        return
    losses = reference.info["held_out"]
    print_table(
        f"reference model {reference.key} in {reference.path}",
        ["held-out text", "loss, nats/byte"],
        [[domain, f"{loss:.3f}"] for domain, loss in losses.items()],
    )


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


def summary(reference: "TrainedModel") -> dict[str, Any]:
    """The model in JSON."""
    return {
        "key": reference.key,
        "path": str(reference.path),
        "trained_now": reference.trained_now,
        "spec": reference.spec.to_json(),
        **reference.info,
    }

"""`moeroute model`: the reference model."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeroute.cli.console import Json, print_json, print_table, progress_bar

if TYPE_CHECKING:
    from router.nn.store import ReferenceModel

app = typer.Typer(help="The reference model: a small mixture of experts, trained here.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `train` a subcommand."""


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


def load(*, retrain: bool = False) -> "ReferenceModel":
    """The reference model, with a progress bar while it trains."""
    with progress_bar("reference model") as progress:
        progress(0.0, "looking into the cache")
        from router.nn.store import reference_model

        return reference_model(retrain=retrain, progress=progress)


def summary(reference: "ReferenceModel") -> dict[str, Any]:
    """The model in JSON."""
    return {
        "key": reference.key,
        "path": str(reference.path),
        "trained_now": reference.trained_now,
        "spec": reference.spec.to_json(),
        **reference.info,
    }

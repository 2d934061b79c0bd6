"""`moeroute trace complete`: guess further candidates of a trace that recorded only the chosen experts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeroute.cli.console import Json, Out, Seed, print_json, print_table, say
from traces.errors import InputError

if TYPE_CHECKING:
    from traces.completion_error import Estimate, HiddenError
    from traces.trace import RoutingTrace

DEFAULT_FIT_SHARE = 0.4


def complete(
    file: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace file (Parquet).")],
    candidates: Annotated[int, typer.Option(help="Candidates a token, the recorded ones included.")] = 16,
    fit_on: Annotated[Path | None, typer.Option(help="Fit on this trace, of other requests of the same model.")] = None,
    fit_share: Annotated[
        float | None,
        typer.Option(help=f"Fit on this share of the first requests, write the others. Default: {DEFAULT_FIT_SHARE}."),
    ] = None,
    seed: Seed = 0,
    out: Out = Path("out"),
    json: Json = False,
) -> None:
    """Fit a model of unrecorded candidates on some requests, complete others, and say how far it can be trusted."""
    from moeroute.cli.trace import TRACE_FILE
    from traces.completion import complete as completed
    from traces.completion import fit_completion
    from traces.completion_error import hidden_error
    from traces.store import read_trace, write_trace

    path = out / TRACE_FILE
    for source in (file, fit_on):
        if source is not None and path.resolve() == source.resolve():
            raise InputError(f"{path}: would take the place of the trace that is read; give another folder with -o")
    trace = read_trace(file)
    if fit_on is not None and fit_share is not None:
        raise InputError(f"--fit-on {fit_on} and --fit-share {fit_share:g} exclude each other; give one")
    if fit_on is not None:
        plan = read_trace(fit_on)
    else:
        plan, trace = _first_requests(trace, DEFAULT_FIT_SHARE if fit_share is None else fit_share)
    fitted = fit_completion(plan)
    done = completed(trace, candidates=candidates, fitted_on=fitted, seed=seed)
    hidden = hidden_error(trace, fitted, seed=seed) if trace.candidates > 1 else None
    write_trace(path, done)
    if json:
        print_json(
            {
                "file": str(path),
                "source": done.source,
                "tokens": done.tokens,
                "recorded_candidates": done.recorded_candidates,
                "candidates": done.candidates,
                "fitted_tokens": plan.tokens,
                "hidden": None if hidden is None else hidden.to_json(),
            }
        )
        return
    if hidden is None:
        say("one recorded candidate a token: none can be hidden, so the error of the completion is not known")
    else:
        _print_hidden(hidden, plan.tokens)
    say(
        f"wrote {path}: {done.tokens} tokens, {candidates} candidates each, {done.recorded_candidates} of them recorded"
    )


def _first_requests(trace: "RoutingTrace", share: float) -> "tuple[RoutingTrace, RoutingTrace]":
    from traces.batching import split_requests

    if not 0 < share < 1:
        raise InputError(f"--fit-share is {share:g}; use a share above 0 and below 1")
    plan, others = split_requests(trace, (share, 1 - share))
    return plan, others


def _print_hidden(hidden: "HiddenError", fitted_tokens: int) -> None:
    """How often the hidden expert of rank k is found: all that a trace of k candidates can tell of those below."""

    def cell(estimate: "Estimate") -> str:
        if estimate.interval is None:
            return f"{estimate.mean:.3f}"
        return f"{estimate.mean:.3f} ({estimate.interval[0]:.3f} to {estimate.interval[1]:.3f})"

    print_table(
        f"expert of rank {hidden.rank}, hidden and guessed: {hidden.tokens} tokens of {hidden.requests} requests, "
        f"fitted on {fitted_tokens} tokens of others",
        ["", "completion (95% over requests)", "by popularity", "evenly"],
        [
            *(
                [f"among the {m} likeliest", cell(found), cell(hidden.popularity.recall[m]), f"{even:.3f}"]
                for (m, found), even in zip(
                    hidden.completion.recall.items(), hidden.uniform_recall.values(), strict=True
                )
            ),
            [
                "log loss, nats",
                cell(hidden.completion.log_loss),
                cell(hidden.popularity.log_loss),
                f"{hidden.uniform_log_loss:.3f}",
            ],
            *(
                [["score, mean abs error, share of mass", cell(hidden.score_error), "", ""]]
                if hidden.score_error is not None
                else []
            ),
        ],
    )
    say("ranks below are further from what was recorded: their order and the scale of their scores are extrapolations")

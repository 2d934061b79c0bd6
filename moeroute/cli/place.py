"""`moeroute place`: where experts should go, and whether moving them is worth it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from moeroute.cli.console import ANSWER_IS_NO, Json, Seed, print_json, progress_bar, say

if TYPE_CHECKING:
    from traces.trace import RoutingTrace
    from tuner.placing.answer import Answer
    from tuner.placing.serving_setup import ServingSetup

PLACEMENT_FILE, PAGE_FILE = "placement.json", "placement.html"
_TRACE_OPTIONS = (
    *("gpu", "costs", "weights", "phase", "tokens_per_rank", "kv_tokens_per_rank", "protocol", "replica_choice"),
    *("horizon", "model"),
)
_PANEL = "What the steps of a trace run on (with --trace only)"


def place(
    context: typer.Context,
    ranks: Annotated[int, typer.Option(help="Ranks that share the experts.")],
    loads: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Load counts: JSON whose "logical_count" has a list of experts for each layer, or such for each step.',
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A trace (Parquet, or npz with --model): what a step gains too.")
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(help="Nodes that the ranks lie on evenly; 1, or with --trace as many as the GPU's nodes are."),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(help="Expert slots over all ranks; if not given one an expert, rounded up."),
    ] = None,
    algorithm: Annotated[
        str, typer.Option(help="best, or one by name: an unknown one lists them. With --loads best balances tokens.")
    ] = "best",
    current: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="What runs now, ours or SGLang's (physical_to_logical_map); else contiguous."
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Move at most this share of the slots that run now.")
    ] = None,
    gone: Annotated[int | None, typer.Option(metavar="RANK", help="A rank that is lost: place on the others.")] = None,
    groups: Annotated[
        int | None,
        typer.Option(
            help="Groups of experts that a model routes to together, to be kept on nodes; "
            "if not given, --trace tries both with the model's own."
        ),
    ] = None,
    away_share: Annotated[
        float | None,
        typer.Option(help="With --groups: share of redundant slots that may leave the group's node."),
    ] = None,
    gpu: Annotated[str, typer.Option(help="GPU by its datasheet's name.", rich_help_panel=_PANEL)] = "h100_sxm",
    costs: Annotated[
        str | None,
        typer.Option(
            help="datasheet, or frameworks with measured kernels (sglang,trtllm); else all.", rich_help_panel=_PANEL
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Format of the experts' weights, if not the model's own.", rich_help_panel=_PANEL)
    ] = None,
    phase: Annotated[
        str, typer.Option(metavar="decode|prefill", help="What steps are.", rich_help_panel=_PANEL)
    ] = "decode",
    tokens_per_rank: Annotated[
        int | None,
        typer.Option(help="Tokens of a rank in a step; up to 64, as the trace fills steps.", rich_help_panel=_PANEL),
    ] = None,
    kv_tokens_per_rank: Annotated[
        int, typer.Option(help="Cached tokens of a rank; 0: what recorded positions say.", rich_help_panel=_PANEL)
    ] = 0,
    protocol: Annotated[
        str | None,
        typer.Option(help="per_expert, per_rank or per_node; by the phase if not given.", rich_help_panel=_PANEL),
    ] = None,
    replica_choice: Annotated[
        str,
        typer.Option(help="Which replica computes a token's pair; an unknown one lists them.", rich_help_panel=_PANEL),
    ] = "even",
    horizon: Annotated[
        int | None,
        typer.Option(
            help="Steps in which moving weights must pay; if not given, as many as vLLM rebalances after.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Shape of the model of an npz trace, by its preset's name.", rich_help_panel=_PANEL),
    ] = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help=f"Folder for {PLACEMENT_FILE} and {PAGE_FILE}; nothing is written without."),
    ] = None,
    json: Json = False,
) -> None:
    """Place experts: balance before and after, what a step gains by it, what must move, and whether it is worth it."""
    from moeroute.cli.place_tables import print_answer
    from traces.errors import InputError
    from tuner.placing.current import read_current
    from tuner.placing.request import HORIZON_STEPS, PlacingRequest

    if (loads is None) == (trace is None):
        raise InputError(f"{'neither' if loads is None else 'both'} of --loads and --trace; give one of them")

    if loads is not None:
        _refuse_trace_options(context)

    def request(default_nodes: int) -> PlacingRequest:
        return PlacingRequest(
            ranks=ranks,
            nodes=default_nodes if nodes is None else nodes,
            slots=slots,
            algorithm=algorithm,
            groups=groups,
            away_share=away_share,
            current_LS=None if current is None else read_current(current, ranks=ranks),
            budget_share=budget,
            gone=gone,
            horizon_steps=HORIZON_STEPS if horizon is None else horizon,
            seed=seed,
        )

    if loads is not None:
        from traces.loads import read_loads
        from tuner.placing.loads import place_by_loads

        answer = place_by_loads(request(1), read_loads(loads))
    else:
        assert trace is not None
        from tuner.placing.serving_setup import default_nodes
        from tuner.placing.trace import place_by_trace

        serving = _serving_setup(
            gpu=gpu,
            costs=tuple(costs.split(",")) if costs else (),
            weights=weights,
            phase=phase,
            tokens_per_rank=tokens_per_rank,
            kv_tokens_per_rank=kv_tokens_per_rank,
            protocol=protocol,
            replica_choice=replica_choice,
        )
        asked = request(default_nodes(gpu, ranks))
        with progress_bar("placing") as progress:
            answer = place_by_trace(asked, _read(trace, model), serving, progress)

    if out is not None:
        _write(out, answer)
    if json:
        print_json(answer.to_json())
    else:
        print_answer(answer)
        if out is None:
            say(f"the placement itself: --json, or -o FOLDER for {PLACEMENT_FILE} and {PAGE_FILE}")
    if not answer.worth_it:
        raise typer.Exit(ANSWER_IS_NO)


def _refuse_trace_options(context: typer.Context) -> None:
    """Raise `InputError` if an option was given that says nothing without a trace."""
    from traces.errors import InputError

    given = [name for name in _TRACE_OPTIONS if _is_given(context, name)]
    if given:
        raise InputError(f"--{given[0].replace('_', '-')} goes with --trace, not with --loads; leave it out")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _serving_setup(**fields: Any) -> "ServingSetup":
    """What a trace is simulated on; `InputError` where an option has a value that there is not."""
    from router.replicas import ReplicaChoice
    from sim.lower import Protocol
    from traces.batching import Phase
    from traces.errors import InputError
    from tuner.placing.serving_setup import ServingSetup

    for name, kind in (("phase", Phase), ("protocol", Protocol), ("replica_choice", ReplicaChoice)):
        known = get_args(kind)
        if fields[name] is not None and fields[name] not in known:
            raise InputError(f"--{name.replace('_', '-')} {fields[name]!r} is not known; use {', '.join(known)}")
    return ServingSetup(**fields)


def _read(path: Path, model: str | None) -> "RoutingTrace":
    """A trace as `moeroute trace` writes it, or an npz, which does not say what model it is of."""
    from traces.errors import InputError

    if path.suffix != ".npz":
        if model is not None:
            raise InputError(f"--model {model}: {path} says its model itself; leave out --model")
        from traces.store import read_trace

        return read_trace(path)
    if model is None:
        raise InputError(f"{path}: an npz does not say its model; give --model and its preset's name")
    from traces.formats.npz import import_npz
    from traces.presets import preset

    imported = import_npz(path, model=preset(model))
    if imported.skipped_tokens:
        say(f"{path}: skipped {imported.skipped_tokens} tokens that were padding")
    return imported.trace


def _write(out: Path, answer: "Answer") -> None:
    from traces.files import write_json
    from tuner.placement_html import write_placement_html

    write_json(out / PLACEMENT_FILE, answer.to_json())
    write_placement_html(out / PAGE_FILE, answer)
    say(f"wrote to {out}: {PLACEMENT_FILE}, {PAGE_FILE}")

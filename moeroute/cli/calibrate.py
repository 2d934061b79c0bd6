"""`moeroute calibrate`: measure this machine, or fit measured tables of GPUs, and show what came of it."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeroute.cli.console import Json, Out, RunDevice, print_json, print_table, progress_bar, say

if TYPE_CHECKING:
    from cost_models.kernel_profile import HeldOutError
    from cost_models.profile import Profile
    from cost_models.tables import Part, TableFile
    from traces.model import ModelSpec

PROFILE_FILE = "profile.json"

app = typer.Typer(help="Measure this machine, or fit measured tables of GPUs.", invoke_without_command=True)


@app.callback()
def calibrate(
    context: typer.Context,
    device: RunDevice = "cpu",
    ranks: Annotated[int, typer.Option(min=2, help="Processes that measure at once, one a GPU on cuda.")] = 2,
    trace: Annotated[Path | None, typer.Option(help="Calibrate for the model of this trace.")] = None,
    tables: Annotated[
        Path | None, typer.Option(help="Fit the measured tables of this folder instead of measuring this machine.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Fit this GPU only; without --tables, from the package of the extra silicon.")
    ] = None,
    framework: Annotated[str | None, typer.Option(help="Fit the kernels of this framework only.")] = None,
    version: Annotated[
        str | None, typer.Option(help="Version of the framework, of the extra silicon; the newest if not given.")
    ] = None,
    cv: Annotated[bool, typer.Option("--cv", help="Only print the errors on held-out rows; write nothing.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes that fit at once.")] = 2,
    out: Out = Path("out"),
    json: Json = False,
) -> None:
    """Measure this machine's MoE layer, or fit tables; say how far off the fit is on what it has not seen."""
    if context.invoked_subcommand is not None:
        return
    if tables is not None or gpu is not None:
        files, source = _find(tables, gpu, framework, version)
        parts = _read(files, keep_going=tables is None)
        if cv:
            _cross_validate(parts, processes, json)
        else:
            _fit(parts, source, processes, out, json)
        return
    if cv or framework or version:
        raise typer.BadParameter("--cv, --framework and --version go with --tables or --gpu")
    profile = measure(device, ranks, _model(trace))
    path = out / PROFILE_FILE
    profile.write(path)
    if json:
        print_json({"file": str(path), "mape": profile.mape, **profile.model_dump()})
        return
    print_profile(profile)
    say(f"wrote {path}")


@app.command()
def show(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="A profile of kernels or of this machine (JSON).")],
    out: Out = Path("out"),
    json: Json = False,
) -> None:
    """Write a page with a plot an operation: measured, fitted, residuals."""
    from cost_models.kernel_profile import KernelProfile, is_kernel_profile
    from cost_models.profile import Profile
    from traces.files import read_document
    from tuner.profile_html import write_kernel_profile_html, write_profile_html

    document = read_document(profile)
    page = out / f"{profile.stem}.html"
    if is_kernel_profile(document):
        kernels = KernelProfile.parse(document, profile)
        write_kernel_profile_html(page, kernels)
        if not json:
            _print_errors([(k.op, k.table, k.dtype, error) for k in kernels.kernels for error in k.errors])
    else:
        calibration = Profile.parse(document, profile)
        write_profile_html(page, calibration)
        if not json:
            print_profile(calibration)
    if json:
        print_json({"page": str(page), "profile": document})
        return
    say(f"wrote {page}")


def measure(device: str, ranks: int, model: "ModelSpec") -> "Profile":
    """Calibrate, with a line that says so."""
    from cost_models.microbench.ranks import require_device
    from router.nn.microbench import calibrate as measure_and_fit

    require_device(device, ranks)
    say(f"calibrating {ranks} ranks on {device}, about 20 s")
    profile, _ = measure_and_fit(model, ranks=ranks, device=device)
    return profile


def print_profile(profile: "Profile") -> None:
    """The errors of a profile as a table."""
    before_s, after_s = profile.probe_s
    print_table(
        f"{profile.device_name}, {profile.ranks} ranks: error on sizes that were not fitted "
        f"(load average {profile.load_average:.1f}, drift {after_s / before_s - 1:+.0%})",
        ["operation", "mean error", "median error", "sizes"],
        [
            [name, f"{error.mape:.1%}", f"{error.median_ape:.1%}", str(error.cases)]
            for name, error in profile.errors.items()
        ]
        + [["all", f"{profile.mape:.1%}", "", str(sum(error.cases for error in profile.errors.values()))]],
    )


def _find(
    tables: Path | None, gpu: str | None, framework: str | None, version: str | None
) -> tuple[list["TableFile"], str]:
    """The tables to fit, and where they are from in words."""
    from cost_models.silicon import find_silicon, installed_tables, package_name
    from cost_models.tables import choose_tables, find_tables, source_of

    if tables is None:
        assert gpu is not None
        return find_silicon(installed_tables(), gpu, framework=framework, version=version), package_name()
    if version is not None:
        raise typer.BadParameter(
            "--version goes with the extra silicon; the tables of a folder are of one version each"
        )
    files = choose_tables(find_tables(tables), gpu=gpu, framework=framework)
    return files, source_of(files[0])


def _read(files: "list[TableFile]", *, keep_going: bool) -> "list[Part]":
    """The parts of all tables; what is left out is said. `keep_going`: one odd table does not stop the others."""
    from cost_models.fit_tables import can_hold_out
    from cost_models.tables import read_parts
    from traces.errors import InputError

    parts = []
    for file in files:
        try:
            read = read_parts(file)
        except InputError as error:
            if not keep_going:
                raise
            say(f"left out: {error}")
            continue
        for part in read:
            if can_hold_out(part):
                parts.append(part)
            else:
                say(f"left out: {part.path}: {part.op} in {part.dtype} has one shape only: nothing could be held out")
    if not parts:
        raise InputError(f"nothing to fit in {files[0].path.parent}; see what was left out")
    return parts


def _cross_validate(parts: "list[Part]", processes: int, json: bool) -> None:
    from cost_models.fit_tables import errors_of_part, in_parallel

    with progress_bar("holding out") as progress:
        evaluated = in_parallel(errors_of_part, parts, processes, progress)
    if json:
        print_json(
            {
                "tables": [
                    _row(part.table, part.op, part.device.name, part.framework, part.dtype, error)
                    for part, errors in evaluated
                    for error in errors
                ]
            }
        )
        return
    _print_errors([(part.op, part.table, part.dtype, error) for part, errors in evaluated for error in errors])


def _fit(parts: "list[Part]", source: str, processes: int, out: Path, json: bool) -> None:
    from cost_models.fit_tables import fit_profiles

    with progress_bar("fitting") as progress:
        profiles = fit_profiles(parts, source=source, processes=processes, progress=progress)
    for profile in profiles:
        profile.write(out / profile.file_name)
    if json:
        print_json(
            {
                "profiles": [str(out / profile.file_name) for profile in profiles],
                "tables": [
                    _row(k.table, k.op, p.gpu, k.framework, k.dtype, error)
                    for p in profiles
                    for k in p.kernels
                    for error in k.errors
                ],
            }
        )
        return
    _print_errors([(k.op, k.table, k.dtype, error) for p in profiles for k in p.kernels for error in k.errors])
    for profile in profiles:
        say(f"wrote {out / profile.file_name}: {len(profile.kernels)} kernels")


def _row(table: str, op: str, gpu: str, framework: str, dtype: str, error: "HeldOutError") -> dict[str, Any]:
    return {"table": table, "op": op, "gpu": gpu, "framework": framework, "dtype": dtype, **error.model_dump()}


def _print_errors(rows: "Iterable[tuple[str, str, str, HeldOutError]]") -> None:
    print_table(
        "absolute error on rows that were held out",
        [
            "operation",
            "held out",
            "rows",
            "median",
            "mean",
            "p90",
            "in 90% interval",
            "mean, ≤ 8 tokens",
            "physics",
            "roofline",
        ],
        [
            [
                f"{op} {dtype} ({table})",
                error.holdout,
                f"{error.rows:,}",
                f"{error.median_ape:.1%}",
                f"{error.mape:.1%}",
                f"{error.p90_ape:.1%}",
                f"{error.coverage90:.1%}",
                "" if error.mape_le8_tokens is None else f"{error.mape_le8_tokens:.1%}",
                f"{error.physics_median_ape:.1%}",
                f"{error.roofline_median_ape:.1%}",
            ]
            for op, table, dtype, error in rows
        ],
    )
    say("physics: the median of the physical model alone; roofline: of the datasheet's bound")


def _model(trace: Path | None) -> "ModelSpec":
    if trace is None:
        from router.nn.lm import LanguageModel, LanguageModelConfig

        return LanguageModel(LanguageModelConfig()).spec()
    from traces.store import read_trace

    return read_trace(trace).model

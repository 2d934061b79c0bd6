"""`moeroute calibrate`: measure this machine and fit a profile."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeroute.cli.console import Json, Out, RunDevice, print_json, print_table, say

if TYPE_CHECKING:
    from cost_models.profile import Profile
    from traces.model import ModelSpec

PROFILE_FILE = "profile.json"


def calibrate(
    device: RunDevice = "cpu",
    ranks: Annotated[int, typer.Option(min=2, help="Processes that measure at once, one a GPU on cuda.")] = 2,
    trace: Annotated[Path | None, typer.Option(help="Calibrate for the model of this trace.")] = None,
    out: Out = Path("out"),
    json: Json = False,
) -> None:
    """Measure every operation of a MoE layer, fit a profile, and say how far off it is on sizes it did not fit."""
    profile = measure(device, ranks, _model(trace))
    path = out / PROFILE_FILE
    profile.write(path)
    if json:
        print_json({"file": str(path), "mape": profile.mape, **profile.model_dump()})
        return
    print_profile(profile)
    say(f"wrote {path}")


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


def _model(trace: Path | None) -> "ModelSpec":
    if trace is None:
        from router.nn.lm import LanguageModel, LanguageModelConfig

        return LanguageModel(LanguageModelConfig()).spec()
    from traces.store import read_trace

    return read_trace(trace).model

"""`moeroute validate`: run the winners for real."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeroute.cli.console import (
    ANSWER_IS_NO,
    Json,
    Out,
    RunDevice,
    ScenarioFile,
    print_json,
    print_table,
    progress_bar,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from router.nn.store import TrainedModel
    from tuner.elastic import ElasticReplays
    from tuner.replays import Replays
    from tuner.study import StudyResult
    from tuner.validate import Contender, Validation

VALIDATION_FILE = "validation.json"
DEFAULT_ROUNDS = 40
_RANDOM_CONFIGS = 7


def validate(
    scenario: ScenarioFile,
    study: Annotated[Path, typer.Option(help="The study.json that moeroute tune wrote.")] = Path("out/study.json"),
    device: RunDevice = "cpu",
    rounds: Annotated[int, typer.Option(min=4, help="Times that each config runs.")] = DEFAULT_ROUNDS,
    out: Out = Path("out"),
    json: Json = False,
) -> None:
    """Run baseline, winners and random configs on real ranks, beside what was predicted. Exit code 1: not faster."""
    from cost_models.microbench.ranks import require_device
    from moeroute.cli.model import load
    from moeroute.cli.tune import open_replays
    from traces.files import write_json
    from tuner.elastic import ElasticReplays
    from tuner.scenario import read_scenario
    from tuner.study import StudyResult

    replays = open_replays(read_scenario(scenario))
    require_device(device, replays.cluster.ranks)
    contenders = contenders_of(replays, StudyResult.read(study))
    reference = replays.whole if isinstance(replays, ElasticReplays) else load()
    validation = run(replays, contenders, reference, device=device, rounds=rounds)
    write_json(out / VALIDATION_FILE, validation.to_json())
    if json:
        print_json(validation.to_json())
    else:
        print_validation(validation)
        say(f"wrote {out / VALIDATION_FILE}")
    if not validation.confirmed:
        raise typer.Exit(ANSWER_IS_NO)


def contenders_of(replays: "Replays | ElasticReplays", study: "StudyResult") -> "list[Contender]":
    """The configs to validate: the scenario's baseline, the study's winners, and some of its space at random."""
    from tuner.validate import choose_contenders

    scenario = replays.scenario
    return choose_contenders(scenario.config, study, scenario.study.space, random=_RANDOM_CONFIGS, seed=scenario.seed)


def run(
    replays: "Replays | ElasticReplays",
    contenders: "Sequence[Contender]",
    reference: "TrainedModel",
    *,
    device: str,
    rounds: int,
) -> "Validation":
    """Validate the contenders, with a progress bar."""
    from tuner.costs import calibration
    from tuner.validate import validate as run_contenders

    with progress_bar("validating") as progress:
        return run_contenders(
            replays,
            contenders,
            reference,
            device=device,
            rounds=rounds,
            profile=calibration(replays.scenario),
            progress=progress,
        )


def print_validation(validation: "Validation") -> None:
    """Predicted beside measured."""
    from cost_models.units import human_seconds

    by_loss = validation.study_loss_against_loss is not None
    print_table(
        f"real run on {validation.ranks} {validation.device} ranks, {validation.rounds} rounds, "
        f"load average {validation.load_average:.1f}",
        [
            "config",
            "step predicted",
            "measured",
            "speed-up predicted",
            "measured [95%]",
            *([] if by_loss else ["gate mass"]),
            "loss, nats/byte [95%]",
        ],
        [
            [
                f"{run.name}: {run.config}",
                human_seconds(run.predicted_step_s),
                human_seconds(run.measured_step_s),
                f"{run.speedup_predicted:.2f}x",
                f"{run.speedup_measured:.2f}x [{run.speedup_ci[0]:.2f}, {run.speedup_ci[1]:.2f}]",
                *([] if by_loss else [f"{run.gate_mass:.1%}"]),
                f"{run.loss:.3f}"
                if run.role == "baseline"
                else f"{run.loss_delta:+z.3f} [{run.loss_delta_ci[0]:+z.3f}, {run.loss_delta_ci[1]:+z.3f}]",
            ]
            for run in validation.runs
        ],
    )
    drift = "" if validation.drift is None else f"; the probe takes {validation.drift:.2f}x what it took to calibrate"
    print(
        f"predicted against measured: mean error {validation.mape:.1%}, "
        f"rank correlation {validation.spearman:.3f} over {len(validation.runs)} configs{drift}"
    )
    if validation.gate_mass_against_loss is not None:
        print(f"gate mass lost against held-out loss: rank correlation {validation.gate_mass_against_loss:.3f}")
    if validation.study_loss_against_loss is not None:
        print(f"the study's loss against that on other text: rank correlation {validation.study_loss_against_loss:.3f}")
    print(validation.verdict)

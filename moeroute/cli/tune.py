"""`moeroute tune`: search a scenario's space."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeroute.cli.console import Json, Out, ScenarioFile, print_json, print_table, progress_bar, say

if TYPE_CHECKING:
    from tuner.elastic import ElasticReplays
    from tuner.replays import Replays
    from tuner.scenario import Scenario
    from tuner.study import StudyResult, Trial

JOURNAL_FILE, STUDY_FILE = "study.journal", "study.json"


def tune(
    scenario: ScenarioFile,
    out: Out = Path("out"),
    trials: Annotated[int | None, typer.Option(min=1, help="Trials in all, in place of the scenario's.")] = None,
    json: Json = False,
) -> None:
    """Search for the front of step time against gate mass kept, or against the loss of a model that the scenario names.

    Stopped and started again, it goes on.
    """
    from tuner.scenario import read_scenario

    read = read_scenario(scenario)
    if trials is not None:
        read = read.model_copy(update={"study": read.study.model_copy(update={"trials": trials})})
    study = search(open_replays(read), out)
    if json:
        print_json({"found_before": study.found_before, **study.to_json()})
        return
    print_front(study)
    say(f"wrote {out / STUDY_FILE}; validate it with moeroute validate {scenario} --study {out / STUDY_FILE}")


def open_replays(scenario: "Scenario") -> "Replays | ElasticReplays":
    """The scenario made ready; torch is loaded only for one that has an elastic model."""
    if scenario.elastic is not None:
        from tuner.elastic import ElasticReplays

        return ElasticReplays.of(scenario)
    from tuner.replays import Replays

    return Replays.of(scenario)


def search(replays: "Replays | ElasticReplays", out: Path) -> "StudyResult":
    """Run or go on with the study whose journal is in `out`, and write what it found there."""
    from traces.files import write_json
    from tuner.identity import study_identity
    from tuner.study import tune as run_study

    with progress_bar("tuning") as progress:
        progress(0.0, "making ready")
        study = run_study(
            replays.scenario,
            lambda config: replays.run(config)[0],
            journal=out / JOURNAL_FILE,
            identity=study_identity(replays),
            loss=replays.study_loss,
            progress=lambda done, total, what: progress(done / total, what),
        )
    if study.found_before:
        say(f"{study.found_before} of {len(study.trials)} trials were already in {out / JOURNAL_FILE}")
    write_json(out / STUDY_FILE, study.to_json())
    return study


def print_front(study: "StudyResult") -> None:
    """The front beside the baseline."""
    from cost_models.units import human_seconds

    baseline = study.trials[0]
    quality, column = ("loss", "loss, nats/byte") if study.by_loss else ("gate mass kept", "gate mass")
    print_table(
        f"front of {len(study.trials)} trials: predicted step time against {quality}",
        ["config", "step", "speed-up", column, "experts/token"],
        [
            [
                ("baseline: " if trial is baseline else "") + trial.config.describe(),
                human_seconds(trial.step_s),
                f"{baseline.step_s / trial.step_s:.2f}x",
                _quality(trial, baseline),
                f"{trial.report['experts_per_token']:.2f}",
            ]
            for trial in (baseline, *(t for t in study.front if t is not baseline))
        ],
    )


def _quality(trial: "Trial", baseline: "Trial") -> str:
    if trial.loss is None or baseline.loss is None:
        return f"{trial.gate_mass:.1%}"
    return f"{trial.loss:.3f}" + ("" if trial is baseline else f" ({trial.loss / baseline.loss - 1:+z.1%})")

"""`moeroute demo`: the main job, end to end, on this machine."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeroute.cli import calibrate, simulate, trace, tune, validate
from moeroute.cli import model as model_command
from moeroute.cli.console import ANSWER_IS_NO, Json, Out, RunDevice, Seed, print_json, say

if TYPE_CHECKING:
    from cost_models.profile import Profile
    from tuner.replays import Replays
    from tuner.study import StudyResult
    from tuner.validate import Validation

_SCENARIO = Path(__file__).parent.parent / "demo.yaml"
_STAGES = 6


def demo(
    out: Out = Path("out/demo"),
    device: RunDevice = "cpu",
    rounds: Annotated[int, typer.Option(min=4, help="Times that each config runs for real.")] = validate.DEFAULT_ROUNDS,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Record a real model's routing, calibrate this machine, tune a policy on the simulator, prove it on a real run."""
    from cost_models.microbench.ranks import require_device
    from router.nn.record import record
    from sim.replay import rows_by_rank
    from sim.timeline import write_chrome_trace
    from traces.files import write_json, write_text
    from traces.stats import trace_stats
    from traces.store import write_trace
    from tuner.clusters import make_cluster
    from tuner.html import ReportPage, write_html
    from tuner.replays import Replays
    from tuner.scenario import read_scenario

    start = time.monotonic()
    scenario_path = out / "scenario.yaml"
    write_text(scenario_path, _SCENARIO.read_text(encoding="utf-8") + f"seed: {seed}\n")
    scenario = read_scenario(scenario_path)
    ranks = make_cluster(scenario).ranks
    require_device(device, ranks)

    _stage(1, "reference model: a byte-level mixture of experts, trained once and kept in the cache")
    reference = model_command.load()

    _stage(2, "record: its routing of held-out text")
    recorded = record(reference, tokens=trace.DEFAULT_TOKENS, seed=seed)
    write_trace(out / trace.TRACE_FILE, recorded)
    stats = trace_stats(recorded)
    if not json:
        trace.print_stats(recorded, stats)

    _stage(3, "calibrate: what this machine takes for each operation")
    profile = calibrate.measure(device, ranks, recorded.model)
    profile.write(out / calibrate.PROFILE_FILE)
    if not json:
        calibrate.print_profile(profile)

    _stage(4, "simulate: the baseline on the simulated cluster")
    replays = Replays.of(scenario)
    bound, _, _ = replays.run(scenario.config, fidelity="analytic")
    baseline, _, _ = replays.run(scenario.config)
    if not json:
        simulate.print_report(baseline, bound)

    _stage(5, "tune: the front of step time against gate mass kept")
    (out / tune.JOURNAL_FILE).unlink(missing_ok=True)  # an earlier demo's, which stood on another calibration
    study = tune.search(replays, out)
    if not json:
        tune.print_front(study)

    _stage(6, "validate: baseline, winners and random configs as a real expert-parallel run")
    contenders = validate.contenders_of(replays, study)
    validation = validate.run(replays, contenders, reference, device=device, rounds=rounds)
    shown = [contender for contender in contenders if contender.name in ("baseline", validation.best)]
    replayed = {c.name: replays.run(c.config, window="validate", fidelity="event") for c in shown}
    result = result_of(replays, profile, study, validation)
    write_json(out / validate.VALIDATION_FILE, validation.to_json())
    write_json(out / "result.json", result)
    write_chrome_trace(out / "timeline.json", {name: timelines[0] for name, (_, timelines, _) in replayed.items()})
    write_html(
        out / "report.html",
        ReportPage(
            title="moeroute: " + scenario.name,
            scenario=_in_words(replays),
            trace=stats,
            study=study,
            validation=validation,
            loads_LE=recorded.loads_LE(),
            rank_rows_LG={name: rows_by_rank(works) for name, (_, _, works) in replayed.items()},
            profile=profile,
            baseline=baseline,
        ),
    )
    if json:
        print_json(result)
    else:
        validate.print_validation(validation)
    say(f"wrote report.html, timeline.json (open it in ui.perfetto.dev) and result.json into {out}")
    say(f"done in {time.monotonic() - start:.0f} s")
    if not validation.confirmed:
        raise typer.Exit(ANSWER_IS_NO)


def _in_words(replays: "Replays") -> tuple[str, ...]:
    scenario, model = replays.scenario, replays.trace.model
    return (
        f"Trace: {replays.trace.source}, {replays.trace.tokens:,} tokens.",
        (
            f"Model: {model.layers} MoE layers of {model.experts} experts, top {model.top_k}, "
            f"hidden size {model.hidden}, expert size {model.expert_hidden}."
        ),
        (
            f"Cluster: {replays.cluster.name}, "
            f"{scenario.batch.tokens_per_rank} {scenario.batch.phase} tokens a rank and step."
        ),
        f"Baseline: {scenario.config.describe()}.",
    )


def _stage(number: int, what: str) -> None:
    say(f"\n[{number}/{_STAGES}] {what}")


def result_of(replays: "Replays", profile: "Profile", study: "StudyResult", validation: "Validation") -> dict[str, Any]:
    """The demo's result.json: what was recorded, how well the machine is known, what was found, whether it is true."""
    model = replays.trace.model
    return {
        "trace": {
            "tokens": replays.trace.tokens,
            "layers": model.layers,
            "experts": model.experts,
            "top_k": model.top_k,
        },
        "calibration": {
            "mape": profile.mape,
            "errors": {name: error.model_dump() for name, error in profile.errors.items()},
            "load_average": profile.load_average,
        },
        "study": {
            "trials": len(study.trials),
            "front": [
                {
                    "number": trial.number,
                    "config": trial.config.describe(),
                    "step_s": trial.step_s,
                    "gate_mass": trial.gate_mass,
                }
                for trial in study.front
            ],
        },
        "validation": validation.to_json(),
    }

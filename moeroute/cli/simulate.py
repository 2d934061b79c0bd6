"""`moeroute simulate`: replay a scenario's trace on its cluster."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeroute.cli.console import Json, Out, ScenarioFile, interval_in_words, print_json, print_table, say

if TYPE_CHECKING:
    from sim.report import Report


def simulate(scenario: ScenarioFile, out: Out = Path("out"), json: Json = False) -> None:
    """Replay the trace under the scenario's own config: step time, where it goes, and what was kept."""
    from sim.timeline import write_chrome_trace
    from traces.files import write_json
    from tuner.replays import Replays
    from tuner.scenario import read_scenario

    replays = Replays.of(read_scenario(scenario))
    config = replays.scenario.config
    bound, _, _ = replays.run(config, fidelity="analytic")
    report, timelines, _ = replays.run(config, fidelity="event", intervals=True)
    write_chrome_trace(out / "timeline.json", {report.name: timelines[0]})
    document = {"event": report.to_json(), "analytic": bound.to_json()}
    write_json(out / "report.json", document)
    if json:
        print_json(document)
        return
    print_report(report, bound)
    say(f"wrote {out / 'report.json'} and {out / 'timeline.json'} (open it in ui.perfetto.dev)")


def print_report(report: "Report", bound: "Report") -> None:
    """A replay as tables."""
    from cost_models.units import GB, human_seconds

    memory = report.memory
    capacity = "" if memory.capacity_bytes is None else f" of {memory.capacity_bytes / GB:.4g} GB"
    rows: list[tuple[str, Any]] = [
        ("step time, event simulation", human_seconds(report.step_s)),
        ("with all costs at the ends of their 90% intervals", interval_in_words(report) or "no intervals"),
        ("step time, analytic lower bound", human_seconds(bound.step_s)),
        ("tokens/s", f"{report.tokens_per_s:,.0f}"),
        ("tokens/s per rank", f"{report.tokens_per_s_per_rank:,.0f}"),
        ("busiest rank's rows over the mean rank's", f"{report.token_imbalance:.3f}"),
        ("busiest rank's active experts over the mean's", f"{report.active_imbalance:.3f}"),
        ("experts a token", f"{report.experts_per_token:.2f}"),
        ("gate mass kept", f"{report.gate_mass:.1%}"),
        ("pairs dropped", f"{report.dropped_share:.1%}"),
        ("bytes between ranks, a step", f"{report.network_bytes_per_step:,.0f}"),
        ("memory of a rank", f"{memory.total_bytes / GB:.4g} GB{capacity}{'' if memory.fits else ': does not fit'}"),
    ]
    print_table(f"{report.name}, {report.costs}, {report.steps} steps", ["", ""], [[a, str(b)] for a, b in rows])
    print_table(
        "where a step goes, mean rank",
        ["stage", "time", "share", "beyond what was measured"],
        [
            [
                stage,
                human_seconds(seconds),
                f"{seconds / report.step_s:.1%}",
                f"{beyond:.0%}" if (beyond := report.extrapolated.get(stage)) else "",
            ]
            for stage, seconds in {**report.stage_s, "waiting for other ranks": report.waiting_s}.items()
        ],
    )

"""`moeroute simulate`: replay scenarios' traces on their clusters, one alone or several side by side."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from moeroute.cli.console import ANSWER_IS_NO, Json, Out, interval_in_words, print_json, print_table, progress_bar, say

if TYPE_CHECKING:
    from cost_models.cluster import Cluster
    from sim.memory import MemoryUse
    from sim.report import Report
    from sim.timeline import Timeline
    from traces.progress import Progress
    from traces.trace import RoutingTrace
    from tuner.replays import Replays
    from tuner.scenario import Scenario
    from tuner.simulated import SimulatedScenario

REPORT_FILE, TIMELINE_FILE, PAGE_FILE = "report.json", "timeline.json", "report.html"
_TIERS = {"scale_up": "inside nodes", "scale_out": "between nodes"}
_PARTS = ("attention", "gate", "dispatch", "experts", "combine", "other")
_COMPLETED = "candidates beyond the recorded ones"
# Shares that are zero under most policies, and shown only where they are not.
_SELDOM: "dict[str, Callable[[Report], float]]" = {
    "pairs rerouted": lambda report: report.rerouted_share,
    "rows of padding": lambda report: report.padding_share,
}
_SHOWN_RANKS = 4  # critical ranks by name; the others are counted


def simulate(
    scenarios: Annotated[list[Path], typer.Argument(metavar="SCENARIO", help="Scenario files (YAML).")],
    out: Out = Path("out"),
    compare: Annotated[bool, typer.Option("--compare", help="Set two scenarios or more side by side.")] = False,
    draw: Annotated[bool, typer.Option("--draw", help="Draw the cluster: cluster.svg.")] = False,
    degrade: Annotated[
        list[str] | None,
        typer.Option(metavar="WHAT=HOW", help="Slow or lost from the start: gpu3=0.8, nic5-leaf5=0.5, rank7=lost."),
    ] = None,
    fail: Annotated[
        list[str] | None,
        typer.Option(metavar="WHAT=HOW@SECONDS", help="The same in the middle of each step: rank7=lost@0.012."),
    ] = None,
    overlap: Annotated[
        str | None,
        typer.Option(metavar="none|single_batch|two_batch", help="What overlaps, in place of the scenario's own."),
    ] = None,
    html: Annotated[bool, typer.Option(help="Write report.html too.")] = True,
    json: Json = False,
) -> None:
    """Replay traces under their scenarios' own configs: step time, where it goes, and what was kept."""
    from sim.timeline import write_chrome_trace
    from traces.files import write_json
    from tuner.scenario import read_scenario

    if compare != (len(scenarios) > 1):
        raise typer.BadParameter(
            "--compare needs two scenarios or more" if compare else "several scenarios need --compare"
        )
    read = [changed(read_scenario(path), degrade or (), fail or (), overlap) for path in scenarios]
    runs = _run_all(names_of(read, scenarios), read, html=html)

    document = {run.name: run.document for run in runs} if compare else runs[0].document
    write_json(out / REPORT_FILE, document)
    write_chrome_trace(out / TIMELINE_FILE, {run.name if compare else run.report.name: run.timeline for run in runs})
    written = [REPORT_FILE, f"{TIMELINE_FILE} (open it in ui.perfetto.dev)"]
    for stale in (out / PAGE_FILE, *out.glob("cluster*.svg")):  # of an earlier run, which this one does not describe
        stale.unlink(missing_ok=True)
    if html:
        from tuner.simulation_html import write_simulation_html

        write_simulation_html(out / PAGE_FILE, [run.shown for run in runs if run.shown is not None])
        written.append(PAGE_FILE)
    if draw:
        written += _draw([run.cluster for run in runs], out)

    if json:
        print_json(document)
    elif compare:
        print_comparison(runs)
    else:
        run = runs[0]
        faults = ", ".join(run.scenario.disturbance.faults)
        print_report(run.report, run.bound, {"cluster": run.cluster.name} | ({"faults": faults} if faults else {}))
    say(f"wrote to {out}: {', '.join(written)}")
    for run in runs:
        for fault in run.too_late:
            say(f"fault {fault} never came: {run.name} ends at {max(run.report.step_s_by_step):.4g} s")
    too_large = [run for run in runs if not run.report.memory.fits]
    for run in too_large:
        say(f"{run.name + ' ' if compare else ''}{does_not_fit(run.report.memory, run.scenario)}")
    if too_large:
        raise typer.Exit(ANSWER_IS_NO)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One scenario, simulated: `report` of the events, `bound` of the closed form, `timeline` of the first step."""

    name: str
    scenario: "Scenario"
    cluster: "Cluster"
    report: "Report"
    bound: "Report"
    timeline: "Timeline"
    shown: "SimulatedScenario | None"

    @property
    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "scenario": self.name,
            "cluster": self.cluster.name,
            "faults": list(self.scenario.disturbance.faults),
            "event": self.report.to_json(),
            "analytic": self.bound.to_json(),
        }

    @property
    def too_late(self) -> list[str]:
        """Faults that came when every step had ended."""
        from sim.faults import Fault

        last_s = max(self.report.step_s_by_step)
        return [fault for fault in self.scenario.disturbance.faults if Fault.parse(fault).at_s >= last_s]


def changed(scenario: "Scenario", degrade: Sequence[str], fail: Sequence[str], overlap: str | None) -> "Scenario":
    """The scenario with what the command line adds to it; `InputError` names an overlap that is none."""
    from sim.execution import Overlap
    from traces.errors import InputError

    if overlap not in (None, *get_args(Overlap)):
        raise InputError(f"--overlap {overlap!r} is not known; use {', '.join(get_args(Overlap))}")
    cluster, disturbance, execution = scenario.cluster, scenario.disturbance, scenario.execution
    return scenario.model_copy(
        update={
            "cluster": cluster.model_copy(update={"degrade": [*cluster.degrade, *degrade]}),
            "disturbance": disturbance.model_copy(update={"faults": [*disturbance.faults, *fail]}),
            "execution": execution if overlap is None else execution.model_copy(update={"overlap": overlap}),
        }
    )


def names_of(scenarios: Sequence["Scenario"], paths: Sequence[Path]) -> list[str]:
    """A name for each scenario: its own, or where names repeat its file's stem, or its path, or its place."""
    ways: tuple[Callable[[int], str], ...] = (
        lambda place: scenarios[place].name,
        lambda place: paths[place].stem,
        lambda place: str(paths[place]),
    )
    for way in ways:
        names = [way(place) for place in range(len(scenarios))]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({place})" for place, path in enumerate(paths, 1)]


def _run_all(names: Sequence[str], scenarios: Sequence["Scenario"], *, html: bool) -> list[Run]:
    """Simulate one after the other, once each was found to fit together."""
    traces: dict[Any, RoutingTrace] = {}
    with progress_bar("simulating") as progress:
        waiting = [
            _replays_of(scenario, traces, prefix=f"{name}: " if len(names) > 1 else "")
            for name, scenario in zip(names, scenarios, strict=True)
        ]
        return [
            _run(name, waiting.pop(0), html=html, progress=_part_of(progress, place, names))
            for place, name in enumerate(names)
        ]


def _replays_of(scenario: "Scenario", traces: "dict[Any, RoutingTrace]", *, prefix: str) -> "Replays":
    """Ready to run, with one of the `traces` so far if it is the same, which spares its making.

    `InputError`, after `prefix`, where something does not fit or a fault hits nothing.
    """
    from traces.errors import InputError
    from tuner.replays import Replays, load_trace

    if scenario.elastic is not None:
        return _of_part(scenario, prefix=prefix)
    same = (scenario.trace, scenario.batch.phase, scenario.seed)
    try:
        if same not in traces:
            traces[same] = load_trace(scenario)
        replays = Replays.of(scenario, traces[same])
    except InputError as error:
        raise InputError(f"{prefix}{error}") from error
    return replays


def _of_part(scenario: "Scenario", *, prefix: str) -> "Replays":
    """Ready to run the part of the scenario's model that its config names. Only here simulating loads torch."""
    from traces.errors import InputError
    from tuner.elastic import ElasticReplays

    try:
        elastic = ElasticReplays.of(scenario)
        return elastic.for_config(elastic.given.config)
    except InputError as error:
        raise InputError(f"{prefix}{error}") from error


def _run(name: str, replays: "Replays", *, html: bool, progress: "Progress") -> Run:
    config = replays.scenario.config
    progress(0.0, "the analytic bound")
    bound, _, _ = replays.run(config, fidelity="analytic")
    progress(0.1, "events, and both ends of the intervals")
    report, timelines, works = replays.run(config, fidelity="event", intervals=True)
    shown = None
    if html:
        from tuner.simulated import SimulatedScenario

        progress(0.9, "the page")
        shown = SimulatedScenario.of(name, replays, report, bound, timelines, works)
    return Run(
        name=name,
        scenario=replays.scenario,
        cluster=replays.cluster,
        report=report,
        bound=bound,
        timeline=timelines[0],
        shown=shown,
    )


def _part_of(progress: "Progress", place: int, names: Sequence[str]) -> "Progress":
    """The progress of one scenario of several."""
    of = f"{names[place]}: " if len(names) > 1 else ""
    return lambda done, message: progress((place + done) / len(names), of + message)


def _draw(clusters: Iterable["Cluster"], out: Path) -> list[str]:
    """Write a picture of each cluster that looks different; the files' names."""
    from traces.files import write_text
    from tuner.cluster_svg import cluster_svg

    pictures = list(dict.fromkeys(cluster_svg(cluster) for cluster in clusters))
    files = ["cluster.svg", *(f"cluster-{number}.svg" for number in range(2, len(pictures) + 1))]
    for file, picture in zip(files, pictures, strict=True):
        write_text(out / file, picture)
    return files


def does_not_fit(memory: "MemoryUse", scenario: "Scenario") -> str:
    """What a rank would have to hold, what it can hold, and what would make it less."""
    from cost_models.units import GB

    assert memory.capacity_bytes is not None
    cheaper_cache = "" if scenario.execution.kv_dtype == "fp8" else " or execution.kv_dtype: fp8"
    smaller_buffers = " or protocol: per_rank" if scenario.protocol == "per_expert" else ""
    redundant = scenario.config.placement.redundant_slots
    mends = {
        "expert_bytes": "fewer redundant slots" if redundant else "weights of fewer bits",
        "other_weight_bytes": "a larger layout.attention_tensor",
        "kv_cache_bytes": f"fewer cached tokens{cheaper_cache}",
        "buffer_bytes": f"a smaller batch.tokens_per_rank{smaller_buffers}",
    }
    parts = {name: getattr(memory, name) for name in mends}
    largest_first = sorted(parts, key=lambda name: -parts[name])
    use = ["more ranks", *(mends[name] for name in largest_first if parts[name] > 0.05 * memory.total_bytes)]
    return (
        f"does not fit: {_in_parts(memory)} = {memory.total_bytes / GB:.1f} GB of {memory.capacity_bytes / GB:.1f} GB: "
        f"use {', '.join(use)}"
    )


def _in_parts(memory: "MemoryUse") -> str:
    from cost_models.units import GB

    return (
        f"experts {memory.expert_bytes / GB:.3g} GB + other weights {memory.other_weight_bytes / GB:.3g} GB + "
        f"KV cache {memory.kv_cache_bytes / GB:.3g} GB + buffers {memory.buffer_bytes / GB:.3g} GB"
    )


def _experts_a_token(report: "Report") -> str:
    if report.experts_per_token:
        return f"{report.experts_per_token:.2f}"
    return "none: the capacity leaves no expert a place; use a larger factor"


def print_report(report: "Report", bound: "Report", about: "Mapping[str, str] | None" = None) -> None:
    """A replay as tables; `about`: what stands above its figures."""
    from cost_models.units import human_seconds
    from sim.report import PARTS

    rows: list[tuple[str, str]] = [
        *(about or {}).items(),
        ("step time, event simulation", human_seconds(report.step_s)),
        ("with all costs at the ends of their 90% intervals", interval_in_words(report) or "no intervals"),
        ("step time, analytic lower bound", human_seconds(bound.step_s)),
        ("tokens/s", f"{report.tokens_per_s:,.0f}"),
        ("tokens/s per rank", f"{report.tokens_per_s_per_rank:,.0f}"),
        ("busiest rank's rows over the mean rank's", f"{report.token_imbalance:.3f}"),
        ("busiest rank's active experts over the mean's", f"{report.active_imbalance:.3f}"),
        ("critical rank (in how many MoE layers)", _critical_ranks(report)),
        ("experts a token", _experts_a_token(report)),
        ("gate mass kept", f"{report.gate_mass:.1%}"),
        ("pairs dropped", f"{report.dropped_share:.1%}"),
        *((name, f"{share:.1%}") for name, share_of in _SELDOM.items() if (share := share_of(report))),
        ("kept pairs lost with their rank", f"{report.lost_share:.1%}"),
        *((f"bytes {_TIERS.get(tier, tier)}, a step", f"{value:,.0f}") for tier, value in report.bytes_by_tier.items()),
        ("memory of a rank", _memory(report.memory)),
        ("  of which", _in_parts(report.memory)),
        *([(_COMPLETED, "completed by a model")] if report.completed else []),
    ]
    steps = "1 step" if report.steps == 1 else f"{report.steps} steps"
    print_table(f"{report.name}, {report.costs}, {steps}", ["", ""], [[a, b] for a, b in rows])
    print_table(
        "where a step goes, mean rank",
        ["part", "time", "share"],
        [[part, human_seconds(s), f"{s / report.step_s:.1%}"] for part, s in _parts(report).items()],
    )
    print_table(
        "its stages, mean rank",
        ["stage", "part", "time", "share", "waiting for the last rank", "beyond what was measured"],
        [
            [
                stage,
                PARTS.get(stage, "other"),
                human_seconds(seconds),
                f"{seconds / report.step_s:.1%}",
                human_seconds(report.waits_s[stage]) if stage in report.waits_s else "",
                f"{beyond:.0%}" if (beyond := report.extrapolated.get(stage)) else "",
            ]
            for stage, seconds in report.stage_s.items()
        ],
    )


def print_comparison(runs: Sequence[Run]) -> None:
    """Scenarios side by side; in brackets, times and rates over those of the first."""
    from cost_models.units import human_seconds

    reports = [run.report for run in runs]

    def figures(name: str, value: Callable[["Report"], float], shown: Callable[[float], str]) -> list[str]:
        first = value(reports[0])
        cells = [shown(value(report)) for report in reports]
        ratios = [f" ({value(report) / first:.2f}x)" if first else "" for report in reports]
        return [name, cells[0], *(cell + ratio for cell, ratio in zip(cells[1:], ratios[1:], strict=True))]

    def words(name: str, value: Callable[["Report"], str]) -> list[str]:
        return [name, *map(value, reports)]

    parts = dict.fromkeys(part for report in reports for part in _parts(report))
    tiers = dict.fromkeys(tier for report in reports for tier in report.bytes_by_tier)
    rows = [
        figures("step", lambda r: r.step_s, human_seconds),
        words("90% interval", interval_in_words),
        ["analytic lower bound", *(human_seconds(run.bound.step_s) for run in runs)],
        figures("tokens/s per rank", lambda r: r.tokens_per_s_per_rank, lambda value: f"{value:,.0f}"),
        *(figures(part, _entry(_parts, part), human_seconds) for part in parts),
        words("busiest rank's rows over the mean rank's", lambda r: f"{r.token_imbalance:.3f}"),
        words("busiest rank's active experts over the mean's", lambda r: f"{r.active_imbalance:.3f}"),
        words("critical rank (in how many MoE layers)", _critical_ranks),
        *(
            figures(f"bytes {_TIERS.get(tier, tier)}, a step", _entry(_bytes, tier), lambda value: f"{value:.3g}")
            for tier in tiers
        ),
        words("gate mass kept", lambda r: f"{r.gate_mass:.1%}"),
        words("pairs dropped", lambda r: f"{r.dropped_share:.1%}"),
        *(
            [name, *(f"{share_of(report):.1%}" for report in reports)]
            for name, share_of in _SELDOM.items()
            if any(map(share_of, reports))
        ),
        words("kept pairs lost with their rank", lambda r: f"{r.lost_share:.1%}"),
        words("memory of a rank", lambda r: _memory(r.memory)),
    ]
    if any(report.completed for report in reports):
        rows.append(words(_COMPLETED, lambda r: "completed by a model" if r.completed else ""))
    print_table("side by side, in brackets over the first", ["", *(run.name for run in runs)], rows)


def _parts(report: "Report") -> dict[str, float]:
    """Seconds by part of the step, and those in which an average rank has nothing to do."""
    present = {part: report.breakdown_s[part] for part in _PARTS if part in report.breakdown_s}
    return {**present, "waiting": report.waiting_s}


def _bytes(report: "Report") -> dict[str, float]:
    return report.bytes_by_tier


def _entry(of: Callable[["Report"], dict[str, float]], name: str) -> Callable[["Report"], float]:
    """One entry of a mapping of reports; 0 where it is not there."""
    return lambda report: of(report).get(name, 0.0)


def _critical_ranks(report: "Report") -> str:
    ranks = Counter(report.critical_rank_by_layer).most_common()
    named = ", ".join(f"{rank} ({layers})" for rank, layers in ranks[:_SHOWN_RANKS])
    return named + (f", {len(ranks) - _SHOWN_RANKS} others" if len(ranks) > _SHOWN_RANKS else "")


def _memory(memory: "MemoryUse") -> str:
    from cost_models.units import GB

    capacity = "" if memory.capacity_bytes is None else f" of {memory.capacity_bytes / GB:.4g} GB"
    return f"{memory.total_bytes / GB:.4g} GB{capacity}{'' if memory.fits else ': does not fit'}"

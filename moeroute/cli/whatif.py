"""`moeroute whatif`: one scenario at many points."""

from typing import TYPE_CHECKING, Annotated

import typer

from moeroute.cli.console import Json, ScenarioFile, interval_in_words, print_json, print_table, say

if TYPE_CHECKING:
    from tuner.whatif import Point


def whatif(
    scenario: ScenarioFile,
    vary: Annotated[
        list[str],
        typer.Option(
            help="name=value,value,…; may be repeated. ranks, gpu, top_k, price, capacity_factor, placement, "
            "redundant_slots, overlap, oversubscription, or a field's path in the scenario (config.adjustment.scope)."
        ),
    ],
    json: Json = False,
) -> None:
    """Step time, throughput and memory at every combination of the values to vary."""
    from cost_models.units import GB, human_seconds
    from tuner.scenario import read_scenario
    from tuner.whatif import parse_variations, what_if

    points = what_if(read_scenario(scenario), parse_variations(vary))
    if json:
        print_json(
            [
                {**p.values, "problem": p.problem, "report": None if p.report is None else p.report.to_json()}
                for p in points
            ]
        )
        return
    rows = []
    for point in points:
        row = [in_words(point)]
        if point.report is None:
            row += ["", "", "", "", "", "", "cannot be: see below"]
        else:
            report, memory = point.report, point.report.memory
            row += [
                human_seconds(report.step_s),
                interval_in_words(report),
                f"{report.tokens_per_s_per_rank:,.0f}",
                f"{report.gate_mass:.1%}",
                f"{memory.total_bytes / GB:.1f} GB",
                f"{report.extrapolated_share:.0%}" if interval_in_words(report) else "",
                "fits" if memory.fits else "does not fit",
            ]
        rows.append(row)
    costs = "; ".join(dict.fromkeys(point.report.costs for point in points if point.report is not None))
    head = [
        "point",
        "step",
        "90% interval",
        "tokens/s per rank",
        "gate mass",
        "memory of a rank",
        "beyond measured",
        "",
    ]
    print_table(costs or "nothing could be simulated", head, rows)
    for point in points:
        if point.problem is not None:
            print(f"{in_words(point)}: {point.problem}")
    for stage in sorted({stage for p in points if p.report is not None for stage in p.report.extrapolated}):
        say(f"priced beyond what was measured at some points: {stage}")


def in_words(point: "Point") -> str:
    """The point's values as they were given."""
    return " ".join(f"{name}={value}" for name, value in point.values.items())

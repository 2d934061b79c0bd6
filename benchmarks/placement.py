"""Placements beside EPLB's: balance, planning time, replica choice, drift, and simulated decode steps.

Loads of 58 layers by 256 experts in five shapes go to 288 slots on 32 ranks of 4 nodes (`cases`, `hierarchical`,
`drift`), batches drawn from them to replicas (`splitter`). Traces are planned on one window and scored on the next by
the simulator (`recorded`), or run through while experts move (`rebalancing`). `vs_eplb` is step time over that of
EPLB's plan with evenly used replicas: below 1 is faster. Times are medians of CPU time after a first call, on one core;
EPLB is timed compiled, as all else here (`eplb`), and in plain Python (`eplb_in_python`), which is what engines run.

python benchmarks/placement.py [--json] [--traces FOLDER] [--plot FOLDER] [--only SECTION …]
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from placement_over_time import rebalancing_cases
from placement_plot import write_plots
from placement_recorded import recorded_deployments, synthetic_deployments
from placement_static import balance_cases, drift_cases, hierarchical_cases, splitter_cases
from placement_tables import tables

Section = Callable[[], Iterator[dict[str, Any]]]


def sections(traces: Path | None) -> dict[str, Section]:
    """What is measured, by name; `traces`: the folder of recorded ones, None where there is none."""
    return {
        "cases": balance_cases,
        "hierarchical": hierarchical_cases,
        "splitter": splitter_cases,
        "drift": drift_cases,
        "recorded": lambda: _recorded(traces),
        "rebalancing": lambda: rebalancing_cases(traces),
    }


def _recorded(traces: Path | None) -> Iterator[dict[str, Any]]:
    if traces is None:
        print("no folder of recorded traces (--traces FOLDER): synthetic ones alone", file=sys.stderr)
    else:
        for deployment in recorded_deployments(traces):
            yield from deployment.run()
    for deployment in synthetic_deployments():
        yield from deployment.run()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--traces", type=Path, help="folder of recorded traces")
    parser.add_argument("--plot", type=Path, help="folder to draw SVG files into")
    parser.add_argument("--only", nargs="+", choices=list(sections(None)), help="measure these sections alone")
    options = parser.parse_args()
    if options.traces is not None and not options.traces.is_dir():
        parser.error(f"--traces {options.traces}: no such folder")
    return options


def main() -> None:
    options = _options()
    result: dict[str, Any] = {"machine": {"cores": os.cpu_count(), "load_before": os.getloadavg()[0]}}
    for name, section in sections(options.traces).items():
        start_s = time.perf_counter()
        result[name] = list(section()) if options.only is None or name in options.only else []
        print(f"{name}: {len(result[name])} rows in {time.perf_counter() - start_s:.0f} s", file=sys.stderr)
    result["machine"]["load_after"] = os.getloadavg()[0]
    if options.plot is not None:
        write_plots(options.plot, result)
    print(json.dumps(result) if options.json else tables(result))


if __name__ == "__main__":
    main()

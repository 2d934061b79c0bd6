"""Elastic models: what recipes that train for fewer and more experts, layers and experts a token are worth.

Five recipes and six shapes trained alone, each on as many FLOPs and on several seeds (`elastic_trainings.py`), are cut
in many ways and judged on held-out text (`elastic_rows.py`); steps at deployed widths are simulated, CPU seconds
measured. What the sources say is held against intervals over seeds (`elastic_claims.py`). All of it takes some two
hours on two cores, `--reduced` (one seed, a tenth of the FLOPs, a thinner grid) under ten minutes: it shows that the
code runs, and resolves nothing. Stopped, it goes on with the training and the row that it was at; what is in the folder
is taken as it is, so after a change of what trains, cuts or simulates give another one.

python benchmarks/elastic.py [--reduced] [--json] [--markdown] [--out DIR] [--plot [FOLDER]] [--from FILE.json]
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import platformdirs
from elastic_claims import Results, claims
from elastic_decode import decode_rows
from elastic_plot import write_plots
from elastic_rows import REDUCED_STUDY, TRACE_TOKENS, WHOLE_STUDY, Study, cpu_seconds, load, measure_all, shape_of
from elastic_tables import tables
from elastic_trainings import train_all

from traces.errors import InputError

_PACKAGES = ("torch", "numpy", "scipy")
_DIGITS = 6


def run(study: Study, folder: Path) -> dict[str, Any]:
    """Train what is not there, measure what is not there, and judge."""
    start_s, load_before = time.perf_counter(), _load()
    for number, training in enumerate(train_all(study.trainings, folder / "models"), start=1):
        print(f"{training.id}: trained, {number} of {len(study.trainings)}", file=sys.stderr, flush=True)
    rows = measure_all(study, folder)
    decode = decode_rows(study, folder)
    cpu = cpu_seconds(rows, study, folder, _load)
    by_shape = {tuple(shape): seconds for *shape, seconds in cpu.pop("by_shape")}
    for row in rows:
        row["cpu_step_s"] = by_shape[shape_of(row)]
    trained = [(training.id, load(training, folder)) for training in study.trainings]
    result: dict[str, Any] = _rounded(
        {
            "rows": rows,
            "decode": decode,
            "claims": [claim.to_json() for claim in claims(Results(rows, decode))],
            "provenance": {
                "python": platform.python_version(),
                **{package: version(package) for package in _PACKAGES},
                "cpu": _cpu(),
                "cores": os.cpu_count(),
                "load_before": load_before,
                "load_after": _load(),
                "seconds_of_this_run": time.perf_counter() - start_s,
                "seeds": list(study.seeds),
                "flops_per_training": study.flops,
                "sequences": study.sequences,
                "trace_tokens": TRACE_TOKENS,
                "corpus": trained[0][1].corpus.digest,
                "cpu_step": cpu,
                "trainings": [
                    {"id": name, **{field: model.info[field] for field in ("key", "steps", "seconds", "flops")}}
                    for name, model in trained
                ],
            },
        }
    )
    return result


def _load() -> float:
    return os.getloadavg()[0]


def _cpu() -> str:
    """The model of the processor, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _rounded(value: Any) -> Any:
    """Floats to a few digits: what is behind them is noise."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def document_text(result: Mapping[str, Any]) -> str:
    """One JSON document, a line a row, so that a reader and a version control see what differs."""
    parts = []
    for name, value in result.items():
        lines = [json.dumps(item, separators=(",", ":")) for item in value] if isinstance(value, list) else None
        parts.append(f'"{name}":' + (json.dumps(value) if lines is None else "[\n" + ",\n".join(lines) + "\n]"))
    return "{" + ",\n".join(parts) + "}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reduced", action="store_true", help="one seed and short trainings")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--markdown", action="store_true", help="tables for a page")
    parser.add_argument("--out", type=Path, help="folder of models and rows; by default one in the user's cache")
    parser.add_argument(
        "--plot", type=Path, nargs="?", const=Path(__file__).parent, help="draw SVG files, beside this script or there"
    )
    parser.add_argument("--from", dest="earlier", type=Path, help="show the results of this file, measure nothing")
    return parser.parse_args()


def main() -> None:
    options = _options()
    if options.earlier is not None:
        result = json.loads(options.earlier.read_bytes())
        result["claims"] = [claim.to_json() for claim in claims(Results(result["rows"], result["decode"]))]
    else:
        name = "elastic-reduced" if options.reduced else "elastic"
        folder = options.out or Path(platformdirs.user_cache_dir("moeroute")) / name
        try:
            result = run(REDUCED_STUDY if options.reduced else WHOLE_STUDY, folder)
        except InputError as error:
            sys.exit(str(error))
    if options.plot is not None:
        write_plots(options.plot, result)
    print(document_text(result) if options.json else tables(result, markdown=options.markdown))


if __name__ == "__main__":
    main()

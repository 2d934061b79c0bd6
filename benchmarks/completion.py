"""How far completed candidates can be trusted.

On the reference model, all of whose experts are recorded, everything below the chosen k is hidden, guessed by a model
fitted on other requests, and compared: with softmax scores, and with scores relative to the chosen ones as gpt-oss
gives them. On recorded traces of larger models (`--traces`, npz) only the k-th expert can be hidden.

python benchmarks/completion.py [--json] [--traces FOLDER]
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import moeroute as mr
from router.nn.record import record
from router.nn.store import reference_model
from traces.batching import split_requests
from traces.completion import complete, fit_completion
from traces.completion_error import Estimate, Guess, HiddenError, TailError, hidden_error, tail_error
from traces.formats.npz import import_npz
from traces.trace import RoutingTrace

RECORDED = {
    "gpt-oss-20b": "gptoss20b/gptoss20b_ship.npz",
    "flame-moe-290m": "flame_moe_290m/flame_moe_290m_prefill2048.npz",
}
FOLDER = Path(__file__).parents[1] / ".." / "shared" / "data" / "traces"
TOKENS = 24_576
FIT = (0.4, 0.6)
CANDIDATES = 16


def relative_to_chosen(trace: RoutingTrace) -> RoutingTrace:
    """The trace as an engine that renormalises the chosen gates would score it."""
    assert trace.gates_TLC is not None
    gates_TLC = trace.gates_TLC.astype(np.float64)
    gates_TLC /= gates_TLC[:, :, : trace.model.top_k].sum(axis=2, keepdims=True)
    return replace(trace, gates_TLC=gates_TLC.astype(np.float16), score_kind="softmax_over_topk")


def on_reference(seed: int) -> list[dict[str, Any]]:
    full = record(reference_model(), tokens=TOKENS, seed=seed)
    rows = []
    for trace in (full, relative_to_chosen(full)):
        plan, others = split_requests(trace, FIT)
        k = trace.model.top_k
        fitted = fit_completion(plan.best(k))
        rows.append(
            {
                "trace": "reference",
                "score_kind": trace.score_kind,
                "fitted_tokens": plan.tokens,
                "hidden": hidden_error(others.best(k), fitted, seed=seed),
                "tail": {
                    order: tail_error(others, fitted, seed=seed, order=order) for order in ("likeliest", "sampled")
                },
            }
        )
    return rows


def on_recorded(folder: Path, seed: int) -> tuple[list[dict[str, Any]], list[str]]:
    rows, skipped = [], []
    for name, file in RECORDED.items():
        if not (folder / file).is_file():
            skipped.append(f"{name}: no {folder / file}; give the folder of recorded traces with --traces")
            continue
        plan, others = split_requests(import_npz(folder / file, model=mr.preset(name)).trace, FIT)
        start = time.perf_counter()
        fitted = fit_completion(plan)
        fitted_at = time.perf_counter()
        complete(others, candidates=CANDIDATES, fitted_on=fitted)
        done_at = time.perf_counter()
        rows.append(
            {
                "trace": name,
                "score_kind": others.score_kind,
                "fitted_tokens": plan.tokens,
                "hidden": hidden_error(others, fitted, seed=seed),
                "tail": {},
                "fit_s": fitted_at - start,
                "complete_s": done_at - fitted_at,
            }
        )
    return rows, skipped


def figure(estimate: Estimate) -> str:
    interval = "" if estimate.interval is None else f" [{estimate.interval[0]:.3f}, {estimate.interval[1]:.3f}]"
    return f"{estimate.mean:.3f}{interval}"


def print_guesses(error: HiddenError | TailError) -> None:
    def recall(guess: Guess) -> str:
        return ", ".join(f"@{m} {figure(found)}" for m, found in guess.recall.items())

    print(f"    completion  recall {recall(error.completion)}; log loss {figure(error.completion.log_loss)}")
    print(f"    popularity  recall {recall(error.popularity)}; log loss {figure(error.popularity.log_loss)}")
    evenly = ", ".join(f"@{m} {found:.3f}" for m, found in error.uniform_recall.items())
    print(f"    uniform     recall {evenly}; log loss {error.uniform_log_loss:.3f}")
    if error.score_error is not None and error.score_bias is not None:
        print(f"    score error {figure(error.score_error)} of the recorded mass, bias {figure(error.score_bias)}")


def print_row(row: dict[str, Any]) -> None:
    hidden: HiddenError = row["hidden"]
    print(f"{row['trace']}, {row['score_kind']}: fitted on {row['fitted_tokens']} tokens, {hidden.tokens} scored")
    if "fit_s" in row:
        print(f"  fit {row['fit_s']:.2f} s, complete to {CANDIDATES} in {row['complete_s']:.2f} s")
    print(f"  rank {hidden.rank}, hidden:")
    print_guesses(hidden)
    for order, tail in row["tail"].items():
        print(f"  below rank {tail.recorded}, never seen, {order}:")
        print_guesses(tail)
        print(
            f"    order {figure(tail.spearman)} (Spearman); same refill {figure(tail.refill)}, by popularity "
            f"{figure(tail.popularity_refill)}; load distance {tail.load_distance:.3f}"
        )
        if tail.mass_error is not None and tail.true_mass is not None:
            print(f"    mass error {figure(tail.mass_error)} of a true {figure(tail.true_mass)}")


def in_json(row: dict[str, Any]) -> dict[str, Any]:
    tails = {order: tail.to_json() for order, tail in row["tail"].items()}
    return {**row, "hidden": row["hidden"].to_json(), "tail": tails}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--traces", type=Path, default=FOLDER, help="folder of recorded traces (npz)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    recorded, skipped = on_recorded(options.traces, options.seed)
    rows = [*on_reference(options.seed), *recorded]
    for reason in skipped:
        print(f"skipped {reason}", file=sys.stderr)
    if options.json:
        print(json.dumps({"rows": [in_json(row) for row in rows], "skipped": skipped}, indent=1))
        return
    for row in rows:
        print_row(row)


if __name__ == "__main__":
    main()

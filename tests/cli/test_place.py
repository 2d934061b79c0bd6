"""`moeroute place` as a stranger meets it: what it answers, what it writes, what it refuses and how it ends."""

import json
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from moeroute.cli.app import app

KEYS = {
    *("slot_to_expert", "ranks", "algorithm", "plan_ms", "balancedness", "slots_moved_share"),
    *("gain", "gain_ci", "verdict", "active_balancedness", "bytes_by_tier", "step_s", "candidates", "notes"),
}
SKEWED = [[60, 50, 4, 3, 2, 1, 1, 1], [1, 2, 3, 4, 5, 60, 70, 80]]
OF_TRACE = ("--trace", "trace.parquet", "--ranks", 4, "--nodes", 2, "--slots", 12, "--costs", "datasheet")


def run(*arguments: object, cwd: Path) -> Result:
    """Run a command in this process, which has its compiled loops loaded."""
    with chdir(cwd):
        return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with loads by layer and by step, and a small trace."""
    folder = tmp_path_factory.mktemp("place")
    write(folder, "loads.json", SKEWED)
    write(folder, "even.json", [[5] * 8] * 2)
    write(folder, "steps.json", np.random.default_rng(0).poisson(SKEWED, size=(20, 2, 8)).tolist())
    done = run(*("trace", "synth", "--model", "mixtral-8x7b", "--tokens", 4096, "--zipf", 1.0, "-o", "."), cwd=folder)
    assert done.exit_code == 0, done.stderr
    return folder


def write(folder: Path, name: str, counts: Any) -> None:
    (folder / name).write_text(json.dumps({"logical_count": counts}))


def answered(folder: Path, *arguments: object, code: int = 0) -> Any:
    done = run("place", *arguments, "--json", cwd=folder)
    assert done.exit_code == code, (done.stdout, done.stderr)
    return json.loads(done.stdout)


def refused(done: Result) -> str:
    """The one line that a refused command says."""
    assert done.exit_code == 2, (done.stdout, done.stderr)
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    return line


def test_loads_are_placed_by_tokens(folder: Path) -> None:
    found = answered(folder, "--loads", "loads.json", "--ranks", 4, "--nodes", 2, "--slots", 12)
    assert set(found) >= KEYS
    assert (found["algorithm"], found["ranks"]) == ("balanced", 4)
    assert np.array(found["slot_to_expert"]).shape == (2, 12)
    assert found["gain"] is found["gain_ci"] is found["step_s"] is None
    assert 0 < found["balancedness"]["before"] < found["balancedness"]["after"] <= found["balancedness"]["upper_bound"]
    assert 0 < found["plan_ms"] < 1000
    assert found["verdict"].startswith("worth it: ")


def test_balancedness_is_that_of_the_placement_it_gives(folder: Path) -> None:
    found = answered(folder, "--loads", "loads.json", "--ranks", 4, "--slots", 12)
    ratios = []
    for load_E, expert_S in zip(SKEWED, found["slot_to_expert"], strict=True):
        share_S = [load_E[expert] / expert_S.count(expert) for expert in expert_S]
        load_G = [sum(share_S[3 * rank : 3 * rank + 3]) for rank in range(4)]  # slot s is of rank s // (12 / 4)
        ratios.append(sum(load_G) / 4 / max(load_G))
    np.testing.assert_allclose(found["balancedness"]["after"], np.mean(ratios))


def test_the_same_question_has_the_same_answer(folder: Path) -> None:
    def without_times(found: Any) -> Any:
        if isinstance(found, dict):
            return {key: without_times(value) for key, value in found.items() if key != "plan_ms"}
        return [without_times(value) for value in found] if isinstance(found, list) else found

    question = ("--loads", "steps.json", "--ranks", 4, "--slots", 12)
    assert without_times(answered(folder, *question)) == without_times(answered(folder, *question))


def test_steps_give_a_gain_in_rows(folder: Path) -> None:
    found = answered(folder, "--loads", "steps.json", "--ranks", 4, "--slots", 12)
    assert found["gain_of"] == "rows of the busiest rank"
    low, high = found["gain_ci"]
    assert low <= found["gain"] <= high


def test_even_loads_end_with_1(folder: Path) -> None:
    found = answered(folder, "--loads", "even.json", "--ranks", 4, code=1)
    assert found["verdict"].startswith("not worth it: loads are already balanced")


def test_a_trace_says_what_a_step_gains(folder: Path) -> None:
    found = answered(folder, *OF_TRACE, "--algorithm", "balanced")
    assert found["gain_of"] == "step time"
    low, high = found["gain_ci"]
    assert low <= found["gain"] <= high
    assert found["step_s"]["after"] < found["step_s"]["before"]
    assert found["bytes_by_tier"]["before"]["scale_out"] > 0
    assert found["migration_s"] > 0
    assert [c["algorithm"] for c in found["candidates"] if c["chosen"]] == ["balanced"]
    assert {"contiguous", "random"} < {c["algorithm"] for c in found["candidates"]}


def test_the_tables_end_with_the_verdict(folder: Path) -> None:
    done = run("place", *OF_TRACE, "--algorithm", "balanced", "-o", "out", cwd=folder)
    assert done.exit_code == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("worth it: a step takes ")
    for words in ("balancedness, tokens", "MB between nodes, a step", "slots moved", "pays for itself after"):
        assert words in done.stdout
    document = json.loads((folder / "out" / "placement.json").read_text())
    assert document["verdict"] == last
    assert last[1:] in (folder / "out" / "placement.html").read_text()


def test_what_it_wrote_can_be_what_runs_now(folder: Path) -> None:
    question = ("--loads", "loads.json", "--ranks", 4, "--slots", 12)
    assert run("place", *question, "-o", "first", cwd=folder).exit_code == 0
    again = answered(folder, *question, "--current", "first/placement.json", code=1)
    assert again["slots_moved_share"] == 0
    assert again["balancedness"]["before"] == again["balancedness"]["after"]


def test_a_budget_and_a_lost_rank(folder: Path) -> None:
    budget = answered(folder, "--loads", "loads.json", "--ranks", 4, "--slots", 12, "--budget", 0.25)
    assert (budget["algorithm"], budget["slots_moved_share"] <= 0.25) == ("incremental", True)
    gone = answered(
        folder, "--loads", "loads.json", "--ranks", 4, "--slots", 12, "--gone", 2, code=1
    )  # the others are balanced as it is
    assert (gone["ranks"], len(gone["slot_to_expert"][0])) == (3, 9)


LOADS = ("--loads", "loads.json", "--ranks")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*LOADS, 5, "--slots", 12), "12 expert slots do not divide over 5 ranks; add 3 redundant slots"),
        ((*LOADS, 2, "--slots", 6), "6 slots cannot hold 8 experts; give at least 8"),
        ((*LOADS, 4, "--slots", 0), "0 slots cannot hold 8 experts; give at least 8"),
        ((*LOADS, 4, "--budget", 0.1, "--groups", 2), "leave out groups or the budget"),
        ((*LOADS, 4, "--nodes", 3), "4 ranks do not divide over 3 nodes"),
        ((*LOADS, 4, "--groups", 3), "8 experts do not divide into 3 groups"),
        ((*LOADS, 4, "--nodes", 4, "--groups", 2), "2 groups of experts do not divide over 4 nodes"),
        ((*LOADS, 4, "--algorithm", "magic"), "unknown placement 'magic'; known are best, "),
        ((*LOADS, 4, "--algorithm", "active_aware"), "placement active_aware needs the loads of single steps"),
        ((*LOADS, 4, "--current", "none.json"), "none.json: no such placement"),
        ((*LOADS, 4, "--trace", "trace.parquet"), "both of --loads and --trace; give one of them"),
        (("--ranks", 4), "neither of --loads and --trace; give one of them"),
        (("--loads", "none.json", "--ranks", 4), "none.json"),
        (("--trace", "none.parquet", "--ranks", 4), "none.parquet: no such file"),
        (("--trace", "none.npz", "--ranks", 4), "give --model"),
        ((*LOADS, 4, "--tokens-per-rank", 8), "--tokens-per-rank goes with --trace, not with --loads; leave it out"),
        ((*LOADS, 4, "--away-share", 0.5), "give groups too"),
        ((*OF_TRACE, "--kv-tokens-per-rank", -1), "kv_tokens_per_rank is -1"),
        ((*OF_TRACE, "--phase", "training"), "--phase 'training' is not known; use prefill, decode"),
        ((*OF_TRACE, "--replica-choice", "dice"), "--replica-choice 'dice' is not known; use even, "),
        ((*OF_TRACE, "--gpu", "abacus"), "abacus"),
        (("--trace", "trace.parquet", "--ranks", 0), "0 ranks; use at least 1"),
        ((*OF_TRACE, "--weights", "clay"), "unknown dtype 'clay'"),
        ((*OF_TRACE, "--tokens-per-rank", 100_000), "use fewer ranks, fewer tokens a rank, or a longer trace"),
    ],
)
def test_bad_input_is_refused_in_one_line(folder: Path, arguments: tuple[object, ...], words: str) -> None:
    assert words in refused(run("place", *arguments, cwd=folder))


@pytest.mark.parametrize("bad", [[[1, -1]], [[1, float("nan")]], [[1, 2], [1]], [], "many", [[1, "x"]]])
def test_loads_that_are_none_are_refused(tmp_path: Path, bad: Any) -> None:
    write(tmp_path, "bad.json", bad)
    assert "bad.json" in refused(run("place", "--loads", "bad.json", "--ranks", 1, cwd=tmp_path))


def test_counts_whose_sum_is_too_large_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "huge.json", [[1e308] * 4])
    line = refused(run("place", "--loads", "huge.json", "--ranks", 1, cwd=tmp_path))
    assert "huge.json: logical_count: the sum of all counts is not a finite number; give smaller counts" in line


def test_steps_without_rows_are_balanced(tmp_path: Path) -> None:
    write(tmp_path, "none.json", [[[0] * 8] * 2] * 10)
    found = answered(tmp_path, "--loads", "none.json", "--ranks", 4, "--slots", 12, code=1)
    assert found["gain"] == 0
    assert found["verdict"].startswith("not worth it: loads are already balanced")


def test_a_seed_is_not_negative(folder: Path) -> None:
    done = run("place", *LOADS, 4, "--seed", -1, cwd=folder)
    assert done.exit_code == 2
    assert "--seed" in done.stderr


def test_what_runs_now_is_of_as_many_ranks(folder: Path) -> None:
    assert run("place", *LOADS, 4, "--slots", 8, "-o", "four", cwd=folder).exit_code == 0
    line = refused(run("place", *LOADS, 2, "--current", "four/placement.json", cwd=folder))
    assert "placement.json: of 4 ranks, not 2; give as many ranks, or another placement" in line


def test_nothing_heavy_is_loaded_for_loads_alone(folder: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from moeroute.cli.app import app; "
        "done = CliRunner().invoke(app, ['place', '--loads', 'loads.json', '--ranks', '4', '--slots', '12']); "
        "print(done.exit_code, {'torch', 'plotly', 'optuna', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 set()", done.stderr

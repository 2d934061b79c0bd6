"""The command line as a stranger meets it: exit codes, one line for each mistake, JSON and nothing else on stdout."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

MOEROUTE = [sys.executable, "-m", "moeroute"]
SCENARIO = {
    "version": 1,
    "name": "small",
    "trace": "trace.parquet",
    "cluster": {"device": "h100_sxm", "ranks": 4},
    "batch": {"phase": "prefill", "tokens_per_rank": 64, "steps": 2},
    "config": {"policy": "top_k", "parameters": {"k": 2}},
    "fidelity": "analytic",
    "study": {"trials": 12, "space": {"ranges": {"top_k.k": [1, 4]}}},
}


def run(*arguments, cwd, **options):
    return subprocess.run(
        [*MOEROUTE, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False, **options
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small trace and a scenario that fits it."""
    folder = tmp_path_factory.mktemp("cli")
    done = run(
        *("trace", "synth", "--model", "mixtral-8x7b", "--tokens", 4096, "--candidates", 6, "-o", "."), cwd=folder
    )
    assert done.returncode == 0, done.stderr
    (folder / "scenario.yaml").write_text(yaml.safe_dump(SCENARIO))
    return folder


def refused(done):
    """The one line that a refused command says."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    return line


def changed(folder, name, **changes):
    path = folder / name
    path.write_text(yaml.safe_dump({**SCENARIO, **changes}))
    return path


def test_show_prints_one_json_document(folder):
    done = run("trace", "show", "trace.parquet", "--json", cwd=folder)
    assert done.returncode == 0
    shown = json.loads(done.stdout)
    assert shown["tokens"] == 4096
    assert len(shown["max_over_mean_L"]) == shown["model"]["layers"] == 32


def test_simulate_gives_both_fidelities_and_a_timeline(folder):
    done = run("simulate", "scenario.yaml", "-o", "simulated", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["analytic"]["step_s"] <= report["event"]["step_s"] * (1 + 1e-12)
    assert report == json.loads((folder / "simulated" / "report.json").read_text())
    events = json.loads((folder / "simulated" / "timeline.json").read_text())["traceEvents"]
    assert {event["name"] for event in events if event["ph"] == "X"} >= {"gate", "experts", "dispatch"}


def test_simulating_twice_gives_the_same_bytes(folder):
    for out in ("first", "second"):
        assert run("simulate", "scenario.yaml", "-o", out, cwd=folder).returncode == 0
    assert (folder / "first/report.json").read_bytes() == (folder / "second/report.json").read_bytes()
    assert (folder / "first/timeline.json").read_bytes() == (folder / "second/timeline.json").read_bytes()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch": {**SCENARIO["batch"], "token_per_rank": 3}}, "batch.token_per_rank: unknown key"),
        ({"cluster": {"device": "h100_sxm", "ranks": 16}}, "16 ranks but only 8 expert slots"),
        ({"cluster": {"device": "h100_sxm", "ranks": 3}}, "8 expert slots do not divide over 3 ranks"),
        ({"cluster": {"device": "h101", "ranks": 4}}, "unknown device 'h101'"),
        ({"config": {"policy": "top_k", "parameters": {"k": 9}}}, "9 experts a token, but the model has 8"),
        ({"config": {"policy": "top_k", "parameters": {"k": 7}}}, "needs 7 candidates per token; the trace recorded 6"),
        ({"config": {"policy": "top_q", "parameters": {}}}, "unknown policy 'top_q'"),
        ({"trace": "nowhere.parquet"}, "nowhere.parquet"),
        ({"costs": "nowhere.json"}, "no such profile"),
        ({"version": 2}, "version"),
    ],
)
def test_a_scenario_that_cannot_be_is_refused_in_one_line(folder, changes, says):
    path = changed(folder, "bad.yaml", **changes)
    assert says in refused(run("simulate", path, cwd=folder))


def test_a_truncated_trace_is_refused_in_one_line(folder):
    whole = (folder / "trace.parquet").read_bytes()
    (folder / "half.parquet").write_bytes(whole[: len(whole) // 2])
    assert "half.parquet" in refused(run("trace", "show", "half.parquet", cwd=folder))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("command", [["calibrate"], ["demo"]])
def test_cuda_without_a_gpu_is_refused_in_one_line(folder, command):
    assert "no CUDA GPU was found; use --device cpu" in refused(run(*command, "--device", "cuda", cwd=folder))


def test_a_full_disk_leaves_the_old_file_and_no_half_one(folder):
    before = (folder / "trace.parquet").read_bytes()

    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    done = run(
        *("trace", "synth", "--model", "mixtral-8x7b", "--tokens", 8192, "-o", "."),
        cwd=folder,
        preexec_fn=small_files_only,
        env={**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert "nothing was left half written" in refused(done)
    assert (folder / "trace.parquet").read_bytes() == before
    assert not list(folder.glob(".*.part"))


def test_an_interrupted_study_says_so_and_goes_on(folder):
    scenario = changed(folder, "long.yaml", study={"trials": 400, "space": {"ranges": {"top_k.k": [1, 4]}}})
    process = subprocess.Popen(
        [*MOEROUTE, "tune", scenario, "-o", "long"],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    journal = folder / "long" / "study.journal"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.stat().st_size > 200_000):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    assert not Path(folder / "long" / "study.json").exists()

    done = run(
        "tune",
        changed(folder, "long.yaml", study={"trials": 8, "space": {"ranges": {"top_k.k": [1, 4]}}}),
        "-o",
        "long",
        "--json",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    study = json.loads(done.stdout)
    assert study["found_before"] >= 8
    configs = [json.dumps(trial["config"], sort_keys=True) for trial in study["trials"]]
    assert len(set(configs)) == len(configs)


def test_usage_errors_keep_their_plain_form(folder):
    done = run("simulate", cwd=folder)
    assert done.returncode == 2
    assert "Missing argument" in done.stderr


def test_a_point_that_cannot_be_is_explained_in_full(folder):
    """8 experts have no place on 64 ranks; the table stays a table, and the reason stands whole below it."""
    done = run("whatif", "scenario.yaml", "--vary", "ranks=4,64", cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("ranks=64" in line and "cannot be" in line for line in lines)
    assert any(line.startswith("ranks=64: ") and "8 expert slots" in line for line in lines)

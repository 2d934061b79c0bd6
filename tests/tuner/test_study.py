"""Studies that go on: whatever stops them, no finished trial is lost and none runs twice."""

import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
import study_cases
from hypothesis import given
from hypothesis import strategies as st
from study_cases import TWELVE, config_key, fake_report, logged, small_scenario

from sim.report import Report
from traces.errors import InputError
from tuner.journal import open_journal
from tuner.scenario import Config, Scenario
from tuner.study import StudyResult, Trial, pareto_front, tune

BASELINE = small_scenario(1).config


def run(scenario: Scenario, journal: Path, *, evaluate: Any = fake_report, identity: str = "same") -> StudyResult:
    return tune(scenario, evaluate, journal=journal, identity=identity)


def keys(study: StudyResult) -> list[str]:
    return [config_key(trial.config) for trial in study.trials]


def finished_in(journal: Path, scratch: Path) -> dict[str, tuple[int, tuple[float, ...]]]:
    """The finished trials of a journal as optuna itself reads a copy of it: number and values by config."""
    copy = scratch / f"copy of {journal.name}"
    shutil.copy(journal, copy)
    with open_journal(copy) as storage:
        study = optuna.load_study(study_name="small", storage=storage)
        finished = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    return {
        config_key(Config.model_validate(trial.user_attrs["config"])): (trial.number, tuple(trial.values))
        for trial in finished
    }


def check_resumed(resumed: StudyResult, before: dict[str, tuple[int, tuple[float, ...]]], trials: int) -> None:
    after = {config_key(t.config): (t.number, (t.step_s, t.gate_mass)) for t in resumed.trials}
    assert len(after) == len(resumed.trials) == trials
    assert before.items() <= after.items()
    assert resumed.found_before == len(before)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_every_trial_is_another_config_and_the_first_the_baseline(tmp_path: Path, sampler: str) -> None:
    log, scenario = tmp_path / "log", small_scenario(25, sampler=sampler)
    study = run(scenario, tmp_path / "journal", evaluate=logged(log))
    assert len(set(keys(study))) == len(study.trials) == 25
    assert log.read_text().splitlines() == keys(study)  # evaluated once each, in this order
    assert (study.trials[0].number, study.trials[0].config) == (0, BASELINE)
    assert study.found_before == 0
    for trial in study.trials:
        report = fake_report(trial.config)
        assert (trial.step_s, trial.gate_mass) == (report.step_s, report.gate_mass)
        assert trial.report["name"] == trial.config.describe()


def test_an_uninterrupted_study_is_reproducible(tmp_path: Path) -> None:
    first, second, other = (
        run(small_scenario(20, seed=seed), tmp_path / name) for name, seed in (("a", 7), ("b", 7), ("c", 8))
    )
    assert keys(first) == keys(second)
    assert first.front == second.front
    assert keys(first) != keys(other)


def test_asking_for_more_goes_on_where_it_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    few = run(small_scenario(8), tmp_path / "journal", evaluate=logged(log))
    more = run(small_scenario(20), tmp_path / "journal", evaluate=logged(log))
    assert more.found_before == 8
    assert more.trials[:8] == few.trials
    assert len(set(keys(more))) == 20
    assert max(Counter(log.read_text().splitlines()).values()) == 1
    # And asking again for what is there evaluates nothing.
    again = run(small_scenario(20), tmp_path / "journal", evaluate=logged(log))
    assert again.trials == more.trials
    assert len(log.read_text().splitlines()) == 20


def test_an_evaluation_that_fails_leaves_the_others(tmp_path: Path) -> None:
    calls = 0

    def evaluate(config: Config) -> Report:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return fake_report(config)

    with pytest.raises(KeyboardInterrupt):
        run(small_scenario(12), tmp_path / "journal", evaluate=evaluate)
    before = finished_in(tmp_path / "journal", tmp_path)
    assert len(before) == 5
    check_resumed(run(small_scenario(12), tmp_path / "journal"), before, 12)
    # Trial 5 is not left running for ever, for other readers of the journal.
    with open_journal(tmp_path / "journal") as storage:
        stored = optuna.load_study(study_name="small", storage=storage).get_trials()
    assert stored[5].state == optuna.trial.TrialState.FAIL
    assert not [trial for trial in stored if trial.state == optuna.trial.TrialState.RUNNING]


def test_a_study_killed_in_its_first_trial_starts_with_the_baseline_again(tmp_path: Path) -> None:
    def evaluate(config: Config) -> Report:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(small_scenario(3), tmp_path / "journal", evaluate=evaluate)
    study = run(small_scenario(3), tmp_path / "journal")
    assert study.trials[0].config == BASELINE
    assert len(set(keys(study))) == 3


def test_a_journal_cut_at_any_byte_keeps_its_finished_trials(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run(small_scenario(10), whole)
    content = whole.read_bytes()
    for cut in range(0, len(content) + 1, len(content) // 9):
        journal = tmp_path / f"cut at {cut}"
        journal.write_bytes(content[:cut])
        has_study = b"\n" in content[:cut]  # its line is the first
        before = finished_in(journal, tmp_path) if has_study else {}
        check_resumed(run(small_scenario(12), journal), before, 12)


def test_a_half_written_result_is_run_again(tmp_path: Path) -> None:
    """The last line says that trial 9 is finished; without its last byte it is not."""
    journal, log = tmp_path / "journal", tmp_path / "log"
    whole = run(small_scenario(10), journal)
    journal.write_bytes(journal.read_bytes()[:-2])
    resumed = run(small_scenario(10), journal, evaluate=logged(log))
    assert resumed.found_before == 9
    assert resumed.trials[:9] == whole.trials[:9]
    assert len(log.read_text().splitlines()) == 1
    assert len(set(keys(resumed))) == 10


def test_kill_9_loses_no_finished_trial_and_repeats_none(tmp_path: Path) -> None:
    journal, log = tmp_path / "journal", tmp_path / "log"
    log.touch()
    done_before: set[str] = set()
    for round_ in (1, 2):
        process = subprocess.Popen([sys.executable, study_cases.__file__, str(journal), str(log), "1000"])
        try:
            deadline = time.monotonic() + 60
            while log.read_text().count("\n") < 8 * round_ and time.monotonic() < deadline:
                assert process.poll() is None, "the study ended by itself"
                time.sleep(0.01)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
        finished = finished_in(journal, tmp_path)
        assert len(finished) >= 8 * round_ - 2  # at most the one in flight of each round is missing
        assert done_before <= set(finished)
        done_before = set(finished)
    before = finished_in(journal, tmp_path)
    check_resumed(run(small_scenario(len(before) + 5), journal, evaluate=logged(log)), before, len(before) + 5)
    times = Counter(log.read_text().splitlines())
    assert {times[key] for key in before} == {1}


def test_the_journal_of_another_scenario_is_refused(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    one = run(small_scenario(3), journal, identity="one")
    with pytest.raises(InputError) as refused:
        run(small_scenario(3), journal, identity="other")
    assert str(refused.value) == (
        f"{journal}: holds a study of another scenario, trace or profile; "
        "give another --out folder, or remove the journal to start anew"
    )
    assert run(small_scenario(3), journal, identity="one").trials == one.trials  # and it is none the worse


def test_the_journal_of_another_scenario_is_refused_whatever_its_name(tmp_path: Path) -> None:
    run(small_scenario(3), tmp_path / "journal", identity="one")
    with pytest.raises(InputError, match="holds a study of another scenario"):
        run(small_scenario(3, name="other"), tmp_path / "journal", identity="other")


@pytest.mark.parametrize("content", [b"garbage\n", b"\x00\xff\n", b"{}\n"])
def test_a_file_that_is_no_journal_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    journal = tmp_path / "journal"
    journal.write_bytes(content)
    with pytest.raises(InputError) as refused:
        run(small_scenario(3), journal)
    message = str(refused.value)
    assert message.startswith(f"{journal}: not a readable journal (")
    assert message.endswith("); move it away and start again")
    assert "\n" not in message
    assert journal.read_bytes().startswith(content)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_small_space_is_searched_to_its_last_config(tmp_path: Path, sampler: str) -> None:
    study = run(small_scenario(12, sampler=sampler, space=TWELVE), tmp_path / "journal")
    assert len(set(keys(study))) == 12


def test_a_space_that_runs_out_says_how_many_it_had(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        run(small_scenario(13, space=TWELVE), tmp_path / "journal")
    assert str(refused.value) == (
        "study small: only 12 different configs found of 13 trials; widen study.space or ask for fewer trials"
    )
    # What was found is kept: asking for that many gives it.
    assert run(small_scenario(12, space=TWELVE), tmp_path / "journal").found_before == 12


def test_a_config_written_in_another_order_is_the_same_config(tmp_path: Path) -> None:
    """The only config of this space is the baseline, whose parameters the user wrote the other way round."""
    scenario = small_scenario(
        2,
        config={"policy": "top_p", "parameters": {"k_max": 2, "p": 0.5}},
        space={
            "policies": ["top_p"],
            "adjustments": ["none"],
            "capacities": ["none"],
            "ranges": {"top_p.k_max": 2, "top_p.p": [0.5, 0.5]},
            "placements": ["contiguous"],
        },
    )
    with pytest.raises(InputError, match="only 1 different configs found of 2 trials"):
        run(scenario, tmp_path / "journal")


def test_progress_is_told_after_each_trial(tmp_path: Path) -> None:
    told = []
    tune(
        small_scenario(3),
        fake_report,
        journal=tmp_path / "journal",
        identity="same",
        progress=lambda done, total, what: told.append((done, total, what)),
    )
    assert [(done, total) for done, total, _ in told] == [(1, 3), (2, 3), (3, 3)]
    assert told[0][2] == "top_k(k=2) contiguous"


def test_a_study_file_comes_back_as_it_was(tmp_path: Path) -> None:
    from traces.files import write_json

    study = run(small_scenario(6), tmp_path / "journal")
    write_json(tmp_path / "study.json", study.to_json())
    read = StudyResult.read(tmp_path / "study.json")
    assert (read.trials, read.front) == (study.trials, study.front)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"trials": 3}', '{"trials": [{}]}', '{"trials": [1]}'])
def test_another_file_is_no_study(tmp_path: Path, content: str) -> None:
    path = tmp_path / "study.json"
    path.write_text(content)
    with pytest.raises(InputError) as refused:
        StudyResult.read(path)
    assert str(refused.value) == f"{path}: not a study of moeroute tune; run it again to rewrite the file"


def test_a_missing_study_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such study; make one with moeroute tune -o"):
        StudyResult.read(tmp_path / "study.json")


def trial(number: int, step_s: float, gate_mass: float) -> Trial:
    return Trial(number=number, config=BASELINE, step_s=step_s, gate_mass=gate_mass, report={})


def test_the_front_by_hand() -> None:
    trials = (
        trial(0, 3, 0.9),
        trial(1, 1, 0.5),
        trial(2, 2, 0.4),
        trial(3, 2, 0.7),
        trial(4, 3, 0.9),
        trial(5, 4, 0.8),
    )
    # 2 is slower than 1 and keeps less, 5 than 0; 4 is no better than 0, which was first.
    assert [t.number for t in pareto_front(trials)] == [1, 3, 0]
    assert pareto_front(()) == ()


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12).map(
        lambda points: tuple(trial(number, float(s), g / 4) for number, (s, g) in enumerate(points))
    )
)
def test_no_trial_beats_one_of_the_front_and_each_other_is_matched(trials: tuple[Trial, ...]) -> None:
    front = pareto_front(trials)

    def covers(one: Trial, other: Trial) -> bool:
        return one.step_s <= other.step_s and one.gate_mass >= other.gate_mass

    for member in front:
        assert member in trials
        for other in trials:
            if other.gate_mass > 0 and covers(other, member):
                assert (other.step_s, other.gate_mass) == (member.step_s, member.gate_mass)
    answers = [other for other in trials if other.gate_mass > 0]  # what computes nothing answers nothing
    assert all(any(covers(member, other) for member in front) for other in answers)
    assert all(member in answers for member in front)
    assert [t.step_s for t in front] == sorted({t.step_s for t in front})


def test_two_studies_at_once_on_one_journal_are_refused(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with open_journal(journal), pytest.raises(InputError, match="another moeroute is at work on it"):
        run(small_scenario(3), journal)

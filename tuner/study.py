"""Study: search a scenario's space with Optuna for the front of step time against quality.

Quality is the gate mass that is kept, as a trace tells it, or the loss of a model that the scenario names.

Stopped at any moment and started again, a study goes on: finished trials are read back from its journal, those that
were running are marked failed, and the sampler is seeded from the seed and the number of stored trials, so that it
does not suggest the same ones again. A config is never evaluated twice.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from sim.report import Report
from traces.errors import InputError
from tuner.journal import open_journal, unreadable
from tuner.scenario import Config, Scenario, StudyChoice
from tuner.space import suggest_config

_Direction = Literal["minimize", "maximize"]
_BY_GATE_MASS: tuple[_Direction, ...] = ("minimize", "maximize")  # step_s, gate_mass
_BY_LOSS: tuple[_Direction, ...] = ("minimize", "minimize")  # step_s, loss
_CONFIG, _REPORT, _REPEAT, _IDENTITY = "config", "report", "repeat", "identity"
_TRIES_PER_NEW_CONFIG = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One evaluated config. `number` is Optuna's; `loss`, nats a byte, where a model was asked."""

    number: int
    config: Config
    step_s: float
    gate_mass: float
    report: dict[str, Any]
    loss: float | None = None

    @property
    def quality(self) -> float:
        """More is better: the loss without its sign where there is one, else the gate mass."""
        return self.gate_mass if self.loss is None else -self.loss

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; without a loss where no model was asked."""
        document = {**asdict(self), "config": self.config.model_dump(mode="json")}
        if self.loss is None:
            del document["loss"]
        return document


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyResult:
    """All finished trials, in order, and those that no other beats on both objectives, fastest first.

    `found_before`: how many of them an earlier run had left in the journal.
    """

    trials: tuple[Trial, ...]
    front: tuple[Trial, ...]
    found_before: int = 0

    @property
    def by_loss(self) -> bool:
        """Whether a model's loss was the quality."""
        return any(trial.loss is not None for trial in self.trials)

    def to_json(self) -> dict[str, Any]:
        """The study as a JSON object, the front as trial numbers."""
        return {
            "trials": [trial.to_json() for trial in self.trials],
            "front": [trial.number for trial in self.front],
        }

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `to_json` gave; `InputError` says what is wrong with the file."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            trials = tuple(Trial(**{**t, "config": Config.model_validate(t["config"])}) for t in document["trials"])
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such study; make one with moeroute tune -o {path.parent}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a study of moeroute tune; run it again to rewrite the file") from error
        return cls(trials=trials, front=pareto_front(trials))


def tune(
    scenario: Scenario,
    evaluate: Callable[[Config], Report],
    *,
    journal: Path,
    identity: str,
    loss: Callable[[Config], float] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> StudyResult:
    """Evaluate configs until the journal holds as many finished trials as the scenario asks for.

    `loss`: what a model loses under a config, nats a byte, to go by in place of the gate mass that is kept.
    `identity` is a digest of everything that a trial's result depends on; a journal of another one is refused.
    The baseline is the first trial. `InputError` if the journal is another study's or the space runs out of configs.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with open_journal(journal) as storage:
        directions = _BY_GATE_MASS if loss is None else _BY_LOSS
        study = _open_study(storage, journal, identity, scenario, directions)
        found_before = len(_finished(study))
        _search(study, scenario, evaluate, loss, progress)
        return _result(study, found_before)


def _search(
    study: optuna.Study,
    scenario: Scenario,
    evaluate: Callable[[Config], Report],
    loss: Callable[[Config], float] | None,
    progress: Callable[[int, int, str], None],
) -> None:
    choice = scenario.study
    for cut_off in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(cut_off.number, state=TrialState.FAIL)
    seed = scenario.seed + len(study.get_trials(deepcopy=False))
    sampler, explorer = _sampler(choice, seed), RandomSampler(seed=seed)
    seen = {Config.model_validate(finished.user_attrs[_CONFIG]).key() for finished in _finished(study)}
    misses = 0
    while len(seen) < choice.trials:
        study.sampler = explorer if misses else sampler  # a sampler that repeats itself has settled down too early
        trial = study.ask()
        config = scenario.config if not seen else suggest_config(trial, choice.space)
        if config.key() in seen:
            misses += 1
            trial.set_user_attr(_REPEAT, True)
            study.tell(trial, state=TrialState.FAIL)
            if misses > _TRIES_PER_NEW_CONFIG:
                raise InputError(
                    f"study {scenario.name}: only {len(seen)} different configs found of {choice.trials} trials; "
                    "widen study.space or ask for fewer trials"
                )
            continue
        misses = 0
        report = evaluate(config)
        trial.set_user_attr(_CONFIG, config.model_dump(mode="json"))
        trial.set_user_attr(_REPORT, report.to_json())
        study.tell(trial, [report.step_s, report.gate_mass if loss is None else loss(config)])
        seen.add(config.key())
        progress(len(seen), choice.trials, config.describe())


def _open_study(
    storage: JournalStorage, journal: Path, identity: str, scenario: Scenario, directions: tuple[_Direction, ...]
) -> optuna.Study:
    try:
        others = [name for name in optuna.get_all_study_names(storage) if name != scenario.name]
        study = optuna.create_study(
            study_name=scenario.name, storage=storage, directions=directions, load_if_exists=True
        )
    except (ValueError, KeyError) as error:
        raise unreadable(journal, error) from error
    stored = study.user_attrs.get(_IDENTITY)
    if stored is None and not others:
        study.set_user_attr(_IDENTITY, identity)
    elif stored != identity:
        raise InputError(
            f"{journal}: holds a study of another scenario, trace or profile; "
            "give another --out folder, or remove the journal to start anew"
        )
    return study


def _sampler(choice: StudyChoice, seed: int) -> BaseSampler:
    if choice.sampler == "nsga2":
        return NSGAIISampler(seed=seed)
    return TPESampler(seed=seed)


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _result(study: optuna.Study, found_before: int) -> StudyResult:
    by_loss = study.directions[1] is StudyDirection.MINIMIZE
    trials = tuple(
        Trial(
            number=trial.number,
            config=Config.model_validate(trial.user_attrs[_CONFIG]),
            step_s=trial.values[0],
            gate_mass=trial.user_attrs[_REPORT]["gate_mass"] if by_loss else trial.values[1],
            report=trial.user_attrs[_REPORT],
            loss=trial.values[1] if by_loss else None,
        )
        for trial in _finished(study)
    )
    return StudyResult(trials=trials, front=pareto_front(trials), found_before=found_before)


def pareto_front(trials: tuple[Trial, ...]) -> tuple[Trial, ...]:
    """The trials that none beats: fastest first, each of better quality than all the faster ones.

    A config that computes nothing is the fastest of all, and no answer.
    """
    front: list[Trial] = []
    answers = (trial for trial in trials if trial.gate_mass > 0)
    for trial in sorted(answers, key=lambda t: (t.step_s, -t.quality, t.number)):
        if not front or trial.quality > front[-1].quality:
            front.append(trial)
    return tuple(front)

"""Validation: the baseline, the study's winners and random configs in a real expert-parallel run.

The real run takes the reference model's weights and the very tokens of the validation window, and runs the policy code
that the simulator ran. Configs are interleaved round by round, so that a machine that drifts slows all alike; speed-ups
are ratios inside a round.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from cost_models.profile import Profile
from router.nn.evaluate import held_out_loss, paired_difference
from router.nn.measured_run import Deployment, measure_deployments
from router.nn.store import TrainedModel
from traces.errors import InputError
from traces.progress import Progress, quiet
from tuner.replays import Replays
from tuner.scenario import Config, DisturbanceChoice, LayoutChoice, Scenario, Space
from tuner.space import RandomSuggestions, suggest_config
from tuner.study import StudyResult

# Winners are named by the gate mass that they keep: the fastest trial that keeps as much.
KEPT_FLOORS = (0.99, 0.95, 0.9, 0.8, 0.65)
_LOSS_SEQUENCES = 128
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A config to validate. `role` is `baseline`, `winner` or `random`."""

    name: str
    role: str
    config: Config


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidatedRun:
    """One config as predicted and as measured.

    `measured_step_s` is the mean over steps of each step's median over rounds, a step lasting until its last rank is
    done; `speedup_ci` the 95% bootstrap interval of `speedup_measured`, the median over rounds of baseline time over
    this config's time in the same round. `loss_delta` is nats a byte on held-out text, over the baseline's.
    """

    name: str
    role: str
    config: str
    predicted_step_s: float
    measured_step_s: float
    speedup_predicted: float
    speedup_measured: float
    speedup_ci: tuple[float, float]
    gate_mass: float
    experts_per_token: float
    dropped_share: float
    loss: float
    loss_delta: float
    loss_delta_ci: tuple[float, float]
    stages_predicted_s: dict[str, float]
    stages_measured_s: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """All runs of a validation. `mape` and `spearman` compare predicted with measured step times, raw.

    `drift`: what the calibration's reference probe takes now, over what it took then (None without a profile).
    `best`: the winner with the largest measured speed-up; `confirmed`: some winner's interval lies above 1.
    """

    device: str
    ranks: int
    rounds: int
    runs: tuple[ValidatedRun, ...]
    mape: float
    spearman: float
    gate_mass_against_loss: float
    drift: float | None
    load_average: float
    best: str | None
    confirmed: bool
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """The validation as a JSON object."""
        return asdict(self)


def choose_contenders(baseline: Config, study: StudyResult, space: Space, *, random: int, seed: int) -> list[Contender]:
    """The baseline, the fastest of the front at each floor of kept gate mass, and `random` other configs."""
    contenders = [Contender(name="baseline", role="baseline", config=baseline)]
    taken = {baseline.key()}

    def add(name: str, role: str, config: Config) -> None:
        if config.key() not in taken:
            taken.add(config.key())
            contenders.append(Contender(name=name, role=role, config=config))

    for floor in KEPT_FLOORS:
        keeping = [trial for trial in study.front if trial.gate_mass >= floor]
        if keeping:
            add(f"keeps {floor:.0%}", "winner", keeping[0].config)
    generator = RandomSuggestions(seed)
    for _ in range(100 * random):
        drawn = sum(contender.role == "random" for contender in contenders)
        if drawn == random:
            break
        add(f"random {drawn + 1}", "random", suggest_config(generator, space))
    return contenders


def validate(
    replays: Replays,
    contenders: Sequence[Contender],
    reference: TrainedModel,
    *,
    device: str,
    rounds: int,
    profile: Profile | None,
    progress: Progress = quiet,
) -> Validation:
    """Predict, run and score the contenders, the first of which is the baseline.

    `profile` is what the predictions stand on, if on any: it says how far the machine has drifted since. Errors:
    `InputError` if the trace is not the reference model's, `DeviceError` if the device is missing.
    """
    scenario = replays.scenario
    check_that_it_runs(scenario)
    window = replays.windows["validate"]
    progress(0.0, "predicting")
    reports = [replays.run(c.config, window="validate", fidelity="event", name=c.name)[0] for c in contenders]
    progress(0.05, f"running {len(contenders)} configs on {replays.cluster.ranks} ranks, {rounds} rounds")
    deployments = [
        Deployment(
            policy=c.config.routing_policy(),
            placement=replays.placement(c.config),
            replica_choice=c.config.placement.replica_choice,
            node_of_G=replays.layout.node_of_G,
            history=window.history,
            prices=window.prices(c.config.routing_policy(), replays.placement(c.config)),
        )
        for c in contenders
    ]
    measured = measure_deployments(
        reference, window.trace, window.steps, deployments, rounds=rounds, seed=scenario.seed, device=device
    )
    losses = []
    for index, contender in enumerate(contenders):
        progress(0.5 + 0.5 * index / len(contenders), f"held-out loss of {contender.name}")
        losses.append(
            held_out_loss(
                reference.model,
                reference.corpus,
                contender.config.routing_policy(),
                history=window.history,
                prices=deployments[index].prices,
                sequences=_LOSS_SEQUENCES,
                ranks=replays.cluster.ranks,
                tokens_per_rank=scenario.batch.tokens_per_rank,
            )
        )
    runs = []
    for index, (contender, report) in enumerate(zip(contenders, reports, strict=True)):
        speedup, speedup_ci = paired_speedup(measured.step_s_RJ[:, 0], measured.step_s_RJ[:, index], scenario.seed)
        loss_delta, *loss_delta_ci = paired_difference(losses[index], losses[0])
        runs.append(
            ValidatedRun(
                name=contender.name,
                role=contender.role,
                config=contender.config.describe(),
                predicted_step_s=report.step_s,
                measured_step_s=measured.typical_step_s(index),
                speedup_predicted=reports[0].step_s / report.step_s,
                speedup_measured=speedup,
                speedup_ci=speedup_ci,
                gate_mass=report.gate_mass,
                experts_per_token=report.experts_per_token,
                dropped_share=report.dropped_share,
                loss=losses[index].mean,
                loss_delta=loss_delta,
                loss_delta_ci=(loss_delta_ci[0], loss_delta_ci[1]),
                stages_predicted_s=report.stage_s,
                stages_measured_s=measured.stage_s_by_deployment[index],
            )
        )
    progress(1.0, "done")
    predicted_C = np.array([run.predicted_step_s for run in runs])
    measured_C = np.array([run.measured_step_s for run in runs])
    confirmed, verdict = judge(runs)
    return Validation(
        device=device,
        ranks=replays.cluster.ranks,
        rounds=rounds,
        runs=tuple(runs),
        mape=float(np.abs(predicted_C / measured_C - 1).mean()),
        spearman=float(spearmanr(predicted_C, measured_C).statistic),
        gate_mass_against_loss=float(spearmanr([-run.gate_mass for run in runs], [run.loss for run in runs]).statistic),
        drift=None if profile is None else measured.probe_s / profile.probe_s[0],
        load_average=os.getloadavg()[0],
        best=best_winner(runs),
        confirmed=confirmed,
        verdict=verdict,
    )


def check_that_it_runs(scenario: Scenario) -> None:
    """Raise `InputError` where the scenario simulates what the real run, of MoE layers on healthy ranks, has not."""
    other = {
        "execution.extent": scenario.execution.extent != "moe",
        "execution.overlap": scenario.execution.overlap != "none",
        "layout": scenario.layout != LayoutChoice(),
        "disturbance": scenario.disturbance != DisturbanceChoice(),
        "cluster.degrade": bool(scenario.cluster.degrade),
        "sampled_layers": scenario.sampled_layers is not None,
        "config.placement.resident_share": scenario.config.placement.resident_share < 1,
    }
    for field, differs in other.items():
        if differs:
            raise InputError(
                f"{field}: a real run has MoE layers alone (execution.extent: moe) on healthy ranks, one microbatch at "
                "a time and whole experts, all in memory; leave it out to validate"
            )


def paired_speedup(
    baseline_s_R: NDArray[np.float64], config_s_R: NDArray[np.float64], seed: int
) -> tuple[float, tuple[float, float]]:
    """How many times as fast as the baseline: the median ratio over rounds and its 95% bootstrap interval.

    >>> paired_speedup(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0]), seed=0)
    (2.0, (2.0, 2.0))
    """
    ratio_R = baseline_s_R / config_s_R
    drawn = np.random.default_rng(seed).integers(ratio_R.size, size=(_RESAMPLES, ratio_R.size))
    low, high = np.quantile(np.median(ratio_R[drawn], axis=1), (0.025, 0.975))
    return float(np.median(ratio_R)), (float(low), float(high))


def best_winner(runs: Sequence[ValidatedRun]) -> str | None:
    """The name of the winner with the largest measured speed-up; None without winners."""
    winners = [run for run in runs if run.role == "winner"]
    return max(winners, key=lambda run: run.speedup_measured).name if winners else None


def judge(runs: Sequence[ValidatedRun]) -> tuple[bool, str]:
    """Whether a winner is faster in reality, and a sentence that says so."""
    winners = [run for run in runs if run.role == "winner"]
    if not winners:
        return False, "no winner to validate: the study found nothing that beats the baseline"
    faster = [run for run in winners if run.speedup_ci[0] > 1]
    if not faster:
        best = max(winners, key=lambda run: run.speedup_measured)
        return (
            False,
            f"not confirmed: no winner is surely faster than the baseline in reality; the best {_in_words(best)}",
        )
    return True, f"confirmed: {len(faster)} of {len(winners)} winners are faster in reality. One " + "; one ".join(
        _in_words(run) for run in faster
    )


def _in_words(winner: ValidatedRun) -> str:
    low, high = winner.speedup_ci
    return (
        f"{winner.name} of the gate mass at {winner.speedup_measured:.2f} times the speed [{low:.2f}, {high:.2f}] "
        f"and {winner.loss_delta:+z.3f} nats a byte"
    )

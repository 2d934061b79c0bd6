"""Validation: the baseline, the study's winners and random configs in a real expert-parallel run.

The real run takes the reference model's weights and the very tokens of the validation window, and runs the policy code
that the simulator ran. Configs are interleaved round by round, so that a machine that drifts slows all alike; speed-ups
are ratios inside a round. A config that is a part of an elastic model runs that part alone: its layers, with the inputs
that they have where the others are missing.
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
from router.nn.measured_run import Deployment, RecordedLayers, measure_deployments
from router.nn.store import TrainedModel
from traces.errors import InputError
from traces.progress import Progress, quiet
from tuner.elastic import ElasticReplays
from tuner.replays import Replays
from tuner.scenario import Config, DisturbanceChoice, LayoutChoice, Scenario, Space
from tuner.space import RandomSuggestions, suggest_config
from tuner.study import StudyResult

# Winners are named by the gate mass that they keep: the fastest trial that keeps as much.
KEPT_FLOORS = (0.99, 0.95, 0.9, 0.8, 0.65)
# Those of a study by loss by how much they may lose: the fastest trial within this share of the baseline's loss.
LOSS_CEILINGS = (0.01, 0.02, 0.05, 0.1)
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
    `study_loss`: the loss on the other half of that text, which a study by loss goes by (None: it goes by gate mass).
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
    study_loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """All runs of a validation. `mape` and `spearman` compare predicted with measured step times, raw.

    `gate_mass_against_loss`, or of an elastic scenario `study_loss_against_loss`: how well what the study went by ranks
    the held-out losses (Spearman).
    `drift`: what the calibration's reference probe takes now, over what it took then (None without a profile).
    `best`: the winner with the largest measured speed-up; `confirmed`: some winner's interval lies above 1.
    """

    device: str
    ranks: int
    rounds: int
    runs: tuple[ValidatedRun, ...]
    mape: float
    spearman: float
    gate_mass_against_loss: float | None
    drift: float | None
    load_average: float
    best: str | None
    confirmed: bool
    verdict: str
    study_loss_against_loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The validation as a JSON object, with what the study went by and not the other."""
        document = asdict(self)
        by_loss = self.study_loss_against_loss is not None
        del document["gate_mass_against_loss" if by_loss else "study_loss_against_loss"]
        for run in () if by_loss else document["runs"]:
            del run["study_loss"]
        return document


def choose_contenders(baseline: Config, study: StudyResult, space: Space, *, random: int, seed: int) -> list[Contender]:
    """The baseline, the fastest of the front at each floor of kept gate mass, and `random` other configs.

    Of a study by loss the fastest at each ceiling of what is lost.
    """
    contenders = [Contender(name="baseline", role="baseline", config=baseline)]
    taken = {baseline.key()}

    def add(name: str, role: str, config: Config) -> None:
        if config.key() not in taken:
            taken.add(config.key())
            contenders.append(Contender(name=name, role=role, config=config))

    if study.by_loss:
        named = {f"loss +{share:.0%}": (1 + share) * study.trials[0].quality for share in LOSS_CEILINGS}
    else:
        named = {f"keeps {floor:.0%}": floor for floor in KEPT_FLOORS}
    for name, least in named.items():
        keeping = [trial for trial in study.front if trial.quality >= least]
        if keeping:
            add(name, "winner", keeping[0].config)
    generator = RandomSuggestions(seed)
    for _ in range(100 * random):
        drawn = sum(contender.role == "random" for contender in contenders)
        if drawn == random:
            break
        add(f"random {drawn + 1}", "random", suggest_config(generator, space))
    return contenders


def validate(
    replays: Replays | ElasticReplays,
    contenders: Sequence[Contender],
    reference: TrainedModel,
    *,
    device: str,
    rounds: int,
    profile: Profile | None,
    progress: Progress = quiet,
) -> Validation:
    """Predict, run and score the contenders, the first of which is the baseline.

    `reference` is the model that recorded the trace; of an elastic scenario, its own. `profile` is what the predictions
    stand on, if on any: it says how far the machine has drifted since. Errors: `InputError` if the trace is not the
    reference model's, `DeviceError` if the device is missing.
    """
    scenario, elastic = replays.scenario, replays if isinstance(replays, ElasticReplays) else None
    check_that_it_runs(scenario)
    progress(0.0, "predicting")
    own = [replays.for_config(c.config) for c in contenders]
    reports = [
        of.run(c.config, window="validate", fidelity="event", name=c.name)[0]
        for of, c in zip(own, contenders, strict=True)
    ]
    progress(0.05, f"running {len(contenders)} configs on {replays.cluster.ranks} ranks, {rounds} rounds")
    models = [reference if elastic is None else elastic.model_of(c.config) for c in contenders]
    deployments = _deployments(contenders, own, models)
    measured = measure_deployments(
        deployments, calibrated=replays.trace.model, rounds=rounds, seed=scenario.seed, device=device
    )
    losses = []
    for index, (contender, deployment) in enumerate(zip(contenders, deployments, strict=True)):
        progress(0.5 + 0.5 * index / len(contenders), f"held-out loss of {contender.name}")
        losses.append(
            held_out_loss(
                reference.model,
                reference.corpus,
                deployment.policy,
                history=deployment.history,
                prices=deployment.prices,
                sequences=_LOSS_SEQUENCES,
                ranks=replays.cluster.ranks,
                tokens_per_rank=scenario.batch.tokens_per_rank,
            )
            if elastic is None
            else elastic.held_out(contender.config, use="measure")
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
                study_loss=None if elastic is None else elastic.study_loss(contender.config),
            )
        )
    progress(1.0, "done")
    predicted_C = np.array([run.predicted_step_s for run in runs])
    measured_C = np.array([run.measured_step_s for run in runs])
    confirmed, verdict = judge(runs)
    loss_C = [run.loss for run in runs]
    return Validation(
        device=device,
        ranks=replays.cluster.ranks,
        rounds=rounds,
        runs=tuple(runs),
        mape=float(np.abs(predicted_C / measured_C - 1).mean()),
        spearman=rank_correlation(predicted_C, measured_C),
        gate_mass_against_loss=None if elastic else rank_correlation([-run.gate_mass for run in runs], loss_C),
        study_loss_against_loss=rank_correlation([run.study_loss for run in runs], loss_C) if elastic else None,
        drift=None if profile is None else measured.probe_s / profile.probe_s[0],
        load_average=os.getloadavg()[0],
        best=best_winner(runs),
        confirmed=confirmed,
        verdict=verdict,
    )


def _deployments(
    contenders: Sequence[Contender], own: Sequence[Replays], models: Sequence[TrainedModel]
) -> list[Deployment]:
    """What the ranks run: of each contender, with the replays and the model that are its own."""
    layers: dict[int, RecordedLayers] = {}  # by replays: contenders that run the same part share them
    deployments = []
    for contender, replays, model in zip(contenders, own, models, strict=True):
        window, placement = replays.windows["validate"], replays.placement(contender.config)
        policy = contender.config.routing_policy()
        if id(replays) not in layers:
            layers[id(replays)] = RecordedLayers.of(model, window.trace, window.steps)
        deployments.append(
            Deployment(
                layers=layers[id(replays)],
                policy=policy,
                placement=placement,
                replica_choice=contender.config.placement.replica_choice,
                node_of_G=replays.layout.node_of_G,
                history=window.history,
                prices=window.prices(policy, placement),
            )
        )
    return deployments


def rank_correlation(one_C: Any, other_C: Any) -> float:
    """Spearman's correlation.

    >>> rank_correlation([1, 2, 3], [2.0, 2.5, 9.0])
    1.0
    """
    return float(spearmanr(one_C, other_C).statistic)


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
    what = (
        f"{winner.name} of the gate mass" if winner.study_loss is None else f"with {winner.name} at most in the study"
    )
    return (
        f"{what} at {winner.speedup_measured:.2f} times the speed [{low:.2f}, {high:.2f}] "
        f"and {winner.loss_delta:+z.3f} nats a byte"
    )

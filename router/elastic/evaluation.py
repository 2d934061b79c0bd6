"""Evaluation: what a trained model, whole or a part, knows and costs, by all that this machine can measure."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.elastic.measure import (
    MEASURED_SEQUENCES,
    PartSize,
    k_curve,
    measured_loss,
    size_in_whole,
    step_seconds,
)
from router.nn.evaluate import HeldOutLoss, paired_difference
from router.nn.lm import LanguageModelConfig
from router.nn.store import TrainedModel
from router.subnetwork import SubNetwork
from traces.errors import InputError
from traces.progress import Progress, quiet

TOP_KS = (1, 2, 4, 8)
ROUNDS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class KPoint:
    """The model with `top_k` experts a token in all layers.

    `loss`, nats a byte; `difference` to its loss with its own k, and the ends of its 95% interval, paired by sequence.
    """

    top_k: int
    loss: float
    difference: float
    difference_ci: tuple[float, float]


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Evaluation:
    """A trained model, measured.

    `part` is what it is of a model of `of_layers` layers with `of_experts` experts each: all of it, where it was not
    cut. `loss` on held-out text; `curve` by k; `step_s_R`: CPU seconds of a step of 16 sequences on one thread, once a
    round, and the machine's `load_average` of a minute while they ran.
    """

    part: SubNetwork
    of_layers: int
    of_experts: int
    size: PartSize
    loss: HeldOutLoss
    curve: tuple[KPoint, ...]
    step_s_R: NDArray[np.float64]
    load_average: float

    @property
    def step_s(self) -> tuple[float, float, float]:
        """Median of the rounds, and their quartiles: (median, low, high)."""
        low, median, high = np.quantile(self.step_s_R, (0.25, 0.5, 0.75)).tolist()
        return median, low, high

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, seconds and nats a byte."""
        median_s, low_s, high_s = self.step_s
        return {
            "part": self.part.to_json(),
            "of_layers": self.of_layers,
            "of_experts": self.of_experts,
            "size": self.size.to_json(),
            "loss": {
                domain: {"mean": mean, "standard_error": error}
                for domain, (mean, error) in loss_by_domain(self.loss).items()
            },
            "curve": [asdict(point) for point in self.curve],
            "cpu_step_s": median_s,
            "cpu_step_s_quartiles": [low_s, high_s],
            "cpu_rounds": self.step_s_R.size,
            "load_average": self.load_average,
        }


def evaluate(
    trained: TrainedModel,
    *,
    top_ks: Sequence[int] | None = None,
    rounds: int = ROUNDS,
    sequences: int = MEASURED_SEQUENCES,
    progress: Progress = quiet,
) -> Evaluation:
    """Measure a trained model. `top_ks` (None: those of 1, 2, 4 and 8 that it has experts for): of its curve.

    Errors: `InputError` for a k that it has not enough experts for.
    """
    model, corpus = trained.model, trained.corpus
    top_ks = [k for k in TOP_KS if k <= _most(model.config)] if top_ks is None else list(top_ks)
    for top_k in top_ks:
        if not 1 <= top_k <= _most(model.config):
            raise InputError(f"top k of the curve is {top_k}; the model has experts for 1 to {_most(model.config)}")
    work = len(top_ks) + 2
    progress(0.0, "loss on held-out text")
    whole = model.config.whole
    loss = measured_loss(model, corpus, whole, sequences=sequences)
    points = []
    for done, top_k in enumerate(top_ks, start=1):
        progress(done / work, f"loss with {top_k} experts a token")
        (found,) = k_curve(model, corpus, (top_k,), sequences=sequences)
        difference, low, high = paired_difference(found, loss)
        points.append(KPoint(top_k=top_k, loss=found.mean, difference=difference, difference_ci=(low, high)))
    progress(1 - 1 / work, "seconds of a step")
    step_s_RJ = step_seconds(model, corpus, (whole,), rounds=rounds)
    progress(1.0, "measured")
    return Evaluation(
        part=trained.part,
        of_layers=trained.whole_config.layers,
        of_experts=trained.whole_config.experts,
        size=size_in_whole(trained),
        loss=loss,
        curve=tuple(points),
        step_s_R=step_s_RJ[:, 0],
        load_average=os.getloadavg()[0],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A part beside the model that it was cut out of, which may be a part itself.

    Losses on the same held-out text; `differences`: how much higher that of the part is, by domain and of `all`, with
    the ends of a 95% interval. Both sizes are beside the model that was trained, `of_layers` layers of `of_experts`.
    """

    part: SubNetwork
    of_layers: int
    of_experts: int
    size_before: PartSize
    size_after: PartSize
    loss_before: HeldOutLoss
    loss_after: HeldOutLoss
    differences: dict[str, tuple[float, float, float]]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, nats a byte."""
        before, after = (loss_by_domain(loss) for loss in (self.loss_before, self.loss_after))
        return {
            "part": self.part.to_json(),
            "of_layers": self.of_layers,
            "of_experts": self.of_experts,
            "before": self.size_before.to_json(),
            "after": self.size_after.to_json(),
            "loss": {
                domain: {
                    "before": before[domain][0],
                    "after": after[domain][0],
                    "difference": difference,
                    "difference_ci": [low, high],
                }
                for domain, (difference, low, high) in self.differences.items()
            },
        }


def compare(whole: TrainedModel, cut: TrainedModel, *, sequences: int = MEASURED_SEQUENCES) -> Comparison:
    """What `cut`, a part of `whole`, loses and saves."""
    before, after = (
        measured_loss(one.model, one.corpus, one.model.config.whole, sequences=sequences) for one in (whole, cut)
    )
    return Comparison(
        part=cut.part,
        of_layers=cut.whole_config.layers,
        of_experts=cut.whole_config.experts,
        size_before=size_in_whole(whole),
        size_after=size_in_whole(cut),
        loss_before=before,
        loss_after=after,
        differences=differences_by_domain(after, before),
    )


def loss_by_domain(loss: HeldOutLoss) -> dict[str, tuple[float, float]]:
    """Nats a byte by domain, and of `all`: the mean over sequences and its standard error."""
    found = {}
    error_D, share_D = np.zeros(len(loss.domains)), np.zeros(len(loss.domains))
    for index, name in enumerate(loss.domains):
        loss_N = loss.loss_N[loss.domain_N == index]
        error_D[index], share_D[index] = loss_N.std(ddof=1) / loss_N.size**0.5, loss_N.size / loss.loss_N.size
        found[name] = (float(loss_N.mean()), float(error_D[index]))
    # Every domain has its share of the text by design, so that only what varies inside domains is uncertain.
    found["all"] = (loss.mean, float(np.hypot.reduce(error_D * share_D)))
    return found


def differences_by_domain(first: HeldOutLoss, second: HeldOutLoss) -> dict[str, tuple[float, float, float]]:
    """How much higher the loss of `first` is, by domain and of `all`: `paired_difference` of each."""
    found = {}
    for index, name in enumerate(first.domains):
        of_domain_N = first.domain_N == index
        found[name] = paired_difference(
            replace(first, loss_N=first.loss_N[of_domain_N], domain_N=first.domain_N[of_domain_N]),
            replace(second, loss_N=second.loss_N[of_domain_N], domain_N=second.domain_N[of_domain_N]),
        )
    return {**found, "all": paired_difference(first, second)}


def _most(config: LanguageModelConfig) -> int:
    """The experts that a token can use."""
    return config.experts + config.null_experts

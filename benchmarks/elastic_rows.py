"""The rows of the elastic study: each trained model cut in many ways, what it still knows and what a step of it takes.

What is kept is chosen on one half of the held-out text; losses are of the other half.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from elastic_trainings import (
    CONFIG,
    FULL_FLOPS,
    FULL_SEEDS,
    REDUCED_FLOPS,
    REDUCED_SEEDS,
    SHAPES,
    Training,
    trainings,
)

from router.elastic.extract import in_memory, keep_experts
from router.elastic.importance import Score, expert_importance, importance_text, losses_without, recorded_loss, without
from router.elastic.measure import measured_loss, size_of, step_seconds
from router.nn.lm import LanguageModel
from router.nn.record import record
from router.nn.store import TrainedModel
from router.subnetwork import SubNetwork
from traces.errors import InputError
from traces.files import write_json
from tuner.deployed import deployed_report

Row = dict[str, Any]
K_CURVE = (1, 2, 3, 4, 5, 6, 8, 10, 12)
SHARES = (0.25, 0.5, 0.75)  # of the experts, for one domain
CUT_RECIPES = ("plain", "once_for_all")  # whose models are cut in depth and experts too
PROCESSES = 2
CPU_ROUNDS = 15
# Enough for four decode steps of 8 ranks by 64 streams, in the window that is replayed.
TRACE_TOKENS = 160 * CONFIG.context


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What is trained and cut: `depths`, `experts` and `top_ks` span the grid of parts; `sequences` judge each."""

    seeds: tuple[int, ...]
    flops: float
    depths: tuple[int, ...]
    experts: tuple[int, ...]
    top_ks: tuple[int, ...]
    sequences: int = 256

    @property
    def trainings(self) -> list[Training]:
        """All models."""
        return trainings(self.seeds, self.flops)


WHOLE_STUDY = Study(seeds=FULL_SEEDS, flops=FULL_FLOPS, depths=(6, 5, 4, 3), experts=(16, 12, 8, 4), top_ks=(4, 2, 1))
REDUCED_STUDY = Study(seeds=REDUCED_SEEDS, flops=REDUCED_FLOPS, depths=(6, 4), experts=(16, 8, 4), top_ks=(4, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A part to measure: its shape, and what its experts are chosen by, for which domain's text (None: all)."""

    depth: int = CONFIG.layers
    experts: int = CONFIG.experts
    top_k: int = CONFIG.top_k
    by: Score = "gate_mass"
    domain: str | None = None

    @property
    def name(self) -> str:
        """Its shape, and how it is chosen where that is not by gate mass on all text."""
        chosen = "" if self.by == "gate_mass" else f"-{self.by}"
        return f"{self.depth}x{self.experts}k{self.top_k}{chosen}{'' if self.domain is None else f'-{self.domain}'}"

    @property
    def leading(self) -> SubNetwork:
        """The part of this shape that has the first layers and experts: all of one shape have one size."""
        return SubNetwork.whole(self.depth, self.experts, self.top_k)


def cuts_of(training: Training, study: Study, domains: Sequence[str]) -> list[Cut]:
    """How a model is cut: one that was trained alone not at all."""
    if training.shape is not None:
        depth, experts, top_k = training.shape
        return [Cut(depth=depth, experts=experts, top_k=top_k)]
    cuts = [Cut(top_k=top_k) for top_k in K_CURVE]
    if training.recipe in CUT_RECIPES:
        grid = [
            (depth, experts, top_k)
            for depth in study.depths
            for experts in study.experts
            for top_k in study.top_ks
            if top_k <= experts
        ]
        cuts += [Cut(depth=depth, experts=experts, top_k=top_k) for depth, experts, top_k in (*grid, *SHAPES)]
        cuts += [
            Cut(depth=depth, experts=experts, top_k=top_k, by="reap")
            for depth, experts, top_k in SHAPES
            if experts < CONFIG.experts
        ]
        for experts in (round(share * CONFIG.experts) for share in SHARES):
            cuts += [Cut(experts=experts, domain=domain) for domain in (None, *domains)]
    return list(dict.fromkeys(cuts))


class Cutter:
    """Chooses parts of one model as `choose_part` does; what several parts hang on is measured once."""

    def __init__(self, trained: TrainedModel) -> None:
        self._model, self._corpus = trained.model, trained.corpus
        self._of_depth = {self._model.config.layers: self._model.config.whole}
        self._scores: dict[tuple[int, int, Score, str | None], Any] = {}

    def part(self, cut: Cut) -> SubNetwork:
        """The part that the cut leaves."""
        part = replace(self._layers(cut.depth), top_k_L=(cut.top_k,) * cut.depth)
        if cut.experts == self._model.config.experts:
            return part
        key = (cut.depth, cut.top_k, cut.by, cut.domain)
        if key not in self._scores:
            text_BS = importance_text(self._corpus, self._model.config.context, cut.domain)
            importance = expert_importance(self._model, text_BS, part)
            for by in ("gate_mass", "reap"):
                self._scores[cut.depth, cut.top_k, by, cut.domain] = importance.score_LE(by)
        return keep_experts(part, self._scores[key], cut.experts)

    def _layers(self, depth: int) -> SubNetwork:
        while (least := min(self._of_depth)) > depth:
            part = self._of_depth[least]
            self._of_depth[least - 1] = without(part, int(np.argmin(losses_without(self._model, self._corpus, part))))
        return self._of_depth[depth]


def kept(path: Path, settings: Any, make: Callable[[], Any]) -> Any:
    """What `make` gave before for these settings, from the file; else what it gives now, written there."""
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    try:
        found = json.loads(path.read_bytes())
        if found["key"] == key:
            return found["value"]
    except (OSError, ValueError, TypeError, KeyError):
        pass  # not there, or half of something: made anew
    value = make()
    write_json(path, {"key": key, "value": value})
    return value


def load(training: Training, folder: Path) -> TrainedModel:
    """The model of a training that is done. Errors: `InputError` where it is not there."""
    trained = training.load(folder / "models")
    if trained is None:
        raise InputError(f"{folder / 'models' / training.id}: no model of this training; run the study again")
    return trained


def measure_all(study: Study, folder: Path) -> list[Row]:
    """The rows of all models, two processes at a time, those with the most rows first."""
    rows = []
    order = sorted(
        study.trainings, key=lambda training: training.recipe not in CUT_RECIPES or training.shape is not None
    )
    with get_context("spawn").Pool(PROCESSES) as pool:
        found = pool.imap(_rows_of, [(training, study, folder) for training in order])
        for training, of_model in zip(order, found, strict=True):
            print(f"{training.id}: {len(of_model)} rows", file=sys.stderr, flush=True)
            rows += of_model
    return rows


def _rows_of(work: tuple[Training, Study, Path]) -> list[Row]:
    training, study, folder = work
    return list(_measured_rows(training, study, folder))


def _measured_rows(training: Training, study: Study, folder: Path) -> Iterator[Row]:
    measured = _Measured(training=training, study=study, trained=load(training, folder))
    for cut in cuts_of(training, study, measured.trained.corpus.domains):
        name = f"{training.id}/{cut.name}"
        settings = [measured.trained.info["key"], study.sequences, TRACE_TOKENS, asdict(cut)]
        yield kept(folder / "rows" / f"{name}.json", settings, partial(measured.row, name, cut))


@dataclass(frozen=True, kw_only=True)  # no slots: the cutter is made where a row is not there
class _Measured:
    training: Training
    study: Study
    trained: TrainedModel

    @cached_property
    def _cutter(self) -> Cutter:
        return Cutter(self.trained)

    def row(self, name: str, cut: Cut) -> Row:
        """One part: chosen, judged on the other half of the text, and simulated at deployed widths."""
        model, corpus = self.trained.model, self.trained.corpus
        part = self._cutter.part(cut)
        loss = measured_loss(model, corpus, part, sequences=self.study.sequences)
        size = size_of(_FULL_MODEL, cut.leading)
        trace = record(in_memory(self.trained, part), tokens=TRACE_TOKENS, seed=0)
        report = deployed_report(trace, part, CONFIG.layers)
        by_domain = cut.top_k == CONFIG.top_k and cut.depth == CONFIG.layers
        return {
            "id": name,
            "recipe": self.training.recipe if self.training.shape is None else "alone",
            "seed": self.training.seed,
            "k": cut.top_k,
            "experts": cut.experts,
            "depth": cut.depth,
            "by": cut.by,
            "domain": cut.domain,
            "activation": size.activation,
            "active_share": size.active_share,
            "total_share": size.total_share,
            "bytes": size.weight_bytes,
            "flops_per_token": size.flops_per_token,
            "loss": loss.mean,
            "record_loss": recorded_loss(model, corpus, part),
            "loss_by_domain": loss.by_domain if by_domain else None,
            "sim_h100x8_s": report.step_s,
            "sim_rank_bytes": report.memory.total_bytes,
        }


with torch.device("meta"):  # shapes without weights
    _FULL_MODEL = LanguageModel(CONFIG)


def cpu_seconds(rows: Sequence[Row], study: Study, folder: Path, load_average: Callable[[], float]) -> dict[str, Any]:
    """CPU seconds of a step of each shape, all in turn, in one model: seconds hang on the shape, not on the weights.

    `by_shape`: the median over rounds; `spread`: between quartiles, over the median, of a typical shape.
    """
    shapes = sorted({shape_of(row) for row in rows}, reverse=True)
    training = next(training for training in study.trainings if training.recipe == "once_for_all")
    trained = load(training, folder)

    def measure() -> dict[str, Any]:
        before = load_average()
        parts = [SubNetwork.whole(*shape) for shape in shapes]
        seconds_RJ = step_seconds(trained.model, trained.corpus, parts, rounds=CPU_ROUNDS)
        low_J, median_J, high_J = np.quantile(seconds_RJ, (0.25, 0.5, 0.75), axis=0)
        return {
            "by_shape": [[*shape, seconds] for shape, seconds in zip(shapes, median_J.tolist(), strict=True)],
            "spread": float(np.median((high_J - low_J) / median_J)),
            "rounds": CPU_ROUNDS,
            "load_before": before,
            "load_after": load_average(),
        }

    result: dict[str, Any] = kept(folder / "rows" / "cpu.json", [trained.info["key"], CPU_ROUNDS, shapes], measure)
    return result


def shape_of(row: Row) -> tuple[int, int, int]:
    """(depth, experts, top k)."""
    return row["depth"], row["experts"], row["k"]

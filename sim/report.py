"""Report: what a replay cost and what it kept, in numbers that two people compute alike."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.quality import RoutingQuality
from sim.lower import Work
from sim.memory import MemoryUse
from sim.stages import Stage
from sim.timeline import Timeline

# What each stage of a step belongs to, for a breakdown that fits on a line.
PARTS = {
    "embed": "other",
    "attention": "attention",
    "attention sum": "attention",
    "norm": "attention",
    "dense": "other",
    "gate": "gate",
    "route": "gate",
    "permute": "dispatch",
    "counts": "dispatch",
    "spill weights": "dispatch",
    "dispatch": "dispatch",
    "regroup": "dispatch",
    "shared": "experts",
    "load experts": "experts",
    "experts": "experts",
    "experts down": "experts",
    "ungroup": "combine",
    "return": "combine",
    "combine": "combine",
    "head": "other",
    "sample": "other",
    "host gap": "other",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Metrics of one configuration over the steps of a replay.

    Times are means over steps, seconds. `stage_s`: by stage, the mean over ranks; `breakdown_s`: the same by part of
    the step (attention, gate, dispatch, experts, combine, other). `waiting_s`: the part of the step in which an average
    rank has nothing to do; `waits_s`: by collective, how long an average rank stands at it until the last one comes,
    whether or not it has something else to do. `interval_s`: the step with all costs at the ends of their intervals,
    where that was asked for. `extrapolated`: by stage, the share of its time priced beyond what was measured.
    `token_imbalance` and `active_imbalance`: the largest rank's rows, and its active experts, over the mean rank's,
    averaged over layers and steps. `critical_rank_by_layer`: of each MoE layer, the rank that comes last to its last
    collective in most steps. `gate_mass`: router score kept, as a share of what the model's own top k has.
    `dropped_share` and `rerouted_share`: of chosen pairs; `padding_share`: of computed rows, those of no token;
    `lost_share`: of kept pairs, those whose rank was lost before
    it computed them. `bytes_by_tier`: what crosses links inside nodes and between them, a step.
    """

    name: str
    costs: str
    fidelity: str
    steps: int
    step_s: float
    step_s_by_step: tuple[float, ...]
    tokens_per_s: float
    tokens_per_s_per_rank: float
    stage_s: dict[str, float]
    breakdown_s: dict[str, float]
    waiting_s: float
    waits_s: dict[str, float]
    interval_s: tuple[float, float] | None
    extrapolated: dict[str, float]
    token_imbalance: float
    active_imbalance: float
    critical_rank_by_layer: tuple[int, ...]
    experts_per_token: float
    gate_mass: float
    dropped_share: float
    rerouted_share: float
    padding_share: float
    lost_share: float
    bytes_by_tier: dict[str, float]
    expert_flops_per_token: float
    memory: MemoryUse
    completed: bool = False

    @property
    def network_bytes_per_step(self) -> float:
        """Bytes between ranks."""
        return sum(self.bytes_by_tier.values())

    @property
    def extrapolated_share(self) -> float:
        """The share of all stages' time that is priced beyond what was measured."""
        total_s = sum(self.stage_s.values())
        return sum(self.stage_s[name] * share for name, share in self.extrapolated.items()) / total_s

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {
            **asdict(self),
            "network_bytes_per_step": self.network_bytes_per_step,
            "fits": self.memory.fits,
            "memory_bytes": self.memory.total_bytes,
        }


def summarize(
    *,
    name: str,
    costs: str,
    fidelity: str,
    works: Sequence[Sequence[Work]],
    timelines: Sequence[Timeline],
    interval_s: tuple[float, float] | None = None,
    quality: RoutingQuality,
    memory: MemoryUse,
    flops_per_token: float,
    completed: bool = False,
) -> Report:
    """Put the steps of one replay, each of one or more microbatches, into one report."""
    step_s_by_step = [timeline.step_s for timeline in timelines]
    step_s = float(np.mean(step_s_by_step))
    every_work = [work for of_step in works for work in of_step]
    ranks = every_work[0].ranks
    tokens = sum(_tokens_done(of_step, timeline) for of_step, timeline in zip(works, timelines, strict=True)) / len(
        works
    )
    stage_s = _mean_of([_stage_s(timeline) for timeline in timelines])
    breakdown_s: dict[str, float] = {}
    for stage, seconds in stage_s.items():
        part = PARTS.get(stage, "other")
        breakdown_s[part] = breakdown_s.get(part, 0.0) + seconds
    rows_by_rank = [work.rows_LGS.sum(axis=2) for work in every_work]
    active_by_rank = [(work.rows_LGS > 0).sum(axis=2) for work in every_work]
    return Report(
        name=name,
        costs=costs,
        fidelity=fidelity,
        steps=len(works),
        step_s=step_s,
        step_s_by_step=tuple(step_s_by_step),
        tokens_per_s=tokens / step_s,
        tokens_per_s_per_rank=tokens / step_s / ranks,
        stage_s=stage_s,
        breakdown_s=breakdown_s,
        waiting_s=float(np.mean([timeline.idle_G().mean() for timeline in timelines])),
        waits_s=_mean_of([_waits_s(timeline) for timeline in timelines]),
        interval_s=interval_s,
        extrapolated=_extrapolated(timelines),
        token_imbalance=_imbalance(rows_by_rank),
        active_imbalance=_imbalance(active_by_rank),
        critical_rank_by_layer=_critical_ranks(timelines),
        experts_per_token=quality.experts_per_token,
        gate_mass=quality.gate_mass,
        dropped_share=quality.dropped_share,
        rerouted_share=quality.rerouted_share,
        padding_share=float(np.mean([work.padding_share for work in every_work])),
        lost_share=_lost_share(works, timelines),
        bytes_by_tier=_mean_of([_sum_of([work.bytes_by_tier() for work in of_step]) for of_step in works]),
        expert_flops_per_token=flops_per_token,
        memory=memory,
        completed=completed,
    )


def _tokens_done(works: Sequence[Work], timeline: Timeline) -> int:
    """Tokens of a step that came to its end: those of ranks that were lost did not."""
    lost_G = np.isnan(timeline.end_OG).any(axis=0)
    return sum(int(work.tokens_G[~lost_G].sum()) for work in works)


def _sum_of(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _mean_of(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: value / len(parts) for name, value in _sum_of(parts).items()}


def _stage_s(timeline: Timeline) -> dict[str, float]:
    """Seconds that an average rank runs each stage."""
    program = timeline.program
    mean_O = np.nansum(timeline.end_OG - timeline.start_OG, axis=1) / program.ranks
    return _by_name(program.stages, program.stage_O, mean_O)


def _waits_s(timeline: Timeline) -> dict[str, float]:
    """Seconds that an average rank stands at each kind of collective."""
    program = timeline.program
    met_O = program.stream_O == 1
    waited_OG = timeline.start_OG[met_O] - timeline.arrival_OG[met_O]
    mean_O = np.nansum(np.maximum(waited_OG, 0), axis=1) / program.ranks
    return _by_name(program.stages, program.stage_O[met_O], mean_O)


def _by_name(stages: Sequence[Stage], stage_O: NDArray[np.int64], value_O: NDArray[np.float64]) -> dict[str, float]:
    value_by_stage = np.bincount(stage_O, weights=value_O, minlength=len(stages))
    present = np.bincount(stage_O, minlength=len(stages)) > 0
    total: dict[str, float] = {}
    for stage, value, is_there in zip(stages, value_by_stage, present, strict=True):
        if is_there:
            total[stage.name] = total.get(stage.name, 0.0) + float(value)
    return total


def _extrapolated(timelines: Sequence[Timeline]) -> dict[str, float]:
    """By stage, the share of its priced seconds that lies beyond what was measured."""
    total_s: dict[str, float] = {}
    beyond_s: dict[str, float] = {}
    for timeline in timelines:
        for stage in timeline.program.stages:
            total_s[stage.name] = total_s.get(stage.name, 0.0) + float(stage.seconds_LG.sum())
            if stage.extrapolated_LG is not None:
                beyond = float(stage.seconds_LG[stage.extrapolated_LG].sum())
                beyond_s[stage.name] = beyond_s.get(stage.name, 0.0) + beyond
    return {name: seconds / total_s[name] for name, seconds in beyond_s.items() if seconds > 0}


def _critical_ranks(timelines: Sequence[Timeline]) -> tuple[int, ...]:
    """The rank that comes last to each layer's last exchange of tokens, the commonest over steps and microbatches."""
    votes: dict[int, list[int]] = {}
    for timeline in timelines:
        program = timeline.program
        moves = np.array([stage.exchange is not None for stage in program.stages])
        exchanges = np.flatnonzero(moves[program.stage_O])
        last = {(int(program.layer_O[o]), int(program.lane_O[o])): int(o) for o in exchanges}
        for (layer, _), operation in last.items():
            arrival_G = timeline.arrival_OG[operation]
            votes.setdefault(layer, []).append(int(np.nanargmax(arrival_G)))
    return tuple(int(np.bincount(ranks).argmax()) for _, ranks in sorted(votes.items()))


def _lost_share(works: Sequence[Sequence[Work]], timelines: Sequence[Timeline]) -> float:
    """Of kept pairs, those whose experts some rank never ran to the end: part of an expert's width is no result."""
    kept = lost = 0
    for of_step, timeline in zip(works, timelines, strict=True):
        program = timeline.program
        never_ran_OG = np.isnan(timeline.end_OG)
        kept += sum(int(_kept_rows_LS(work)[work.row_of_layer].sum()) for work in of_step)
        lost_groups: dict[tuple[int, int, int], NDArray[np.bool_]] = {}
        for operation in np.flatnonzero(never_ran_OG.any(axis=1)):
            if program.name_O[operation] in ("experts", "experts down"):
                lane, row = int(program.lane_O[operation]), int(program.row_O[operation])
                groups = of_step[lane].layout.expert_groups
                lost_X = never_ran_OG[operation].reshape(groups, -1).any(axis=1)
                key = (lane, int(program.layer_O[operation]), row)
                lost_groups[key] = lost_groups.get(key, np.zeros(groups, dtype=bool)) | lost_X
        for (lane, _, row), lost_X in lost_groups.items():
            lost += int(_kept_rows_LS(of_step[lane])[row].reshape(lost_X.size, -1)[lost_X].sum())
    return lost / kept if kept else 0.0


def _kept_rows_LS(work: Work) -> NDArray[np.int64]:
    return work.rows_LS if work.padding is None else work.rows_LS - work.padding.rows_LS


def _imbalance(loads_LG: Sequence[NDArray[np.int64]]) -> float:
    return float(np.mean([load.max(axis=1) / np.maximum(load.mean(axis=1), 1e-9) for load in loads_LG]))

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Metrics of one configuration over the steps of a replay.

    Times are means over steps, seconds. `stage_s`: by stage, the mean over ranks; `waiting_s`: the part of the step in
    which an average rank has nothing to do. `interval_s`: the step with all costs at the ends of their intervals, where
    that was asked for. `extrapolated`: by stage, the share of its time priced beyond what was measured.
    `token_imbalance` and `active_imbalance`: the largest rank's rows, and its active experts, over the mean rank's,
    averaged over layers and steps. `gate_mass`: router score kept, as a share of what the model's own top k has.
    `dropped_share`: of chosen pairs.
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
    waiting_s: float
    interval_s: tuple[float, float] | None
    extrapolated: dict[str, float]
    token_imbalance: float
    active_imbalance: float
    experts_per_token: float
    gate_mass: float
    dropped_share: float
    network_bytes_per_step: float
    expert_flops_per_token: float
    memory: MemoryUse

    @property
    def extrapolated_share(self) -> float:
        """The share of all stages' time that is priced beyond what was measured."""
        total_s = sum(self.stage_s.values())
        return sum(self.stage_s[name] * share for name, share in self.extrapolated.items()) / total_s

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {**asdict(self), "fits": self.memory.fits, "memory_bytes": self.memory.total_bytes}


def summarize(
    *,
    name: str,
    costs: str,
    fidelity: str,
    works: Sequence[Work],
    stages: Sequence[Sequence[Stage]],
    timelines: Sequence[Timeline],
    interval_s: tuple[float, float] | None = None,
    quality: RoutingQuality,
    memory: MemoryUse,
    flops_per_token: float,
) -> Report:
    """Put the steps of one replay into one report."""
    step_s_by_step = [timeline.step_s for timeline in timelines]
    step_s = float(np.mean(step_s_by_step))
    ranks = works[0].ranks
    tokens = float(np.mean([work.tokens_G.sum() for work in works]))
    stage_s = {
        stage.name: float(np.mean([s[index].seconds_LG.sum(axis=0).mean() for s in stages]))
        for index, stage in enumerate(stages[0])
    }
    rows_by_rank = [work.rows_LGS.sum(axis=2) for work in works]
    active_by_rank = [(work.rows_LGS > 0).sum(axis=2) for work in works]
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
        interval_s=interval_s,
        extrapolated=_extrapolated(stages),
        waiting_s=float(np.mean([timeline.idle_G().mean() for timeline in timelines])),
        token_imbalance=_imbalance(rows_by_rank),
        active_imbalance=_imbalance(active_by_rank),
        experts_per_token=quality.experts_per_token,
        gate_mass=quality.gate_mass,
        dropped_share=quality.dropped_share,
        network_bytes_per_step=float(np.mean([_network_bytes(work) for work in works])),
        expert_flops_per_token=flops_per_token,
        memory=memory,
    )


def _extrapolated(stages: Sequence[Sequence[Stage]]) -> dict[str, float]:
    shares = {}
    for index, stage in enumerate(stages[0]):
        total_s = sum(float(s[index].seconds_LG.sum()) for s in stages)
        beyond_s = sum(
            float(s[index].seconds_LG[mask].sum()) for s in stages if (mask := s[index].extrapolated_LG) is not None
        )
        if beyond_s > 0:
            shares[stage.name] = beyond_s / total_s
    return shares


def _imbalance(loads_LG: Sequence[NDArray[np.int64]]) -> float:
    return float(np.mean([load.max(axis=1) / np.maximum(load.mean(axis=1), 1e-9) for load in loads_LG]))


def _network_bytes(work: Work) -> float:
    away_GG = ~np.eye(work.ranks, dtype=bool)
    return float(sum(hop.bytes_LGG[:, away_GG].sum() for hop in (*work.dispatch, *work.combine)))

"""What there is to show of a simulated scenario, in arrays that are small whatever was simulated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cost_models.cluster import Cluster
from cost_models.kernels.token_traffic import bytes_between_ranks
from sim.layout import Layout
from sim.lower import Work
from sim.report import Report
from sim.timeline import Timeline
from tuner.replays import Replays


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedScenario:
    """One scenario on the page.

    `facts`: lines that describe it. `bound`: the analytic report. `timeline`: of the first step. `layers_L`: the
    simulated MoE layers. Means over steps: `bytes_GG` that source ranks send to others in a dispatch, on every leg,
    averaged over the model's layers; `rows_LG` that a rank computes; `active_LG` experts of a rank with any row, in
    one microbatch.
    """

    name: str
    facts: tuple[str, ...]
    report: Report
    bound: Report
    cluster: Cluster
    timeline: Timeline
    layers_L: NDArray[np.int64]
    bytes_GG: NDArray[np.float64]
    rows_LG: NDArray[np.float64]
    active_LG: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        name: str,
        replays: Replays,
        report: Report,
        bound: Report,
        timelines: Sequence[Timeline],
        works: Sequence[Sequence[Work]],
    ) -> Self:
        """Of what `Replays.run` gave."""
        microbatches = [work for of_step in works for work in of_step]
        steps = len(works)
        return cls(
            name=name,
            facts=_facts(replays, report),
            report=report,
            bound=bound,
            cluster=replays.cluster,
            timeline=timelines[0],
            layers_L=replays.windows["tune"].layers,
            bytes_GG=np.sum([_dispatched_GG(work) for work in microbatches], axis=0) / steps,
            rows_LG=np.sum([work.rows_LGS.sum(axis=2) for work in microbatches], axis=0) / steps,
            active_LG=np.mean([(work.rows_LGS > 0).sum(axis=2) for work in microbatches], axis=0),
        )


def _facts(replays: Replays, report: Report) -> tuple[str, ...]:
    scenario, model = replays.scenario, replays.trace.model
    sampled = "" if scenario.sampled_layers is None else f" ({scenario.sampled_layers} of them simulated)"
    dtype = scenario.dispatch_dtype or "the dtype of activations"
    batch, overlap = scenario.batch, scenario.execution.overlap.replace("_", " ")
    what = f"{model.name}, {model.layers} MoE layers{sampled}"
    how = f"dispatch {scenario.protocol.replace('_', ' ')} in {dtype}; overlap: {overlap}"
    return (
        f"{what}; steps: {report.steps} of {batch.tokens_per_rank:,} tokens a rank, {batch.phase}.",
        f"{replays.cluster.name}{_shared(replays.layout)}; costs: {report.costs}.",
        f"{report.name}; {how}.",
        *_seldom(report),
        *(f"Fault: {fault} s." for fault in scenario.disturbance.faults),
    )


def _seldom(report: Report) -> list[str]:
    """What most scenarios have nothing of."""
    shares = {"pairs rerouted": report.rerouted_share, "rows of padding": report.padding_share}
    shown = [f"{name}: {share:.1%}" for name, share in shares.items() if share]
    lines = [f"{', '.join(shown)}.".capitalize()] if shown else []
    return lines + (["Candidates beyond the recorded ones were completed by a model."] if report.completed else [])


def _shared(layout: Layout) -> str:
    """What neighbouring ranks share."""
    shared = {"heads": layout.attention_tensor, "experts": layout.expert_tensor}
    return "".join(f"; {size} ranks share {what}" for what, size in shared.items() if size > 1)


def _dispatched_GG(work: Work) -> NDArray[np.float64]:
    """Bytes of a dispatch from rank to other rank, layer by layer to spare memory, the mean."""
    exchange = work.exchange("dispatch")
    total_GG = np.zeros((work.ranks, work.ranks))
    for row, layers in enumerate(np.bincount(work.row_of_layer, minlength=work.layers).tolist()):
        if layers:
            total_GG += layers * bytes_between_ranks(exchange.at(row))[0]
    np.fill_diagonal(total_GG, 0.0)
    return total_GG / len(work.row_of_layer)

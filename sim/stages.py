"""Stages: a step's work as the ordered stages of its layers, priced. Both simulators walk this one list.

A compute stage takes each rank its own time. A communication stage is a rendezvous: it starts when the last rank
arrives and ends for all at once.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cost_models.ops import AllToAll, Combine, CostModel, Experts, Gate, Operation, Permute, Regroup
from sim.lower import Hop, Work
from traces.model import ModelSpec

Stream = Literal["compute", "communication"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of every layer: `seconds_LG` by layer and rank; communication takes all ranks the same.

    `under_next`: a compute stage that the rank runs while the next communication stage is under way.
    """

    name: str
    stream: Stream
    seconds_LG: NDArray[np.float64]
    under_next: bool = False


def stages_of(work: Work, model: ModelSpec, costs: CostModel) -> list[Stage]:
    """The stages of one microbatch, in order, priced by `costs`."""
    layers, ranks = work.rows_LS.shape[0], work.ranks
    tokens_LG = np.broadcast_to(work.tokens_G, (layers, ranks))
    sent_LG, received_LG = work.pairs_LGG.sum(axis=2), work.pairs_LGG.sum(axis=1)
    rows_LGS = work.rows_LGS

    def compute(name: str, operation: Operation, *, under_next: bool = False) -> Stage:
        seconds_LG = np.broadcast_to(costs.seconds(operation), (layers, ranks))
        return Stage(name=name, stream="compute", seconds_LG=seconds_LG, under_next=under_next)

    def communicate(name: str, hops: tuple[Hop, ...]) -> Stage:
        seconds_L = np.sum([costs.seconds(AllToAll(bytes_XGG=hop.bytes_LGG)) for hop in hops], axis=0)
        return Stage(name=name, stream="communication", seconds_LG=np.broadcast_to(seconds_L[:, None], (layers, ranks)))

    def experts(rows_XS: NDArray[np.int64], expert_hidden: int) -> Experts:
        return Experts(
            rows_XS=rows_XS,
            hidden=model.hidden,
            expert_hidden=expert_hidden,
            matrices=model.expert_matrices,
            weight_bytes=model.weight_bytes,
            row_bytes=model.row_bytes,
        )

    regroup = Regroup(rows_X=received_LG, segments=rows_LGS.shape[2] * ranks, row_bytes=model.row_bytes)
    pairs_LG = tokens_LG * work.route.width
    counts_LGG = np.full((layers, ranks, ranks), float(work.count_bytes))
    stages = [
        compute("gate", Gate(tokens_X=tokens_LG, hidden=model.hidden, experts=model.experts)),
        compute("route", work.route),
        compute("permute", Permute(pairs_X=pairs_LG, rows_X=sent_LG, row_bytes=model.row_bytes)),
        communicate("counts", (Hop(tier="all", bytes_LGG=counts_LGG),)),
    ]
    if model.shared_experts:
        shared_LG1 = np.repeat(tokens_LG[:, :, None], model.shared_experts, axis=2)
        stages.append(compute("shared", experts(shared_LG1, model.shared_hidden), under_next=True))
    return [
        *stages,
        communicate("dispatch", work.dispatch),
        compute("regroup", regroup),
        compute("experts", experts(rows_LGS, model.expert_hidden)),
        compute("ungroup", regroup),
        communicate("return", work.combine),
        compute("combine", Combine(rows_X=sent_LG, tokens_X=tokens_LG, row_bytes=model.row_bytes)),
    ]

"""Analytic: the step time in closed form, rank by rank as arrays. A lower bound of the event simulation.

Nothing contends here but what the cost model already counts; each collective starts when the last rank is ready.
"""

from collections.abc import Sequence

import numpy as np

from sim.stages import Stage
from sim.timeline import Interval, Timeline


def simulate_analytic(stages: Sequence[Stage]) -> Timeline:
    """Walk the stages layer by layer, all ranks at once."""
    layers, ranks = stages[0].seconds_LG.shape
    ready_G = np.zeros(ranks)
    hidden_until_G = np.zeros(ranks)
    intervals: list[Interval] = []
    for layer in range(layers):
        for stage in stages:
            seconds_G = stage.seconds_LG[layer]
            if stage.stream == "communication":
                start_G = np.full(ranks, ready_G.max())
                end_G = start_G + seconds_G
                ready_G = np.maximum(end_G, hidden_until_G)
            else:
                start_G = np.maximum(ready_G, hidden_until_G)
                end_G = start_G + seconds_G
                if stage.under_next:
                    hidden_until_G = end_G
                else:
                    ready_G = end_G
            intervals += [
                Interval(
                    rank=rank,
                    stream=stage.stream,
                    operation=stage.name,
                    layer=layer,
                    start_s=float(start_G[rank]),
                    end_s=float(end_G[rank]),
                )
                for rank in range(ranks)
            ]
    return Timeline.of(ranks, intervals)

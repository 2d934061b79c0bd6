"""Analytic: the step time in closed form, all ranks at once. A lower bound of the event simulation.

Links carry what the cost model loads onto the busiest of them; nothing varies and nothing fails. Collectives come in
one order for all ranks, so that one pass over them is enough: each starts when the last of its ranks has come, and what
ranks compute beside it is known by then.
"""

from typing import Any

import numba
import numpy as np

from sim.program import Program
from sim.timeline import Timeline

_NEVER = np.inf


def simulate_analytic(program: Program) -> Timeline:
    """Go through the collectives once."""
    start_OG = np.full(program.seconds_OG.shape, np.nan)
    end_OG = np.full(program.seconds_OG.shape, np.nan)
    _walk(
        program.seconds_OG,
        program.stream_O,
        program.after_O,
        program.feed_O,
        program.group_O,
        1 - program.sms_O,
        program.pace_O,
        start_OG,
        end_OG,
    )
    return Timeline(program=program, start_OG=start_OG, end_OG=end_OG)


@numba.njit(cache=True)
def _walk(
    seconds_OG: Any,
    stream_O: Any,
    after_O: Any,
    feed_O: Any,
    group_O: Any,
    free_sms_O: Any,
    pace_O: Any,
    start_OG: Any,
    end_OG: Any,
) -> None:
    operations, ranks = seconds_OG.shape
    computed_C = np.flatnonzero(stream_O == 0)
    whole = (computed_C, after_O, seconds_OG, start_OG, end_OG)
    every = computed_C.size
    done_G = np.zeros(ranks, dtype=np.int64)  # compute operations that are done
    left_G = np.full(ranks, -1.0)  # seconds left of the next one; -1: not begun
    now_G = np.zeros(ranks)  # until when the compute stream is known
    met_G = np.zeros(ranks)  # when the last collective ended
    for o in range(operations):
        if stream_O[o] == 0:
            continue
        for first in range(0, ranks, group_O[o]):
            members = range(first, first + group_O[o])
            start = seconds = 0.0
            for g in members:
                if done_G[g] < feed_O[o]:
                    _advance(g, _NEVER, 1.0, feed_O[o], done_G, left_G, now_G, whole)
                come = 0.0 if feed_O[o] == 0 else end_OG[computed_C[feed_O[o] - 1], g]
                start = max(start, come, met_G[g])
                seconds = max(seconds, seconds_OG[o, g])
            end = start + seconds
            beside = free_sms_O[o] * pace_O[o]
            if beside < 1:
                for g in members:
                    _advance(g, start, 1.0, every, done_G, left_G, now_G, whole)
                    end = max(end, _end_beside(g, start, seconds, beside, pace_O[o], done_G, left_G, whole))
                for g in members:
                    _advance(g, end, beside, every, done_G, left_G, now_G, whole)
            for g in members:
                start_OG[o, g], end_OG[o, g] = start, end
                met_G[g] = end
    for g in range(ranks):
        _advance(g, _NEVER, 1.0, every, done_G, left_G, now_G, whole)


@numba.njit(cache=True)
def _advance(g: int, until: float, pace: float, limit: int, done_G: Any, left_G: Any, now_G: Any, whole: Any) -> None:
    """Run a rank's compute stream up to `until` or to `limit` operations, at `pace`, as far as collectives let it."""
    computed_C, after_O, seconds_OG, start_OG, end_OG = whole
    while done_G[g] < limit:
        o = computed_C[done_G[g]]
        if left_G[g] < 0:
            start = now_G[g]
            if after_O[o] >= 0:
                if np.isnan(end_OG[after_O[o], g]):
                    return
                start = max(start, end_OG[after_O[o], g])
            if start >= until:
                return
            start_OG[o, g] = now_G[g] = start
            left_G[g] = seconds_OG[o, g]
        end = now_G[g] + left_G[g] / pace
        if end > until:
            left_G[g] -= (until - now_G[g]) * pace
            now_G[g] = until
            return
        end_OG[o, g] = now_G[g] = end
        left_G[g] = -1.0
        done_G[g] += 1


@numba.njit(cache=True)
def _end_beside(
    g: int, start: float, seconds: float, beside: float, own: float, done_G: Any, left_G: Any, whole: Any
) -> float:
    """When a rank has done its part of a collective that slows, and is slowed by, what is computed beside it."""
    computed_C, after_O, seconds_OG, _, end_OG = whole
    now, moving, c, left = start, seconds, done_G[g], left_G[g]
    while c < computed_C.size:
        o = computed_C[c]
        if left < 0:
            if after_O[o] >= 0 and np.isnan(end_OG[after_O[o], g]):
                break  # waits for this collective, or a later one
            left = seconds_OG[o, g]
        together = left / beside
        if moving <= together * own:
            return now + moving / own
        moving -= together * own
        now += together
        left = -1.0
        c += 1
    return now + moving

"""Windows of a trace for placing: plan on the first requests, choose on later ones, judge by the last."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sim.planning import rows_LE
from traces.batching import PHASE_CODES, Phase, Step, make_steps, split_requests
from traces.errors import InputError
from traces.trace import RoutingTrace

_SHARES = (2.0, 1.0, 2.0)  # of the requests: plan, choose, judge
_TOKENS_A_RANK = (64, 32, 16, 8, 4, 2, 1)  # what is tried where nobody says, the first that leaves enough windows
_ENOUGH_WINDOWS = 4
_MOST_WINDOWS = 12
_PLANNED_STEPS, _CHOOSING_STEPS, _STEPS_A_WINDOW = 64, 12, 8


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Window:
    """Some requests and the steps that are made of them."""

    trace: RoutingTrace
    steps: Sequence[Step]

    @property
    def requests(self) -> int:
        """How many there are."""
        return _requests(self.trace)

    def rows_WLE(self) -> NDArray[np.int64]:
        """The rows of each expert in each step, by the model's own top k."""
        return np.stack([rows_LE(self.trace, step) for step in self.steps])


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class PlacingWindows:
    """`plan` is read by algorithms, `choose` picks one of them, and `held_out` blocks of requests judge it."""

    plan: Window
    choose: Window
    held_out: Sequence[Window]
    tokens_per_rank: int

    @classmethod
    def of(cls, trace: RoutingTrace, *, phase: Phase, ranks: int, tokens_per_rank: int | None) -> Self:
        """Cut a trace, of whose tokens those of `phase` count if it has both, by whole requests in order.

        `tokens_per_rank` None: the most, up to 64, of which the held-out requests fill steps in several windows.
        Errors: `InputError` where requests are too few, or tokens fill no step.
        """
        in_phase_T = trace.phase_T == PHASE_CODES[phase]
        parts = split_requests(trace.take(in_phase_T) if in_phase_T.any() else trace, _SHARES)
        if tokens_per_rank is not None:
            return cls._cut(parts, phase, ranks, tokens_per_rank)
        cuts = []
        for tokens in _TOKENS_A_RANK[:-1]:
            with suppress(InputError):
                cuts.append(cls._cut(parts, phase, ranks, tokens))
                if len(cuts[-1].held_out) >= _ENOUGH_WINDOWS:
                    return cuts[-1]
        cuts.append(cls._cut(parts, phase, ranks, _TOKENS_A_RANK[-1]))  # what is too few for this is too few for all
        return max(cuts, key=lambda cut: len(cut.held_out))

    @classmethod
    def _cut(cls, parts: Sequence[RoutingTrace], phase: Phase, ranks: int, tokens_per_rank: int) -> Self:
        def window(part: RoutingTrace, limit: int) -> Window:
            steps = make_steps(part, phase=phase, tokens_per_rank=tokens_per_rank, ranks=ranks, limit=limit)
            return Window(trace=part, steps=steps)

        plan, choose, rest = parts
        try:
            return cls(
                plan=window(plan, _PLANNED_STEPS),
                choose=window(choose, _CHOOSING_STEPS),
                held_out=_most_blocks(rest, lambda part: window(part, _STEPS_A_WINDOW)),
                tokens_per_rank=tokens_per_rank,
            )
        except InputError as error:
            counts = [_requests(part) for part in parts]
            cut = "{} to plan on, {} to choose by and {} to judge by".format(*counts)
            raise InputError(f"the trace's {sum(counts)} requests are cut into {cut}; {error}") from error


def _most_blocks(trace: RoutingTrace, window: Callable[[RoutingTrace], Window]) -> list[Window]:
    """The trace in as many blocks of whole requests, up to `_MOST_WINDOWS`, as each still fill a step."""
    requests = _requests(trace)
    for blocks in range(min(requests, _MOST_WINDOWS), 1, -1):
        with suppress(InputError):
            return [window(part) for part in split_requests(trace, [1.0] * blocks)]
    return [window(trace)]


def _requests(trace: RoutingTrace) -> int:
    return int(np.unique(trace.request_T).size)

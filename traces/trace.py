"""RoutingTrace: which experts a real model's routers ranked highest, token by token and layer by layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from traces.errors import InputError
from traces.model import ModelSpec, ScoreKind

PREFILL, DECODE = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTrace:
    """The recorded candidates of T tokens in L layers, C a token, best first.

    `expert_ids_TLC` uint16; `gates_TLC` float16 or None: the router's score of each candidate, of the kind
    `score_kind` says; `request_T` int32, `position_T` int32 (in the request), `phase_T` uint8 (`PREFILL` or
    `DECODE`), `domain_T` uint8 or None, an index into `domains`. `text` identifies the text that the tokens
    came from, so that a real run can repeat it; `source` says in a line where the trace is from.
    `recorded_candidates`: how many of the C were recorded, where a model filled in the others
    (`traces.completion`); None where all were.
    """

    model: ModelSpec
    expert_ids_TLC: NDArray[np.uint16]
    gates_TLC: NDArray[np.float16] | None
    request_T: NDArray[np.int32]
    position_T: NDArray[np.int32]
    phase_T: NDArray[np.uint8]
    domain_T: NDArray[np.uint8] | None = None
    domains: tuple[str, ...] = ()
    score_kind: ScoreKind
    source: str
    text: Mapping[str, Any] = field(default_factory=dict)
    recorded_candidates: int | None = None

    def __post_init__(self) -> None:
        ids = self.expert_ids_TLC
        if ids.ndim != 3 or ids.shape[1] != self.model.layers or ids.shape[0] == 0:
            raise InputError(
                f"trace {self.source}: expert ids have shape {ids.shape}; "
                f"expected [tokens > 0, {self.model.layers} layers, candidates]"
            )
        if not self.model.top_k <= ids.shape[2] <= self.model.all_experts:
            raise InputError(
                f"trace {self.source}: {ids.shape[2]} candidates a token; "
                f"expected {self.model.top_k} (top_k) to {self.model.all_experts} (experts)"
            )
        if ids.max() >= self.model.all_experts:
            raise InputError(
                f"trace {self.source}: expert id {ids.max()} in a model of {self.model.all_experts} experts; "
                "is the model the right one, or are these physical slots?"
            )
        recorded = self.recorded_candidates
        if recorded is not None and not self.model.top_k <= recorded <= ids.shape[2]:
            raise InputError(
                f"trace {self.source}: recorded_candidates is {recorded}; "
                f"expected {self.model.top_k} (top_k) to {ids.shape[2]} (candidates), or None for all"
            )
        if self.gates_TLC is not None and self.gates_TLC.shape != ids.shape:
            raise InputError(f"trace {self.source}: gates have shape {self.gates_TLC.shape}, expert ids {ids.shape}")
        for name in ("request_T", "position_T", "phase_T", "domain_T"):
            column = getattr(self, name)
            if column is not None and column.shape != ids.shape[:1]:
                raise InputError(f"trace {self.source}: {name} has shape {column.shape}, expected {ids.shape[:1]}")

    @property
    def tokens(self) -> int:
        """T, the number of recorded tokens."""
        return int(self.expert_ids_TLC.shape[0])

    @property
    def candidates(self) -> int:
        """C, the number of experts that the trace names for each token and layer."""
        return int(self.expert_ids_TLC.shape[2])

    @property
    def completed(self) -> bool:
        """Whether some of the candidates were filled in by a model, not recorded."""
        return self.recorded_candidates is not None and self.recorded_candidates < self.candidates

    def best(self, count: int) -> Self:
        """The trace of only the best `count` candidates of each token.

        Errors: `InputError` where that is fewer than the model's top k, or more than the trace has.
        """
        if not self.model.top_k <= count <= self.candidates:
            raise InputError(
                f"trace {self.source}: the best {count} candidates a token; "
                f"use {self.model.top_k} (top_k) to {self.candidates} (candidates)"
            )
        recorded = self.recorded_candidates
        return replace(
            self,
            expert_ids_TLC=self.expert_ids_TLC[:, :, :count],
            gates_TLC=None if self.gates_TLC is None else self.gates_TLC[:, :, :count],
            recorded_candidates=None if recorded is None or recorded >= count else recorded,
        )

    def take(self, tokens: NDArray[Any]) -> Self:
        """The trace of some of the tokens: a boolean mask [T] or an index array."""
        return replace(
            self,
            expert_ids_TLC=self.expert_ids_TLC[tokens],
            gates_TLC=None if self.gates_TLC is None else self.gates_TLC[tokens],
            request_T=self.request_T[tokens],
            position_T=self.position_T[tokens],
            phase_T=self.phase_T[tokens],
            domain_T=None if self.domain_T is None else self.domain_T[tokens],
        )

    def loads_LE(self, top_k: int | None = None) -> NDArray[np.int64]:
        """Token counts [L, E] when each token uses its `top_k` best candidates (the model's own by default).

        What goes to null experts is no load.
        """
        k = self.model.top_k if top_k is None else top_k
        every = self.model.all_experts
        layer_L1 = np.arange(self.model.layers)[:, None]
        keys_TLK = self.expert_ids_TLC[:, :, :k].astype(np.int64) + layer_L1 * every
        counts = np.bincount(keys_TLK.ravel(), minlength=self.model.layers * every)
        return counts.reshape(self.model.layers, every)[:, : self.model.experts]

"""Spill: rows of an overloaded rank, and their experts' weights, move to the least loaded ranks. Nothing is dropped."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from router.assignment import Assignment
from router.backends import Array, bincount, namespace, rank_within_group
from router.candidates import Candidates
from router.capacity import Limit, Scope
from router.context import RouteContext
from router.parameters import number, whole
from router.queues import Drop


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """`rows` rows of `slot`, from the `first`-th of its queue on, are computed in place `guest` of rank `to_rank`.

    A slot's queue is its rows by source rank, then by token. `guest` counts the guest places of a rank from 0.
    """

    slot: int
    to_rank: int
    guest: int
    first: int
    rows: int


@dataclass(frozen=True, eq=False, kw_only=True)  # no slots: the tables are computed once and kept
class SpillPlan:
    """Where the rows of one layer's step are computed: in their slots, but for the `moves`.

    `rows_GS`: rows by source rank and slot, before anything moves. The slots lie on `ranks` ranks, in equal runs, and
    each rank has `guests` places for the experts of others besides. Places P are counted rank by rank: a rank's slots,
    then its guest places.
    """

    rows_GS: NDArray[np.int64]
    ranks: int
    guests: int
    moves: tuple[Move, ...]

    @property
    def slots_per_rank(self) -> int:
        """Slots of a rank, its guest places not counted."""
        return int(self.rows_GS.shape[1]) // self.ranks

    @property
    def places_per_rank(self) -> int:
        """Slots and guest places of a rank."""
        return self.slots_per_rank + self.guests

    @cached_property
    def rows_GP(self) -> NDArray[np.int64]:
        """Rows by source rank and place, after the moves."""
        sources, slots_per_rank = self.rows_GS.shape[0], self.slots_per_rank
        rows_GXY = np.zeros((sources, self.ranks, self.places_per_rank), dtype=np.int64)
        rows_GXY[:, :, :slots_per_rank] = self.rows_GS.reshape(sources, self.ranks, slots_per_rank)
        last_GS = self.rows_GS.cumsum(axis=0)
        for move in self.moves:
            last_G = last_GS[:, move.slot]
            first_G = last_G - self.rows_GS[:, move.slot]
            moved_G = np.minimum(last_G, move.first + move.rows) - np.maximum(first_G, move.first)
            moved_G = np.maximum(moved_G, 0)
            rows_GXY[:, move.slot // slots_per_rank, move.slot % slots_per_rank] -= moved_G
            rows_GXY[:, move.to_rank, slots_per_rank + move.guest] += moved_G
        return rows_GXY.reshape(sources, -1)

    @cached_property
    def experts_XX(self) -> NDArray[np.int64]:
        """Experts whose weights go from rank to rank."""
        experts_XX = np.zeros((self.ranks, self.ranks), dtype=np.int64)
        for move in self.moves:
            experts_XX[move.slot // self.slots_per_rank, move.to_rank] += 1
        return experts_XX

    def guests_of(self, rank: int) -> list[Move]:
        """The moves whose rows `rank` computes, by guest place, one of each."""
        return sorted((move for move in self.moves if move.to_rank == rank), key=lambda move: move.guest)

    def lent_by(self, rank: int) -> list[Move]:
        """The moves of `rank`'s own slots, by the rank and the guest place that they go to."""
        first_slot = rank * self.slots_per_rank
        lent = (move for move in self.moves if first_slot <= move.slot < first_slot + self.slots_per_rank)
        return sorted(lent, key=lambda move: (move.to_rank, move.guest))

    def place_of(self, slot_TK: Array, source_rank_T: Array) -> Array:
        """The place that computes each pair, [T, K], -1 where no slot does.

        Tokens of a source rank are all here and in order, or none is, so that a real rank can ask for its own alone.
        """
        xp = namespace(slot_TK)
        sources, slots = self.rows_GS.shape
        device = slot_TK.device
        used_TK = slot_TK >= 0
        unused = sources * slots
        key_TK = xp.where(used_TK, source_rank_T[:, None] * slots + slot_TK, xp.full_like(slot_TK, unused))
        key_N = xp.reshape(key_TK, (-1,))
        # All rows as one line, slot by slot: `_pieces` says where it is cut, and each piece's place.
        first_N = xp.asarray(self._first_in_line, device=device)[key_N]
        line_N = first_N + rank_within_group(key_N, unused + 1)
        starts, places = (xp.asarray(values, device=device) for values in self._pieces)
        place_N = places[xp.searchsorted(starts, line_N, side="right") - 1]
        return xp.where(used_TK, xp.reshape(place_N, slot_TK.shape), xp.full_like(slot_TK, -1))

    @cached_property
    def _first_in_line(self) -> NDArray[np.int64]:
        """By source rank and slot, flat: rows that come before in the line; 0 for what is in no slot."""
        line_SG = self.rows_GS.T.cumsum().reshape(self.rows_GS.T.shape) - self.rows_GS.T
        return np.append(line_SG.T.reshape(-1), 0)

    @cached_property
    def _pieces(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        rows_S = self.rows_GS.sum(axis=0)
        first_S = rows_S.cumsum() - rows_S
        slot_S = np.arange(rows_S.size)
        home_S = slot_S // self.slots_per_rank * self.places_per_rank + slot_S % self.slots_per_rank
        moved = [
            (
                int(first_S[move.slot]) + move.first,
                move.to_rank * self.places_per_rank + self.slots_per_rank + move.guest,
            )
            for move in self.moves
        ]
        starts = np.concatenate([first_S, np.array([start for start, _ in moved], dtype=np.int64)])
        places = np.concatenate([home_S, np.array([place for _, place in moved], dtype=np.int64)])
        # Pieces without rows start with the next one; the later of equals is taken, so a slot's own comes first.
        slots = np.concatenate([slot_S, np.array([move.slot for move in self.moves], dtype=np.int64)])
        order = np.lexsort((np.arange(starts.size), slots, starts))
        return starts[order], places[order]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spill(Limit):
    """A rank with more rows than `factor` times the mean lends rows of its fullest experts to the least loaded ranks.

    Exact: every token is computed by the experts that it chose, with their weights, which are sent along. It helps
    where few experts take most rows and batches are large: weights cost the same for any number of rows. An expert of
    DeepSeek-V3 in FP8 takes 98 us over NVLink at 450 GB/s, for which an H100 at its peak receives, computes and returns
    900 rows; at decode it loses. At most `guests` experts come to a rank in a layer, and none for less than
    `least_rows` rows. The rows that move are the last of an expert, by source rank and token, so that all ranks plan
    the same from counts alone.

    Differs from the paper: there is no threshold on imbalance besides `factor`; the busiest rank is served first, by
    its fullest expert; a rank is filled up to the limit only, never beyond it, so that rows can stay where no rank has
    room.
    """

    name: ClassVar[str] = "least_loaded_spill"
    source: ClassVar[str] = "least-loaded expert parallelism, arXiv 2601.17111"
    factor: float = field(
        default=1.1, metadata=number(1.0, 2.0, "rows of a rank over the mean that it keeps", step=0.05, least=1.0)
    )
    least_rows: int = field(
        default=1024, metadata=whole(64, 2048, "rows for which an expert's weights are sent", experts=False)
    )
    guests: int = field(default=2, metadata=whole(1, 4, "experts that come to a rank", experts=False))

    @property
    def drop(self) -> Drop:
        """Nobody is dropped; those who come later move."""
        return "position"

    @property
    def scope(self) -> Scope:
        """A real rank can run it: it asks the others for counts, not for tokens."""
        return "source_rank"

    @property
    def pad(self) -> bool:
        """No: experts compute what they get."""
        return False

    @property
    def work(self) -> tuple[str, ...]:
        """Sending the rows of a queue to several places costs what the choice of replicas does."""
        return ("replicas",)

    def places_of(self, assignment: Assignment, candidates: Candidates, context: RouteContext) -> tuple[int, ...]:
        """As many as a source rank has tokens, so that nothing is ever over."""
        return tuple(int(count) for count in bincount(candidates.source_rank_T, context.ranks))

    def describe(self) -> str:
        """In a few words."""
        return f"spill={self.factor:.4g} least {self.least_rows} guests {self.guests}"

    def limit(self, assignment: Assignment, candidates: Candidates, context: RouteContext) -> Assignment:
        """The assignment as it is: only the place where its rows are computed changes."""
        return assignment

    def plan(self, rows_GS: NDArray[Any], ranks: int) -> SpillPlan:
        """What moves, given the rows by source rank and slot of one layer's step; the slots lie on `ranks` ranks."""
        rows_GS = np.asarray(rows_GS, dtype=np.int64)
        left_S = rows_GS.sum(axis=0)  # rows that each slot keeps
        left_XS = left_S.reshape(ranks, -1)  # a view
        load_X = left_XS.sum(axis=1)
        limit = math.ceil(self.factor * int(load_X.sum()) / ranks)
        taken = np.zeros(ranks, dtype=np.int64)
        served = np.zeros(ranks, dtype=bool)
        moves: list[Move] = []
        while True:
            busy = int(np.where(served, -1, load_X).argmax())
            over = int(load_X[busy]) - limit
            if served[busy] or over <= 0:
                break
            slot = busy * left_XS.shape[1] + int(left_XS[busy].argmax())
            quiet = int(np.where(taken < self.guests, load_X, load_X.max()).argmin())
            rows = min(over, int(left_S[slot]), limit - int(load_X[quiet]))
            if taken[quiet] == self.guests or rows < self.least_rows:
                served[busy] = True  # nothing more of it is worth sending
                continue
            left_S[slot] -= rows
            moves.append(
                Move(slot=slot, to_rank=quiet, guest=int(taken[quiet]), first=int(left_S[slot]), rows=rows),
            )
            taken[quiet] += 1
            load_X[busy] -= rows
            load_X[quiet] += rows
        return SpillPlan(rows_GS=rows_GS, ranks=ranks, guests=self.guests, moves=tuple(moves))


def rows_by_source(slot_TK: NDArray[np.int64], source_rank_T: NDArray[np.int64], shape: tuple[int, int]) -> Any:
    """Rows by source rank and slot, `shape` [G, S], of a whole step."""
    sources, slots = shape
    key_TK = np.where(slot_TK >= 0, source_rank_T[:, None] * slots + slot_TK, sources * slots)
    return np.bincount(key_TK.reshape(-1), minlength=sources * slots + 1)[:-1].reshape(shape)

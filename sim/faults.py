"""Faults: what goes wrong in the middle of a run, and what varies from kernel to kernel."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from cost_models.cluster import Cluster
from cost_models.degrade import degrade
from traces.errors import InputError

_FAULT = re.compile(r"(?P<change>[^@]+)@(?P<at_s>[0-9.eE+-]+)")

_RANK = re.compile(r"(gpu|rank)\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A change of the cluster, in the words of `cost_models.degrade`, at `at_s` seconds of the step."""

    change: str
    at_s: float

    def __post_init__(self) -> None:
        if not 0 <= self.at_s < float("inf"):
            raise InputError(f"fault {self.change} at {self.at_s} s; its time must be 0 or more")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `change@seconds`.

        >>> Fault.parse("nic5-leaf5=0.25@0.012")
        Fault(change='nic5-leaf5=0.25', at_s=0.012)
        """
        parts = _FAULT.fullmatch(text.strip())
        try:
            at_s = None if parts is None else float(parts["at_s"])
        except ValueError:
            at_s = None
        if parts is None or at_s is None:
            raise InputError(f"fault {text!r}: not of the form change@seconds, as rank7=lost@0.012")
        return cls(change=parts["change"].strip(), at_s=at_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """What the event simulation adds to the priced times.

    `jitter`: the coefficient of variation of each operation's time, lognormal with the priced time as its mean, drawn
    from `seed`. `faults` in the middle of the step; `detect_s` seconds after a rank is lost the others go on without
    it.
    """

    jitter: float = 0.0
    seed: int = 0
    faults: tuple[Fault, ...] = ()
    detect_s: float = 0.1

    def __post_init__(self) -> None:
        for name in ("jitter", "detect_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}; it must be 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Faults sorted out: clusters whose links change, speeds that ranks fall to, ranks that are lost; by time."""

    links: tuple[tuple[float, Cluster], ...]
    speeds: tuple[tuple[float, int, float], ...]
    losses: tuple[tuple[float, int], ...]

    @classmethod
    def of(cls, faults: Sequence[Fault], cluster: Cluster) -> Self:
        """In order of time; `InputError` where the cluster has no such part, falls apart or has no rank left.

        A part's latest change counts, so that what was slow may recover; a lost rank does not come back.
        """
        links: list[tuple[float, Cluster]] = []
        speeds: list[tuple[float, int, float]] = []
        losses: list[tuple[float, int]] = []
        change_of_link: dict[frozenset[str], str] = {}
        for fault in sorted(faults, key=lambda fault: fault.at_s):
            part = fault.change.partition("=")[0].strip().removeprefix("link ").strip()
            changed = degrade(cluster, [fault.change])
            if not _RANK.fullmatch(part):
                change_of_link[frozenset(part.split("-"))] = fault.change
                links.append((fault.at_s, degrade(cluster, list(change_of_link.values()))))
                continue
            rank = int(part.lstrip("gpurank"))
            if changed.ranks < cluster.ranks:
                losses.append((fault.at_s, rank))
            else:
                speeds.append((fault.at_s, rank, float(changed.speed_G[rank] / cluster.speed_G[rank])))
        if len({rank for _, rank in losses}) == cluster.ranks:
            raise InputError(f"faults: all {cluster.ranks} ranks of {cluster.name} are lost; leave at least one")
        return cls(links=tuple(links), speeds=tuple(speeds), losses=tuple(losses))

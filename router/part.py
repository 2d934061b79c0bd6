"""What the parts of a routing policy have in common: a name, a source, what they need, checked parameters."""

from abc import ABC
from typing import ClassVar, Literal

from router.parameters import check_parameters

Kind = Literal["selection", "adjustment", "capacity"]
# What a policy asks for beyond a token's k best candidates.
Need = Literal[
    "full scores",
    "more candidates than k",
    "earlier traffic",
    "placement and prices",
    "null experts",
]


class Part(ABC):
    """A part of a routing policy: named, described, with parameters that its dataclass fields declare.

    `source` is the paper or system; `needs` what it asks for beyond a token's best candidates.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    source: ClassVar[str] = ""
    needs: ClassVar[tuple[Need, ...]] = ()

    def __post_init__(self) -> None:
        check_parameters(self)

    @property
    def passes(self) -> int:
        """How often it goes over a step's candidates, for cost models that know no kernel for it."""
        return 1

    @property
    def work(self) -> tuple[str, ...]:
        """What it does, by the names under which a calibration times it; parameters that change its cost count."""
        return (self.name,)

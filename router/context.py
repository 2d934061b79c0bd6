"""What a policy may know besides the candidates, and what it remembers."""

from dataclasses import dataclass
from typing import Any

State = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteContext:
    """What a policy may know besides the candidates.

    `layer` counts from 0; `renormalise`: the model scales the weights of a token's chosen experts to sum
    to one; `ranks` is the number of source ranks.
    """

    layer: int
    ranks: int
    renormalise: bool

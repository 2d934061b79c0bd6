"""What a policy may know besides the candidates, and what it remembers."""

from dataclasses import dataclass
from typing import Any

from router.history import RoutingHistory
from router.prices import RoutePrices
from traces.errors import InputError

State = dict[str, Any]  # numbers and arrays by name, of one layer


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteContext:
    """What a policy may know besides the candidates.

    `layer` counts from 0; `renormalise`: the model scales the weights of a token's chosen experts to sum
    to one; `ranks` is the number of source ranks; `top_k` how many experts the model itself gives a token (0: not
    known). `history`: what earlier traffic says of the model's routing, and
    `prices` where its experts are and what a choice costs; None where nobody has looked.
    """

    layer: int
    ranks: int
    renormalise: bool
    top_k: int = 0
    history: RoutingHistory | None = None
    prices: RoutePrices | None = None

    def top_k_for(self, what: str) -> int:
        """The model's own top k; `InputError` for what cannot do without."""
        if not self.top_k:
            raise InputError(f"{what} needs the model's own top k; give the context its top_k")
        return self.top_k

    def history_for(self, policy: str) -> RoutingHistory:
        """The history; `InputError` for a policy that cannot do without."""
        if self.history is None:
            raise InputError(f"policy {policy} needs earlier traffic of the model; give the replay a RoutingHistory")
        return self.history

    def prices_for(self, policy: str) -> RoutePrices:
        """The prices; `InputError` for a policy that cannot do without."""
        if self.prices is None:
            raise InputError(f"policy {policy} needs a placement and prices; give the context RoutePrices")
        return self.prices

"""Hardware-aware routing: gate mass against what the cost model says a step takes."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from router.backends import Array, namespace
from router.candidates import Candidates
from router.context import RouteContext, State
from router.openings import in_units, to_host
from router.parameters import choice, number, whole
from router.part import Need
from router.policies.base import Adjustment, widen
from router.policies.scope import Scope, by_scope
from router.route_plan import StepToPlan
from router.step_load import StepLoad

_SEEN = 32  # candidates of a token


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareAware(Adjustment):
    """Trades gate mass for the step's predicted time, at the price that a search sets.

    Maximises (gate mass kept) / (gate mass of the selection) - `price` * (predicted time) / (that of the selection),
    where the time is the slowest rank's (its rows, its queue, and the weights that its active experts read or load)
    and the busiest link's. At price 1 a hundredth of the time is worth a hundredth of the gate mass, whatever the
    model and the hardware.

    First experts close, on all the slowest ranks at once since only they set the time: those whose tokens lose least by
    their next best candidates for each second saved. Then ranks and links ask for each row what they are busy, tokens
    take the candidates of most worth after that, and the busiest raise their price (multiplicative weights on the dual
    of the slowest rank). Of all plans on the way the best one counts, the selection's own among them, so that the
    objective, in which the search itself costs nothing, never gets worse. A token uses as many experts as the selection
    gave it, if as many of its candidates stay open, or with `may_skip` fewer: not those whose score is below what they
    cost.

    Each round goes over the candidates once, which a short step feels: with 64 ranks of a large model two rounds of
    pricing find nearly all that six do, and with few ranks the search can cost more than it finds.

    It helps most at decode, where the weights of active experts are the time, and on ranks of uneven load. It needs
    candidates beyond k for the tokens to move to, and looks at 32 of a token. Where experts lie in host memory, closing
    those pays most: raise `closing_rounds`, each of which closes a few on each of the slowest ranks. Where it sees one
    source rank's tokens alone it takes the others to have the like, and closes nothing: an expert closes only if all
    ranks leave it. A row is priced for each expert, also where the wire sends a token once to a rank or node.
    """

    name: ClassVar[str] = "hardware_aware"
    source: ClassVar[str] = "moeroute"
    needs: ClassVar[tuple[Need, ...]] = ("placement and prices", "more candidates than k")
    price: float = field(
        metadata=number(0.01, 10, "gate mass share that a like share of the step's time is worth", log=True)
    )
    may_skip: bool = field(default=True, metadata=choice((True, False), "tokens may use fewer experts than chosen"))
    closing_rounds: int = field(
        default=2, metadata=whole(0, 8, "times that experts close; in scope global only", least=0, experts=False)
    )
    pricing_rounds: int = field(
        default=2, metadata=whole(0, 6, "times that ranks and links raise their prices", least=0, experts=False)
    )
    scope: Scope = field(default="source_rank", metadata=choice(("source_rank", "global"), "whose tokens it sees"))

    @property
    def passes(self) -> int:
        """One for the selection's own plan, and one a round."""
        return 1 + len(self._rounds) if self.price else 0

    @property
    def work(self) -> tuple[str, ...]:
        """The search, and its rounds one by one."""
        return (self.name, *self._rounds)

    @property
    def _rounds(self) -> tuple[str, ...]:
        closing = self.closing_rounds if self.scope == "global" else 0
        return ("closing round",) * closing + ("pricing round",) * self.pricing_rounds

    def adjust(
        self, used_TC: Array, candidates: Candidates, context: RouteContext, state: State
    ) -> tuple[Array, State]:
        """The best plan of each scope."""
        xp = namespace(used_TC)
        prices = context.prices_for(self.name)
        if not self.price or not candidates.tokens:
            return used_TC, state
        last_used = int(to_host(xp.any(used_TC, axis=0)).nonzero()[0].max(initial=0))
        seen = candidates.best(max(_SEEN, last_used + 1))
        seen_TC = used_TC[:, : seen.count]
        scores_TC = in_units(seen.probs_TC)

        def plan(rows: Any, source: int | None) -> Array:
            load = StepLoad.of(
                prices, context.layer, experts=candidates.all_experts, source=source, ranks=context.ranks
            )
            source_T = candidates.source_rank_T[rows]
            step = StepToPlan(
                used_TC=seen_TC[rows],
                scores_TC=scores_TC[rows],
                ids_TC=seen.ids_TC[rows],
                source_T=source_T if source is None else source_T * 0,
                load=load,
                price=self.price,
                may_skip=self.may_skip,
                closing_rounds=self.closing_rounds,
                pricing_rounds=self.pricing_rounds,
            )
            return step.plan()

        planned_TC = by_scope(plan, seen_TC, candidates.source_rank_T, context.ranks, self.scope)
        return widen(planned_TC, candidates.count), state

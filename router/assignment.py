"""Assignment: which experts each token of a step goes to, and which of the chosen pairs were moved or dropped."""

from dataclasses import dataclass, replace
from typing import Self

from router.backends import Array, namespace

UNUSED = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The choice of a policy for T tokens, at most K experts each.

    `ids_TK` expert ids, `UNUSED` (-1) where a token uses fewer than K; `scores_TK` the router's score of each of these
    experts, 0 where unused; `weights_TK` the factor on each expert's output, 0 where unused or dropped;
    `kept_TK` bool, true where the pair is computed; `rerouted_TK` bool, true where it is computed by another expert
    than the policy chose first, whose id and score then stand here. Every chosen pair (id >= 0) is computed by the
    chosen expert, rerouted or dropped: they add up, always. No token has an expert twice. `null_weights_TN`: what each
    token gives to each of a model's N null experts, 0 where not chosen; None for models that have none.
    """

    ids_TK: Array
    scores_TK: Array
    weights_TK: Array
    kept_TK: Array
    rerouted_TK: Array
    null_weights_TN: Array | None = None

    @property
    def chosen_TK(self) -> Array:
        """True where the policy chose an expert, before capacity."""
        return self.ids_TK != UNUSED

    @property
    def dropped_TK(self) -> Array:
        """True where no expert computes what the policy chose."""
        return self.chosen_TK & ~self.kept_TK

    def take(self, tokens_T: Array) -> Self:
        """The assignment of some of the tokens: a mask or indices."""
        return replace(
            self,
            ids_TK=self.ids_TK[tokens_T],
            scores_TK=self.scores_TK[tokens_T],
            weights_TK=self.weights_TK[tokens_T],
            kept_TK=self.kept_TK[tokens_T],
            rerouted_TK=self.rerouted_TK[tokens_T],
            null_weights_TN=None if self.null_weights_TN is None else self.null_weights_TN[tokens_T],
        )

    def drop(self, dropped_TK: Array) -> Self:
        """The assignment without the pairs where `dropped_TK` is true; the others keep their weight."""
        xp = namespace(self.weights_TK)
        return replace(
            self,
            kept_TK=self.kept_TK & ~dropped_TK,
            rerouted_TK=self.rerouted_TK & ~dropped_TK,
            weights_TK=xp.where(dropped_TK, xp.zeros_like(self.weights_TK), self.weights_TK),
        )

"""Fixed k of its own in every layer: few experts where few are enough, under one budget for the model."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from router.backends import Array, namespace
from router.candidates import Candidates
from router.context import RouteContext, State
from router.parameters import number, whole
from router.part import Need
from router.policies.base import Selection

# A float product such as 1.1 * 10 may miss the whole number it stands for by its last bit.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKByLayer(Selection):
    """Every token uses its k_l best experts in layer l; the k_l average at most `mean_k`.

    The k_l, each from 1 to `k_max`, have the least summed output error of all that keep to the budget, as earlier
    traffic tells the error. Shapes stay static within a layer, so that kernels and communication need not know. It
    helps where layers differ in how much their lower experts matter, and where a layer's error tells what the model
    loses by it: on the small reference model it does not, and the same k in all layers keeps a lower loss. It needs
    earlier traffic, at best with the error measured on the model's own outputs (`router.nn.output_error`), as the paper
    does; else the error is the gate mass that is lost, which a trace can tell. The paper searches the k_l by evolution,
    with the errors of random inputs; here the search is exact, and the inputs are recorded ones. Experts beyond the
    model's own top k remove no error and are not used.
    """

    name: ClassVar[str] = "top_k_by_layer"
    source: ClassVar[str] = "LExI, arXiv 2509.02753"
    needs: ClassVar[tuple[Need, ...]] = ("earlier traffic",)
    mean_k: float = field(metadata=number(1.0, 8.0, "experts a token, averaged over layers", step=0.25, least=1.0))
    k_max: int = field(metadata=whole(2, 8, "most experts a token in any layer"))

    @property
    def width(self) -> int:
        """K is k_max."""
        return self.k_max

    def choose(self, candidates: Candidates, context: RouteContext, state: State) -> tuple[Array, State]:
        """The k_l best candidates of every token."""
        history = context.history_for(self.name)
        history.check_layer(context.layer)
        error_LK = np.asarray(history.output_error_LK, dtype=np.float64)
        k_L = _planned(error_LK.tobytes(), error_LK.shape[0], self.mean_k, self.k_max)
        probs_TK = candidates.best(k_L[context.layer]).probs_TC
        return namespace(probs_TK).ones_like(probs_TK, dtype=namespace(probs_TK).bool), state


def plan_layers(error_LK: NDArray[np.float64], *, mean_k: float, k_max: int) -> tuple[int, ...]:
    """The k of each layer, 1 to `k_max`, of least summed error among those that sum to at most `mean_k` * L.

    `error_LK[l, k - 1]` is the error of k experts in layer l, 0 beyond its last column. Exact, by dynamic programming
    over the experts that are left to give away. Of equal plans it takes the one with fewer experts in later layers.

    >>> plan_layers(np.array([[0.9, 0.1, 0.0], [0.2, 0.1, 0.0]]), mean_k=1.5, k_max=3)
    (2, 1)
    """
    layers, columns = error_LK.shape
    choice_LK = np.zeros((layers, k_max))
    choice_LK[:, :columns] = error_LK[:, :k_max]
    spare = min(int(mean_k * layers + _ROUNDING) - layers, layers * (k_max - 1))
    least_B = np.zeros(spare + 1)  # the least error of the layers so far, by experts given beyond one each
    taken_LB = np.zeros((layers, spare + 1), dtype=np.int64)
    for layer in range(layers):
        total_KB = np.full((min(k_max, spare + 1), spare + 1), np.inf)
        for more, total_B in enumerate(total_KB):
            total_B[more:] = least_B[: spare + 1 - more] + choice_LK[layer, more]
        taken_LB[layer] = total_KB.argmin(axis=0)
        least_B = total_KB.min(axis=0)
    k_L = []
    for layer in reversed(range(layers)):
        more = int(taken_LB[layer, spare])
        k_L.append(1 + more)
        spare -= more
    return tuple(reversed(k_L))


@lru_cache(maxsize=64)
def _planned(error_bytes: bytes, layers: int, mean_k: float, k_max: int) -> tuple[int, ...]:
    return plan_layers(np.frombuffer(error_bytes).reshape(layers, -1), mean_k=mean_k, k_max=k_max)

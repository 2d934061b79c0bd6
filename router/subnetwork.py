"""SubNetwork: the part of a model that runs when depth, experts and k are cut, without training it again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

from router.policies import RoutingPolicy
from router.policies.k_of_layers import fixed_k
from traces.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class SubNetwork:
    """Which layers of a model run, which experts each of them has, and how many experts a token uses there.

    `layers_L`: the L' kept MoE layers, ascending, each with what belongs to it (its attention); `experts_LE`: the ids
    of each one's E' experts, ascending, as many in every layer; `top_k_L`: k by layer. Letters count what is
    kept. Null and shared experts stay.

    Errors: `InputError` where these do not fit together.
    """

    layers_L: tuple[int, ...]
    experts_LE: tuple[tuple[int, ...], ...]
    top_k_L: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.layers_L:
            raise InputError("a sub-network has no layers; keep at least one")
        for field, rows in (("experts", self.experts_LE), ("top_k", self.top_k_L)):
            if len(rows) != self.depth:
                raise InputError(f"{len(rows)} layers have {field}, and {self.depth} are kept; give as many")
        _check_ascending("layers", self.layers_L)
        for layer, experts_E, top_k in zip(self.layers_L, self.experts_LE, self.top_k_L, strict=True):
            _check_ascending(f"experts of layer {layer}", experts_E)
            if len(experts_E) != self.experts:
                raise InputError(
                    f"layer {self.layers_L[0]} keeps {self.experts} experts and layer {layer} {len(experts_E)}; "
                    "keep as many in every layer"
                )
            if top_k < 1:
                raise InputError(f"layer {layer}: top_k is {top_k}; use at least 1")

    @classmethod
    def whole(cls, layers: int, experts: int, top_k: int) -> Self:
        """All of a model: the sub-network that everything else is compared with."""
        return cls(
            layers_L=tuple(range(layers)), experts_LE=(tuple(range(experts)),) * layers, top_k_L=(top_k,) * layers
        )

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave. Errors: `InputError` where it is something else."""
        try:
            return cls(
                layers_L=tuple(int(layer) for layer in document["layers"]),
                experts_LE=tuple(tuple(int(expert) for expert in row) for row in document["experts"]),
                top_k_L=tuple(int(top_k) for top_k in document["top_k"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                "a sub-network is written as {layers: [0, 2], experts: [[0, 1], [0, 3]], top_k: [2, 1]}, a list a layer"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "layers": list(self.layers_L),
            "experts": [list(experts_E) for experts_E in self.experts_LE],
            "top_k": list(self.top_k_L),
        }

    @property
    def depth(self) -> int:
        """L', the layers that are kept."""
        return len(self.layers_L)

    @property
    def experts(self) -> int:
        """E', the experts of a kept layer."""
        return len(self.experts_LE[0])

    @property
    def top_k(self) -> int:
        """The most experts that a token uses in any layer."""
        return max(self.top_k_L)

    @property
    def policy(self) -> RoutingPolicy:
        """Its k in every layer, and no more."""
        return RoutingPolicy(selection=fixed_k(self.top_k_L))

    @property
    def experts_per_token(self) -> float:
        """Experts that a token uses, the mean over kept layers."""
        return sum(self.top_k_L) / self.depth

    def check_within(self, layers: int, experts: int, null_experts: int = 0) -> None:
        """Raise `InputError` unless it is a part of a model of so many layers and experts."""
        if self.top_k > self.experts + null_experts:
            nulls = f" and {null_experts} null ones" if null_experts else ""
            raise InputError(
                f"a sub-network of {self.experts} experts{nulls} cannot give a token {self.top_k}; keep more experts "
                "or use a smaller top_k"
            )
        if self.layers_L[-1] >= layers:
            raise InputError(f"a sub-network keeps layer {self.layers_L[-1]}; the model has {layers}, from 0")
        last = max(experts_E[-1] for experts_E in self.experts_LE)
        if last >= experts:
            raise InputError(f"a sub-network keeps expert {last}; the model has {experts}, from 0")

    def of(self, outer: Self) -> Self:
        """The same part, of `outer`, as a part of what `outer` is itself a part of.

        >>> outer = SubNetwork(layers_L=(0, 2), experts_LE=((1, 4), (0, 5)), top_k_L=(2, 2))
        >>> SubNetwork(layers_L=(1,), experts_LE=((1,),), top_k_L=(1,)).of(outer).to_json()
        {'layers': [2], 'experts': [[5]], 'top_k': [1]}

        Errors: `InputError` where it is no part of it.
        """
        self.check_within(outer.depth, outer.experts, null_experts=self.top_k)  # its k is for its model to check
        return replace(
            self,
            layers_L=tuple(outer.layers_L[layer] for layer in self.layers_L),
            experts_LE=tuple(
                tuple(outer.experts_LE[layer][expert] for expert in experts_E)
                for layer, experts_E in zip(self.layers_L, self.experts_LE, strict=True)
            ),
        )

    def describe(self) -> str:
        """In a few words.

        >>> SubNetwork(layers_L=(0, 2), experts_LE=((0, 1, 5), (2, 3, 4)), top_k_L=(2, 1)).describe()
        '2 layers of 3 experts, k 2/1'
        >>> SubNetwork.whole(3, 8, 2).describe()
        '3 layers of 8 experts, k 2'
        """
        same = len(set(self.top_k_L)) == 1
        top_k = str(self.top_k) if same else "/".join(map(str, self.top_k_L))
        return f"{self.depth} layer{'s'[: self.depth > 1]} of {self.experts} experts, k {top_k}"


def _check_ascending(what: str, ids: Sequence[int]) -> None:
    if not ids or ids[0] < 0 or any(before >= after for before, after in pairwise(ids)):
        raise InputError(f"{what} are {list(ids)}; give ids from 0, ascending, none twice")

"""Functional partitioning: whether experts specialise by domain, and how much of what one sees is chance."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traces.errors import InputError
from traces.trace import RoutingTrace

SPECIALIST_LIFT = 1.5  # a convention: half again as many tokens from one domain as its share of the trace
_PERMUTED_CELLS = 2**25  # of labels at once, one float32 each


@dataclass(frozen=True, slots=True, kw_only=True)
class Specialist:
    """An expert of a layer that gets `share` of its pairs from `domain`, `lift` times the domain's share of the trace.

    `p`: the share of label permutations in which the expert's largest lift is as large, counting the labels as they
    are.
    """

    layer: int
    expert: int
    domain: str
    share: float
    lift: float
    p: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Specialisation:
    """How the loads of experts depend on the domain, layer by layer.

    `load_DLE` int64: pairs; null experts are counted as others are, with the ids behind theirs. `tv_DL`: the
    total-variation distance of a domain's load shares from those of the whole trace, 0 (the same) to 1 (no expert in
    common); `tv_pair_mean_L`, `tv_pair_max_L`: between two domains, the mean and the largest over pairs of domains.
    `information_L`: mutual information of domain and expert of a pair of token and expert, bits, of at most
    `entropy_bits`, the domain's own; `p_L`: the share of permutations that have as much. What ends in `_chance` is the
    mean over `permutations` of domain labels among whole requests, which keeps the tokens of a request alike: finite
    samples raise distances and information above 0 by that much without any specialisation. `specialists`: lift of at
    least `SPECIALIST_LIFT`, largest first.
    """

    domains: tuple[str, ...]
    requests: int
    permutations: int
    load_DLE: NDArray[np.int64]
    tv_DL: NDArray[np.float64]
    tv_chance_DL: NDArray[np.float64]
    tv_pair_mean_L: NDArray[np.float64]
    tv_pair_max_L: NDArray[np.float64]
    tv_pair_mean_chance_L: NDArray[np.float64]
    tv_pair_max_chance_L: NDArray[np.float64]
    entropy_bits: float
    information_L: NDArray[np.float64]
    information_chance_L: NDArray[np.float64]
    p_L: NDArray[np.float64]
    specialists: tuple[Specialist, ...]
    specialists_chance: float

    @property
    def information_above_chance_L(self) -> NDArray[np.float64]:
        """Mutual information less its mean over permutations, bits: 0 on average where nothing specialises."""
        return self.information_L - self.information_chance_L

    def to_json(self) -> dict[str, Any]:
        """The figures as a JSON object."""
        figures = {**asdict(self), "information_above_chance_L": self.information_above_chance_L}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in figures.items()}


def specialisation(
    trace: RoutingTrace, top_k: int | None = None, *, permutations: int = 199, seed: int = 0
) -> Specialisation:
    """How experts of `trace` specialise by domain where tokens use their `top_k` best candidates.

    A request of several domains is permuted in as many parts. Of many small requests fewer permutations than asked
    for are made, which the result says; `seed` draws them. Errors: `InputError` without at least two domains, or with
    no more requests than domains, since nothing then tells a domain from a request.
    """
    k = trace.model.top_k if top_k is None else top_k
    if trace.domain_T is None:
        raise InputError(f"trace {trace.source} has no domains; record text of several kinds")
    present_D, domain_T = np.unique(trace.domain_T, return_inverse=True)
    _, first_U, unit_T = np.unique(
        trace.request_T.astype(np.int64) * 256 + trace.domain_T, return_index=True, return_inverse=True
    )
    domain_U = domain_T[first_U]
    domains = tuple(trace.domains[domain] for domain in present_D)
    if len(domains) < 2 or domain_U.size <= len(domains):
        raise InputError(
            f"trace {trace.source}: {domain_U.size} requests of {len(domains)} domains tell no specialisation from "
            "chance; record at least 2 domains and more requests than domains"
        )
    permutations = max(1, min(permutations, _PERMUTED_CELLS // (len(domains) * domain_U.size)))
    rng = np.random.default_rng(seed)
    label_XU = np.stack([domain_U, *(rng.permutation(domain_U) for _ in range(permutations))])
    member_XDU = (label_XU[:, None, :] == np.arange(len(domains))[:, None]).astype(np.float32)
    share_D = np.bincount(domain_T) / domain_T.size
    layers = [
        _Layer.of(member_XDU, counts_UE) for counts_UE in _counts_by_unit(trace, k, unit_T.reshape(-1), domain_U.size)
    ]
    found = [
        Specialist(
            layer=layer,
            expert=int(expert),
            domain=domains[measured.top_E[expert]],
            share=float(measured.share_E[expert]),
            lift=float(measured.lift_XE[0, expert]),
            p=float((measured.lift_XE[:, expert] >= measured.lift_XE[0, expert] - 1e-9).mean()),
        )
        for layer, measured in enumerate(layers)
        for expert in np.flatnonzero(measured.lift_XE[0] >= SPECIALIST_LIFT)
    ]
    return Specialisation(
        domains=domains,
        requests=domain_U.size,
        permutations=permutations,
        load_DLE=np.stack([layer.load_DE for layer in layers], axis=1),
        tv_DL=np.stack([layer.tv_XD[0] for layer in layers], axis=1),
        tv_chance_DL=np.stack([layer.tv_XD[1:].mean(axis=0) for layer in layers], axis=1),
        tv_pair_mean_L=np.array([layer.pair_mean_X[0] for layer in layers]),
        tv_pair_max_L=np.array([layer.pair_max_X[0] for layer in layers]),
        tv_pair_mean_chance_L=np.array([layer.pair_mean_X[1:].mean() for layer in layers]),
        tv_pair_max_chance_L=np.array([layer.pair_max_X[1:].mean() for layer in layers]),
        entropy_bits=float(-(share_D * np.log2(share_D)).sum()),
        information_L=np.array([layer.information_X[0] for layer in layers]),
        information_chance_L=np.array([layer.information_X[1:].mean() for layer in layers]),
        p_L=np.array([(layer.information_X >= layer.information_X[0] - 1e-12).mean() for layer in layers]),
        specialists=tuple(sorted(found, key=lambda s: (-s.lift, s.layer, s.expert))),
        specialists_chance=float(sum((layer.lift_XE[1:] >= SPECIALIST_LIFT).sum() for layer in layers) / permutations),
    )


def total_variation(p_XE: NDArray[np.float64], q_XE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half the sum of the differences of two distributions over E: shape X.

    >>> float(total_variation(np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.25, 0.5])))
    0.5
    """
    return np.asarray(np.abs(p_XE - q_XE).sum(axis=-1) / 2)


def mutual_information_bits(joint_XDE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mutual information of D and E by their joint counts, bits: shape X.

    >>> float(mutual_information_bits(np.array([[3.0, 0.0], [0.0, 3.0]])))
    1.0
    """
    joint_XDE = joint_XDE / joint_XDE.sum(axis=(-2, -1), keepdims=True)
    apart_XDE = joint_XDE.sum(axis=-1, keepdims=True) * joint_XDE.sum(axis=-2, keepdims=True)
    ratio_XDE = np.divide(joint_XDE, apart_XDE, out=np.ones_like(joint_XDE), where=joint_XDE > 0)
    return np.asarray((joint_XDE * np.log2(ratio_XDE)).sum(axis=(-2, -1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A layer's figures under the labels as they are (X = 0) and permuted."""

    load_DE: NDArray[np.int64]
    tv_XD: NDArray[np.float64]
    pair_mean_X: NDArray[np.float64]
    pair_max_X: NDArray[np.float64]
    information_X: NDArray[np.float64]
    lift_XE: NDArray[np.float64]
    top_E: NDArray[np.int64]
    share_E: NDArray[np.float64]

    @classmethod
    def of(cls, member_XDU: NDArray[np.float32], counts_UE: NDArray[np.float32]) -> "_Layer":
        load_XDE = (member_XDU @ counts_UE).astype(np.float64)
        total_E = load_XDE[0].sum(axis=0)
        share_XDE = load_XDE / load_XDE.sum(axis=2, keepdims=True)
        domain_share_XD1 = load_XDE.sum(axis=2, keepdims=True) / total_E.sum()
        from_XDE = load_XDE / np.maximum(total_E, 1)
        lift_XDE = from_XDE / domain_share_XD1
        pairs_QX = np.concatenate(
            [
                total_variation(share_XDE[:, first, None], share_XDE[:, first + 1 :]).T
                for first in range(load_XDE.shape[1] - 1)
            ]
        )
        top_E = lift_XDE[0].argmax(axis=0)
        return cls(
            load_DE=np.rint(load_XDE[0]).astype(np.int64),
            tv_XD=total_variation(share_XDE, total_E / total_E.sum()),
            pair_mean_X=pairs_QX.mean(axis=0),
            pair_max_X=pairs_QX.max(axis=0),
            information_X=mutual_information_bits(load_XDE),
            lift_XE=lift_XDE.max(axis=1),
            top_E=top_E,
            share_E=np.take_along_axis(from_XDE[0], top_E[None], axis=0)[0],
        )


def _counts_by_unit(
    trace: RoutingTrace, k: int, unit_T: NDArray[np.int64], units: int
) -> Iterator[NDArray[np.float32]]:
    """Pairs [U, E] of each layer in turn, null experts among the E."""
    experts = trace.model.all_experts
    for layer in range(trace.model.layers):
        key_TK = unit_T[:, None] * experts + trace.expert_ids_TLC[:, layer, :k]
        yield np.bincount(key_TK.ravel(), minlength=units * experts).reshape(units, experts).astype(np.float32)

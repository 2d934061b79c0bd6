"""Reuse: how much of a step's experts the step before used, what an expert cache hits, how many experts are active."""

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from traces.batching import make_steps
from traces.errors import InputError
from traces.trace import DECODE, RoutingTrace

CACHE_SHARES = (0.25, 0.5, 0.75)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveSet:
    """The experts that are active in a layer in a step of B tokens, each of another stream, by B.

    `batch_B`: the sizes; `steps_B`: how many steps there were of each. `active_BL`: distinct experts, the mean over
    steps; `uniform_B`: E (1 - (1 - K/E)^B), what random experts give. `reuse_BL`: the share of a step's active experts
    that were active in the step before, the mean over steps; `reuse_any_BL`: the same against any other step of the
    trace, so that what it lacks is due to time and the rest to experts that are popular throughout;
    `uniform_reuse_B`: for random experts. Sizes that give a single step have no reuse: None. Null experts are never
    active (random experts are drawn with them); a step that has no other counts as reuse 0.
    """

    batch_B: tuple[int, ...]
    steps_B: tuple[int, ...]
    active_BL: tuple[tuple[float, ...], ...]
    uniform_B: tuple[float, ...]
    reuse_BL: tuple[tuple[float, ...] | None, ...]
    reuse_any_BL: tuple[tuple[float, ...] | None, ...]
    uniform_reuse_B: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """The figures as a JSON object."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCache:
    """What a cache of the M most recently used experts of each layer hits when one token is decoded at a time.

    `hit_LM`: the share of pairs whose expert is resident when the token comes, for M of 1 to E experts a layer.
    `shuffled_LM`: the same tokens in random order, which leaves only what popular experts give; random experts hit M/E.
    `expert_bytes`: of one expert; `pairs_L`: of a token in each layer, the mean, without those of null experts, which
    need no place.
    """

    hit_LM: NDArray[np.float64]
    shuffled_LM: NDArray[np.float64]
    expert_bytes: float
    pairs_L: NDArray[np.float64]

    def slots(self, share: float) -> int:
        """M of a cache of this share of a layer's experts, rounded up."""
        experts: int = self.hit_LM.shape[1]
        return ceil(share * experts)

    def hit(self, slots: int) -> float:
        """Hits of all layers over pairs, with `slots` experts of each layer resident."""
        return float(self._of_all(self.hit_LM)[slots - 1])

    @property
    def pairs_per_token(self) -> float:
        """Pairs of a token in all layers, the mean."""
        return float(self.pairs_L.sum())

    def loaded_bytes(self, slots: int) -> float:
        """Bytes of weights that a token has to load."""
        return (1 - self.hit(slots)) * self.uncached_bytes

    @property
    def uncached_bytes(self) -> float:
        """Bytes of weights that a token would load without a cache."""
        return self.pairs_per_token * self.expert_bytes

    def resident_bytes(self, slots: int) -> float:
        """Bytes that the cache takes in all layers."""
        layers: int = self.hit_LM.shape[0]
        return slots * layers * self.expert_bytes

    def to_json(self) -> dict[str, Any]:
        """Hits of all layers by M, and caches of `CACHE_SHARES` in bytes and by layer."""
        return {
            "expert_bytes": self.expert_bytes,
            "uncached_bytes_per_token": self.uncached_bytes,
            "hit_M": self._of_all(self.hit_LM).tolist(),
            "shuffled_M": self._of_all(self.shuffled_LM).tolist(),
            "caches": [
                {
                    "share": share,
                    "slots": (slots := self.slots(share)),
                    "hit": self.hit(slots),
                    "hit_L": self.hit_LM[:, slots - 1].tolist(),
                    "shuffled": float(self._of_all(self.shuffled_LM)[slots - 1]),
                    "uniform": slots / self.hit_LM.shape[1],
                    "loaded_bytes_per_token": self.loaded_bytes(slots),
                    "saved_bytes_per_token": self.uncached_bytes - self.loaded_bytes(slots),
                    "resident_bytes": self.resident_bytes(slots),
                }
                for share in CACHE_SHARES
            ],
        }

    def _of_all(self, share_LM: NDArray[np.float64]) -> NDArray[np.float64]:
        """Shares of the pairs of all layers, from those of each: [M]."""
        return np.asarray(np.average(share_LM, axis=0, weights=self.pairs_L))


def active_set(trace: RoutingTrace, top_k: int | None = None) -> ActiveSet:
    """Active experts and their reuse in steps of 1 to 256 tokens, as far as the trace has so many.

    Streams are those of `make_steps` for decode on one rank, in lockstep: about as many as there are requests, in
    groups of B. A B beyond that needs more streams than were recorded, which are pieces of one request and so more
    alike than those of as many requests would be.
    """
    k = _checked(trace, top_k)
    decoded = _decoded(trace)
    ids_TLK = np.ascontiguousarray(decoded.expert_ids_TLC[:, :, :k])
    experts, every = trace.model.experts, trace.model.all_experts
    requests = np.unique(decoded.request_T).size
    batches = tuple(batch for batch in BATCHES if batch <= decoded.tokens)
    steps, active, reuse, reuse_any = [], [], [], []
    for batch in batches:
        streams = max(batch, requests // batch * batch)
        lockstep = make_steps(decoded, phase="decode", tokens_per_rank=streams, ranks=1)
        tokens_JGB = np.stack([step.tokens_T for step in lockstep]).reshape(len(lockstep), -1, batch)
        active_GJL, again_GJL, elsewhere_GJL = _step_sets(ids_TLK, tokens_JGB.transpose(1, 0, 2).copy(), experts)
        steps.append(active_GJL.shape[0] * active_GJL.shape[1])
        active.append(tuple(active_GJL.mean(axis=(0, 1)).tolist()))
        others, least_GJL = len(lockstep) - 1, np.maximum(active_GJL, 1)
        again = (again_GJL / least_GJL)[:, 1:].mean(axis=(0, 1)) if others else None
        elsewhere = (elsewhere_GJL / least_GJL).mean(axis=(0, 1)) / others if others else None
        reuse.append(None if again is None else tuple(again.tolist()))
        reuse_any.append(None if elsewhere is None else tuple(elsewhere.tolist()))
    uniform = tuple(1 - (1 - k / every) ** batch for batch in batches)
    return ActiveSet(
        batch_B=batches,
        steps_B=tuple(steps),
        active_BL=tuple(active),
        uniform_B=tuple(experts * share for share in uniform),
        reuse_BL=tuple(reuse),
        reuse_any_BL=tuple(reuse_any),
        uniform_reuse_B=uniform,
    )


def expert_cache(trace: RoutingTrace, top_k: int | None = None, *, seed: int = 0) -> ExpertCache:
    """Hits of a least-recently-used cache of every size, by stack distance (Mattson et al. 1970), in one pass.

    Requests are decoded one after another, in order of appearance, and the cache stays from one to the next. All
    experts of a token come at once: each is a hit if it is resident before the token, and they are then the most
    recent, the best one last to go. `seed` shuffles the tokens. Errors: `InputError` where all tokens use null experts
    alone.
    """
    k = _checked(trace, top_k)
    decoded = _decoded(trace)
    ids_TLK = np.ascontiguousarray(decoded.expert_ids_TLC[:, :, :k])
    pairs_L = (ids_TLK < trace.model.experts).sum(axis=(0, 2))
    if not pairs_L.any():
        raise InputError(
            f"trace {trace.source}: every pair is a null expert's, which needs no cache; use a larger top_k"
        )
    # One prefill step of all tokens: a trace of one phase stands in for the other.
    order_T = make_steps(decoded, phase="prefill", tokens_per_rank=decoded.tokens, ranks=1)[0].tokens_T
    shuffled_T = np.random.default_rng(seed).permutation(order_T)
    hit_LM, shuffled_LM = (
        np.cumsum(_hits_by_depth(ids_TLK, tokens_T, trace.model.experts), axis=1) / np.maximum(pairs_L, 1)[:, None]
        for tokens_T in (order_T, shuffled_T)
    )
    return ExpertCache(
        hit_LM=hit_LM,
        shuffled_LM=shuffled_LM,
        expert_bytes=trace.model.expert_bytes,
        pairs_L=pairs_L / order_T.size,
    )


def _decoded(trace: RoutingTrace) -> RoutingTrace:
    """The decode tokens of a trace that has some, else all."""
    decode_T = trace.phase_T == DECODE
    return trace.take(decode_T) if decode_T.any() and not decode_T.all() else trace


def _checked(trace: RoutingTrace, top_k: int | None) -> int:
    k = trace.model.top_k if top_k is None else top_k
    if not 1 <= k <= trace.candidates:
        raise InputError(
            f"trace {trace.source}: top_k {k}, but it recorded {trace.candidates} candidates a token; "
            f"use top_k 1 to {trace.candidates}"
        )
    return k


@numba.njit(cache=True)
def _step_sets(ids_TLK: Any, tokens_GJB: Any, experts: int) -> Any:
    """For each group, step and layer: active experts, those active in the step before, and in other steps.

    The last counts an expert once for each other step of its group in which it is active.
    """
    groups, steps, batch = tokens_GJB.shape
    layers, k = ids_TLK.shape[1:]
    active_GJL = np.zeros((groups, steps, layers), dtype=np.int64)
    again_GJL = np.zeros((groups, steps, layers), dtype=np.int64)
    elsewhere_GJL = np.zeros((groups, steps, layers), dtype=np.int64)
    for group in range(groups):
        last_LE = np.full((layers, experts), -2, dtype=np.int64)
        steps_LE = np.zeros((layers, experts), dtype=np.int64)
        for counting in (True, False):
            last_LE[:] = -2
            for step in range(steps):
                for place in range(batch):
                    token = tokens_GJB[group, step, place]
                    for layer in range(layers):
                        for i in range(k):
                            expert = ids_TLK[token, layer, i]
                            if expert >= experts:
                                continue
                            last = last_LE[layer, expert]
                            if last == step:
                                continue
                            last_LE[layer, expert] = step
                            if counting:
                                steps_LE[layer, expert] += 1
                                active_GJL[group, step, layer] += 1
                                again_GJL[group, step, layer] += last == step - 1
                            else:
                                elsewhere_GJL[group, step, layer] += steps_LE[layer, expert] - 1
    return active_GJL, again_GJL, elsewhere_GJL


@numba.njit(cache=True)
def _hits_by_depth(ids_TLK: Any, tokens_T: Any, experts: int) -> Any:
    """Pairs [L, E] whose expert had as many others of its layer used since; what was never used counts nowhere."""
    layers, k = ids_TLK.shape[1:]
    hits_LE = np.zeros((layers, experts), dtype=np.int64)
    stack_LE = np.zeros((layers, experts), dtype=ids_TLK.dtype)  # the most recent first
    used_L = np.zeros(layers, dtype=np.int64)
    wanted_E = np.zeros(experts, dtype=np.bool_)
    for token in tokens_T:
        for layer in range(layers):
            stack_E = stack_LE[layer]
            wanted = 0
            for i in range(k):
                expert = ids_TLK[token, layer, i]
                if expert >= experts:
                    continue
                wanted += not wanted_E[expert]
                wanted_E[expert] = True
            found = depth = 0
            while depth < used_L[layer] and found < wanted:
                if wanted_E[stack_E[depth]]:
                    hits_LE[layer, depth] += 1
                    found += 1
                depth += 1
            used_L[layer] += wanted - found
            to = depth - 1 + wanted - found
            for place in range(depth - 1, -1, -1):
                if not wanted_E[stack_E[place]]:
                    stack_E[to] = stack_E[place]
                    to -= 1
            for i in range(k - 1, -1, -1):
                expert = ids_TLK[token, layer, i]
                if expert < experts and wanted_E[expert]:
                    wanted_E[expert] = False
                    stack_E[to] = expert
                    to -= 1
    return hits_LE

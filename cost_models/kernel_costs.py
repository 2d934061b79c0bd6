"""Kernel costs: operations of GPUs priced by kernels that were measured on them.

A profile holds the kernels of one framework. Several may be given: what the first has no kernel for, the next may
price, and the name says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from cost_models.cluster import Cluster
from cost_models.devices import DEVICES, Device
from cost_models.kernel_fit import Located
from cost_models.kernel_profile import FittedKernel, KernelProfile, shipped_profile
from cost_models.kernels import TABLES, kind_named
from cost_models.kernels.base import Kernel
from cost_models.kernels.mla import DOWN, HIDDEN, QUERY_LATENT, ROPE, MlaKernel
from cost_models.kernels.mla_projections import LATENT, NOPE, VALUE
from cost_models.kernels.token_traffic import bytes_between_ranks, measured_load, row_bytes
from cost_models.ops import (
    AllToAll,
    Array,
    Collective,
    Combine,
    CountExchange,
    DenseMlp,
    Experts,
    Gate,
    Gemm,
    HostToDevice,
    Launch,
    MemoryCopy,
    Mla,
    MlaProjection,
    Operation,
    Permute,
    Prediction,
    Regroup,
    Route,
    TokenExchange,
    WeightTransfer,
    busiest_remote_bytes,
)
from cost_models.roofline import Roofline
from cost_models.traffic import Traffic
from traces.errors import InputError

Floats = NDArray[np.float64]

# What a framework's measured expert kernels and exchanges do beside their own work. TensorRT-LLM's expert timings
# include top-k routing and finalize; all of them sort, gather and add rows, and exchange the counts.
_FUSED: frozenset[type] = frozenset({Permute, Regroup, Combine, CountExchange})
_INCLUDED: dict[str, frozenset[type]] = {"trtllm": _FUSED | {Route}}

# Doublings that a kernel for rows that came in any way counts as further away than one made for the way they came.
_OTHER_MODE = 1.0

_KEPT = 4096  # predictions of single sizes that are kept: more than the sizes of a study

# On the wire only the bytes count.
_ALIASES = {"half": "bfloat16", "int8": "fp8"}

# Dtypes that price another where a GPU has no table of it: Blackwell has none of products with weights scaled in
# blocks, which have as many bytes and run on the same units as those scaled as a whole. Called extrapolated.
_STANDS_IN: dict[tuple[type, str], str] = {(Gemm, "fp8_block"): "fp8"}

# What kernels reach of NVLink's datasheet: NCCL's all-to-all of half a GB over eight H100s, 315 of 450 GB/s (measured).
_LINK_REACH = 0.7
_OVER_LINKS = (AllToAll, TokenExchange, Collective)

# Products whose predicted times stand for what a GPU's kernels reach at least (launch) and at most (memory).
_SHORTEST = Gemm(rows_X=np.array(1), columns_X=512, inner_X=512)
_READING = Gemm(rows_X=np.array(1), columns_X=16384, inner_X=16384)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A fitted kernel; `device`: the GPU it was measured on, with the links of the one that it shall price.

    `links`: how much of the measured GPU's NVLink and NIC those have.
    """

    profile: KernelProfile
    fitted: FittedKernel
    kernel: Kernel
    device: Device
    links: tuple[float, float]

    def locate(self, operation: Operation) -> Located:
        """Where the operation lies among what was measured."""
        description = self.kernel.describe(_without_kind(operation, self.fitted.kind), self.device)
        return self.fitted.fit.locate(description)

    def seconds(self, located: Located) -> Floats:
        """Seconds of an operation that was located, shape X."""
        seconds_X = self.fitted.fit.seconds(located)
        if self.links[0] < 1:
            # A link that was never the bottleneck has left no price. On a slower one it may be.
            for terms in located.description.stages.values():
                seconds_X = np.maximum(seconds_X, terms.get("up", np.zeros(())) / _LINK_REACH)
        return seconds_X


class KernelCosts:
    """Prices operations by measured kernels of the cluster's GPU, or of the one with the same silicon.

    Then the cluster's own links count, and what moves over other links than were measured is called extrapolated.
    """

    def __init__(self, profiles: Sequence[KernelProfile], cluster: Cluster) -> None:
        if not profiles:
            raise InputError("no kernel profile given; name at least one")
        for profile in profiles:
            if cluster.device is None or not cluster.device.runs_kernels_of(profile.gpu):
                raise InputError(
                    f"a profile of {profile.gpu} cannot price {cluster.name}; use a profile of its device, or another "
                    "cluster.device"
                )
        assert cluster.device is not None
        self._device: Device = cluster.device
        self._cluster = cluster
        self._seen: dict[tuple[Any, ...], Prediction] = {}
        self._roofline = Roofline(cluster)
        self._profiles = tuple(profiles)
        self._candidates = [
            _Candidate(
                profile=profile,
                fitted=fitted,
                kernel=kind_named(fitted.kind).kernel,
                device=replace(cluster.device, name=profile.gpu),
                links=_links_of(cluster.device, DEVICES.get(profile.gpu, cluster.device)),
            )
            for profile in profiles
            for fitted in sorted(profile.kernels, key=lambda fitted: TABLES.index(kind_named(fitted.kind)))
        ]

    @classmethod
    def shipped(cls, cluster: Cluster, *frameworks: str) -> Self:
        """By the profiles that come with moeroute, in order of preference; `InputError` names those there are."""
        gpu = "cpu" if cluster.device is None else cluster.device.measured_as
        return cls([KernelProfile.read(shipped_profile(gpu, name)) for name in frameworks], cluster)

    @property
    def name(self) -> str:
        """For reports."""
        frameworks = ", then ".join(profile.framework for profile in self._profiles)
        lent = sorted({profile.gpu for profile in self._profiles} - {self._device.name})
        return f"{self._device.name} kernels of {frameworks}" + (f", measured on {', '.join(lent)}" if lent else "")

    @property
    def included(self) -> frozenset[type]:
        """What the first profile's kernels do beside their own work."""
        return _INCLUDED.get(self._profiles[0].framework, _FUSED)

    def seconds(self, operation: Operation) -> NDArray[np.float64]:
        """Seconds for each operation: shape X. `InputError` names what is known where no kernel was measured."""
        return self.predict(operation).seconds_X

    def predict(self, operation: Operation) -> Prediction:
        """Seconds for each operation, shape X, with their 90% intervals; beyond what was measured, it says so.

        Errors: `InputError` names what is known where no kernel was measured.
        """
        key = _key(operation)
        if key is None:
            return self._predict(operation)
        if key not in self._seen:
            if len(self._seen) >= _KEPT:
                self._seen.clear()
            self._seen[key] = self._predict(operation).read_only()
        return self._seen[key]

    def _predict(self, operation: Operation) -> Prediction:
        match operation:
            case Gate(tokens_X=tokens_X, hidden=hidden, experts=experts):
                return self.predict(Gemm(rows_X=tokens_X, columns_X=experts, inner_X=hidden))
            case DenseMlp(rows_X=rows_X, hidden=hidden, mlp_hidden=mlp_hidden, matrices=matrices, dtype=dtype):
                up = Gemm(rows_X=rows_X, columns_X=(matrices - 1) * mlp_hidden, inner_X=hidden, dtype=dtype)
                down = Gemm(rows_X=rows_X, columns_X=hidden, inner_X=mlp_hidden, dtype=dtype)
                return self.predict(up).then(self.predict(down))
            case (
                Route()
                | Permute()
                | Regroup()
                | Combine()
                | MemoryCopy()
                | HostToDevice()
                | Launch()
                | CountExchange()
                | WeightTransfer()
            ):
                return self._by_reach(operation)
            case Mla(part="block") if not self._serving(operation):
                return self._latent_block(operation)
            case AllToAll(bytes_XGG=bytes_XGG):
                return self._measured(self._collective(bytes_XGG))
            case TokenExchange(traffic=traffic) if traffic is not None and not self._serving(operation):
                # An engine without a kernel of its own for it.
                return self._measured(self._collective(bytes_between_ranks(operation)))
        return self._measured(operation)

    def kernel_for(self, operation: Operation) -> FittedKernel:
        """The measured kernel that prices an operation: of the first profile that has one, the one measured nearest.

        Errors: `InputError` if no profile has a kernel for the operation, in its dtype, by its `kernel`'s name.
        """
        return self._choose(operation)[0].fitted

    def _measured(self, operation: Operation) -> Prediction:
        chosen, located = self._choose(operation)
        seconds_X, beyond_X = chosen.seconds(located), located.beyond_X
        if isinstance(operation, TokenExchange) and operation.traffic is not None and not self._cluster.is_nominal:
            seconds_X = self._over_links(operation, chosen, seconds_X)
        low_X, high_X = chosen.fitted.spread.around(seconds_X, beyond_X)
        other_links = chosen.links != (1.0, 1.0) or not self._cluster.is_nominal
        elsewhere = other_links and isinstance(operation, _OVER_LINKS)
        elsewhere |= _STANDS_IN.get((type(operation), _dtype_of(operation))) == chosen.fitted.dtype
        measured = Prediction(
            seconds_X=seconds_X, low_s_X=low_X, high_s_X=high_X, extrapolated_X=(beyond_X > 0) | elsewhere
        )
        if isinstance(operation, Mla) and isinstance(chosen.kernel, MlaKernel) and chosen.kernel.without_down:
            return self.predict(_down_projection(operation)).then(measured)
        return measured

    def fixed_s(self, operation: TokenExchange) -> Floats:
        """Seconds of an exchange that no byte costs, shape X: launch, synchronising and messages of its kernel."""
        if self._serving(operation):
            chosen, _ = self._choose(operation)
            return chosen.seconds(chosen.locate(operation.empty()))
        return self.seconds(operation.empty())

    def _over_links(self, operation: TokenExchange, chosen: _Candidate, seconds_X: Floats) -> Floats:
        """What the exchange takes over the cluster's own links: as they are slower or faster, what moves bytes is.

        Latency that its links have is added once.

        Tables were measured on nodes with a port for each rank and networks that block nothing.
        """
        assert operation.traffic is not None
        row = row_bytes(operation.hidden, operation.dtype, operation.direction)
        load = measured_load(operation, row)
        ports_X = np.maximum(load.up / self._device.scale_up, load.out / self._device.scale_out)
        legs_XGG = bytes_between_ranks(operation)
        shape = legs_XGG.shape[:-2]
        links_L, latency_L = self._cluster.link_load_s(legs_XGG.reshape(-1, *legs_XGG.shape[-2:]))
        links_X, latency_X = links_L.reshape(shape), latency_L.reshape(shape)
        fixed_X = np.minimum(chosen.seconds(chosen.locate(operation.empty())), seconds_X)
        slower_X = np.where(ports_X > 0, links_X / np.where(ports_X > 0, ports_X, 1), 1)
        return np.asarray(fixed_X + (seconds_X - fixed_X) * slower_X + latency_X)

    def _latent_block(self, operation: Mla) -> Prediction:
        """Of an engine without a table of the whole block: its kernel and the products around it, one after another."""
        tokens_X = np.asarray(operation.batch_X) * operation.new_tokens_X
        heads, dtype = operation.heads_X, operation.gemm_dtype
        parts: list[Operation] = [
            _down_projection(operation),
            Gemm(rows_X=tokens_X, columns_X=heads * (NOPE + ROPE), inner_X=QUERY_LATENT, dtype=dtype),
            replace(operation, part="kernel", gemm_dtype="bfloat16"),
            Gemm(rows_X=tokens_X, columns_X=HIDDEN, inner_X=heads * VALUE, dtype=dtype),
        ]
        if operation.phase == "prefill":
            keys_X = np.asarray(operation.batch_X) * (operation.new_tokens_X + np.asarray(operation.cached_tokens_X))
            parts.append(Gemm(rows_X=keys_X, columns_X=heads * (NOPE + VALUE), inner_X=LATENT, dtype=dtype))
        else:
            steps: tuple[Literal["pre", "post"], ...] = ("pre", "post")
            parts += [MlaProjection(rows_X=tokens_X, heads_X=heads, step=step) for step in steps]
        return reduce(Prediction.then, map(self.predict, parts))

    def _choose(self, operation: Operation) -> tuple[_Candidate, Located]:
        """Of the first profile that serves the operation the kernel whose measurements lie nearest.

        Where kernels differ by how rows came, one made for another way than the operation's counts as further away.
        """
        candidates = self._candidates_for(operation)
        found: list[tuple[float, int, _Candidate, Located]] = []
        for candidate in candidates:
            if candidate.profile is not candidates[0].profile:
                break
            located = candidate.locate(operation)
            fits = not isinstance(operation, Experts) or getattr(candidate.kernel, "made_for", "") == operation.mode
            away = float(located.beyond_X.mean()) + (0.0 if fits else _OTHER_MODE)
            found.append((away, len(found), candidate, located))
        return min(found, key=lambda one: one[:2])[2:]

    def _serving(self, operation: Operation) -> list[_Candidate]:
        return [c for c in self._candidates if c.kernel.serves(operation, op=c.fitted.op)]

    def _candidates_for(self, operation: Operation) -> list[_Candidate]:
        """Those that serve the operation, in its dtype, by the kernel's name that it may give."""
        name = type(operation).__name__
        serving = self._serving(operation)
        if not serving:
            known = sorted({f"{c.fitted.op} ({c.fitted.kind})" for c in self._candidates})
            raise InputError(
                f"{self.name} have no {name} like this one; they have {', '.join(known)}; add a profile that has it"
            )
        dtype = _dtype_of(operation)
        in_dtype = [c for c in serving if _ALIASES.get(c.fitted.dtype, c.fitted.dtype) == dtype]
        if not in_dtype and (type(operation), dtype) in _STANDS_IN:
            stand_in = _STANDS_IN[type(operation), dtype]
            in_dtype = [c for c in serving if c.fitted.dtype == stand_in]
        if not in_dtype:
            known = sorted({c.fitted.dtype for c in serving})
            raise InputError(f"{self.name} have no {name} in dtype {dtype!r}; known are {', '.join(known)}")
        kernel = getattr(operation, "kernel", "")
        named = [c for c in in_dtype if not kernel or kernel in (c.fitted.kind, *c.fitted.sources)]
        if not named:
            known = sorted({kernel for c in in_dtype for kernel in (c.fitted.kind, *c.fitted.sources)})
            raise InputError(f"{self.name} have no {name} by the name {kernel!r}; known are {', '.join(known)}")
        return named

    def _collective(self, bytes_XGG: Array) -> Collective:
        """An uneven all-to-all as the even one whose ranks all move what its busiest one does."""
        if self._cluster.nodes > 1:
            raise InputError(f"{self.name} have no all-to-all between nodes; use one node, or the datasheet")
        ranks = np.shape(bytes_XGG)[-1]
        remote_X = busiest_remote_bytes(bytes_XGG)
        return Collective(
            kind="all_to_all", bytes_X=remote_X * ranks / max(ranks - 1, 1), ranks_X=np.array(ranks), dtype="bfloat16"
        )

    @cached_property
    def _reach(self) -> tuple[float, float]:
        """Seconds of the shortest kernel, and the share of the datasheet's memory bandwidth that a product reads at."""
        share = float(self._roofline.seconds(_READING) / self.seconds(_READING))
        return float(self.seconds(_SHORTEST)), min(share, 1.0)

    def _by_reach(self, operation: Operation) -> Prediction:
        """What has no table: kernels' least time, and the datasheet's bound at the share of it that kernels reach.

        A policy takes a kernel for each time that it goes over the candidates.
        """
        launch_s, reach = self._reach
        bound_X = self._roofline.seconds(operation)
        launches: Any = 1
        if isinstance(operation, Launch):
            launches = operation.kernels_X
        elif isinstance(operation, Route):
            launches = operation.passes
        seconds_X = np.asarray(launch_s * np.asarray(launches) + bound_X / reach)
        return Prediction(
            seconds_X=seconds_X, low_s_X=None, high_s_X=None, extrapolated_X=np.ones(seconds_X.shape, dtype=bool)
        )


def _links_of(device: Device, measured: Device) -> tuple[float, float]:
    return device.scale_up / measured.scale_up, device.scale_out / measured.scale_out


def _down_projection(operation: Mla) -> Gemm:
    """The product that gives a block's latents."""
    tokens_X = np.asarray(operation.batch_X) * operation.new_tokens_X
    return Gemm(rows_X=tokens_X, columns_X=DOWN, inner_X=HIDDEN, dtype=operation.gemm_dtype)


def _key(operation: Operation) -> tuple[Any, ...] | None:
    """What tells an operation of a single size from others; None for arrays of several, which seldom come twice."""
    values: list[Any] = [type(operation)]
    for name in operation.__dataclass_fields__:
        value = getattr(operation, name)
        if isinstance(value, np.ndarray):
            if value.size > 1:
                return None
            value = (value.dtype, value.shape, *value.ravel().tolist())
        elif isinstance(value, Traffic):
            return None
        values.append(value)
    return tuple(values)


def _dtype_of(operation: Operation) -> str:
    """The dtype by which fits of such operations are told apart."""
    dtype = operation.gemm_dtype if isinstance(operation, Mla) else getattr(operation, "dtype", "bfloat16")
    return _ALIASES.get(dtype, dtype)


def _without_kind(operation: Operation, kind: str) -> Operation:
    """The operation, told only the kernel it wants: the kind of table has served its purpose."""
    if isinstance(operation, Experts | TokenExchange | Collective) and operation.kernel == kind:
        return replace(operation, kernel="")
    return operation

"""Kernel costs: operations of GPUs priced by kernels that were measured on them.

A profile holds the kernels of one framework. Several may be given: what the first has no kernel for, the next may
price, and the name says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cost_models.cluster import Cluster
from cost_models.devices import Device
from cost_models.kernel_profile import FittedKernel, KernelProfile, shipped_profile
from cost_models.kernels import TABLES, kind_named
from cost_models.kernels.base import Kernel
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
    Operation,
    Permute,
    Prediction,
    Regroup,
    Route,
    TokenExchange,
    busiest_remote_bytes,
)
from cost_models.roofline import Roofline
from traces.errors import InputError

# What a framework's measured expert kernels and exchanges do beside their own work. TensorRT-LLM's expert timings
# include top-k routing and finalize; all of them sort, gather and add rows, and exchange the counts.
_FUSED: frozenset[type] = frozenset({Permute, Regroup, Combine, CountExchange})
_INCLUDED: dict[str, frozenset[type]] = {"trtllm": _FUSED | {Route}}

# On the wire only the bytes count.
_ALIASES = {"half": "bfloat16", "int8": "fp8"}

# Products whose predicted times stand for what a GPU's kernels reach at least (launch) and at most (memory).
_SHORTEST = Gemm(rows_X=np.array(1), columns_X=512, inner_X=512)
_READING = Gemm(rows_X=np.array(1), columns_X=16384, inner_X=16384)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    profile: KernelProfile
    fitted: FittedKernel
    kernel: Kernel


class KernelCosts:
    """Prices operations by measured kernels of the cluster's GPU."""

    def __init__(self, profiles: Sequence[KernelProfile], cluster: Cluster) -> None:
        if not profiles:
            raise InputError("no kernel profile given; name at least one")
        for profile in profiles:
            if cluster.device is None or profile.gpu != cluster.device.name:
                raise InputError(
                    f"a profile of {profile.gpu} cannot price {cluster.name}; use a profile of its device, or another "
                    "cluster.device"
                )
        assert cluster.device is not None
        self._device: Device = cluster.device
        self._nodes = cluster.nodes
        self._roofline = Roofline(cluster)
        self._profiles = tuple(profiles)
        self._candidates = [
            _Candidate(profile=profile, fitted=fitted, kernel=kind_named(fitted.kind).kernel)
            for profile in profiles
            for fitted in sorted(profile.kernels, key=lambda fitted: TABLES.index(kind_named(fitted.kind)))
        ]

    @classmethod
    def shipped(cls, cluster: Cluster, *frameworks: str) -> Self:
        """By the profiles that come with moeroute, in order of preference; `InputError` names those there are."""
        gpu = "cpu" if cluster.device is None else cluster.device.name
        return cls([KernelProfile.read(shipped_profile(gpu, name)) for name in frameworks], cluster)

    @property
    def name(self) -> str:
        """For reports."""
        return f"{self._device.name} kernels of " + ", then ".join(profile.framework for profile in self._profiles)

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
        match operation:
            case Gate(tokens_X=tokens_X, hidden=hidden, experts=experts):
                return self.predict(Gemm(rows_X=tokens_X, columns_X=experts, inner_X=hidden))
            case DenseMlp(rows_X=rows_X, hidden=hidden, mlp_hidden=mlp_hidden, matrices=matrices, dtype=dtype):
                up = Gemm(rows_X=rows_X, columns_X=(matrices - 1) * mlp_hidden, inner_X=hidden, dtype=dtype)
                down = Gemm(rows_X=rows_X, columns_X=hidden, inner_X=mlp_hidden, dtype=dtype)
                return _one_after_the_other(self.predict(up), self.predict(down))
            case (
                Route() | Permute() | Regroup() | Combine() | MemoryCopy() | HostToDevice() | Launch() | CountExchange()
            ):
                return self._by_reach(operation)
            case AllToAll(bytes_XGG=bytes_XGG):
                return self._measured(self._collective(bytes_XGG))
            case TokenExchange(bytes_XGG=bytes_XGG) if bytes_XGG is not None and not self._serving(operation):
                return self._measured(self._collective(bytes_XGG))  # an engine without a kernel of its own for it
        return self._measured(operation)

    def kernel_for(self, operation: Operation) -> FittedKernel:
        """The measured kernel that prices an operation: of the first profile that has one, the one measured nearest.

        Errors: `InputError` if no profile has a kernel for the operation, in its dtype, by its `kernel`'s name.
        """
        return self._choose(operation)[0].fitted

    def _measured(self, operation: Operation) -> Prediction:
        chosen, seconds_X, beyond_X = self._choose(operation)
        low_X, high_X = chosen.fitted.spread.around(seconds_X, beyond_X)
        return Prediction(seconds_X=seconds_X, low_s_X=low_X, high_s_X=high_X, extrapolated_X=beyond_X > 0)

    def _choose(self, operation: Operation) -> tuple[_Candidate, NDArray[np.float64], NDArray[np.float64]]:
        """Of the first profile that serves the operation the kernel whose measurements lie nearest, and its answer."""
        candidates = self._candidates_for(operation)
        nearest = None
        for candidate in candidates:
            if candidate.profile is not candidates[0].profile:
                break
            description = candidate.kernel.describe(_without_kind(operation, candidate.fitted.kind), self._device)
            seconds_X, beyond_X = candidate.fitted.fit.predict(description)
            if nearest is None or beyond_X.mean() < nearest[2].mean():
                nearest = candidate, seconds_X, beyond_X
        assert nearest is not None
        return nearest

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
        if self._nodes > 1:
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
        """What has no table: a kernel's least time, and the datasheet's bound at the share of it that kernels reach."""
        launch_s, reach = self._reach
        bound_X = self._roofline.seconds(operation)
        launches = operation.kernels_X if isinstance(operation, Launch) else 1
        seconds_X = np.asarray(launch_s * np.asarray(launches) + bound_X / reach)
        return Prediction(
            seconds_X=seconds_X, low_s_X=None, high_s_X=None, extrapolated_X=np.ones(seconds_X.shape, dtype=bool)
        )


def _dtype_of(operation: Operation) -> str:
    """The dtype by which fits of such operations are told apart."""
    dtype = operation.gemm_dtype if isinstance(operation, Mla) else getattr(operation, "dtype", "bfloat16")
    return _ALIASES.get(dtype, dtype)


def _without_kind(operation: Operation, kind: str) -> Operation:
    """The operation, told only the kernel it wants: the kind of table has served its purpose."""
    if isinstance(operation, Experts | TokenExchange | Collective) and operation.kernel == kind:
        return replace(operation, kernel="")
    return operation


def _one_after_the_other(first: Prediction, second: Prediction) -> Prediction:
    assert first.low_s_X is not None
    assert first.high_s_X is not None
    assert second.low_s_X is not None
    assert second.high_s_X is not None
    return Prediction(
        seconds_X=first.seconds_X + second.seconds_X,
        low_s_X=first.low_s_X + second.low_s_X,
        high_s_X=first.high_s_X + second.high_s_X,
        extrapolated_X=first.extrapolated_X | second.extrapolated_X,
    )

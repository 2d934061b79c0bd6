"""What runs on CUDA, run without a GPU: every operation on fake tensors of a CUDA device, as far as that goes.

Fake tensors have shapes, dtypes and devices but no values, and each torch operation checks them: an array left on the
CPU, or of the wrong shape, raises as it would on a GPU. On a CPU build of torch, Python's own indexing asks for a
driver before it comes to that, so `OnFakeCuda` spells it out as the operations that it stands for.

Covered: gate, the policies with every capacity, the choice of replicas, permute, regroup, expert MLPs, combine.
Not covered, since there are no values and no device: numbers (those are compared between numpy and torch's CPU
elsewhere), the host reading a count back (it gets 3 here), CUDA events, streams, memory, NCCL and the run over ranks.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from cost_models.microbench.experts import expert_mlp
from cost_models.microbench.permute import combine, permute, regroup
from router.assignment import Assignment
from router.backends import bincount, rank_within_group, topk
from router.capacity import Capacity
from router.context import RouteContext
from router.history import RoutingHistory
from router.nn.expert_parallel import MoEWeights, gate
from router.placement import place
from router.policies import SELECTIONS, RoutingPolicy
from router.policies.balance_bias import BalanceBias
from router.policies.group_limited import GroupLimited
from router.policies.partners import Partners
from router.policies.skip import Skip
from router.policies.skip_by_ratio import SkipByRatio
from router.policies.top_k import TopK
from router.policies.top_k_by_layer import TopKByLayer
from router.policies.top_p import TopP
from router.replicas import choose_slots
from traces.model import ModelSpec
from traces.synthetic import synthetic_trace

T, K, E, D, F, RANKS = 16, 2, 4, 8, 12, 2
SELECTIONS_UNDER_TEST = [
    TopK(k=K),
    TopP(p=0.5, k_max=K),
    Skip(threshold=0.5, k_max=K),
    TopKByLayer(mean_k=K, k_max=K),
    SkipByRatio(quantile=0.5, k_max=K),
    BalanceBias(k=K),
    GroupLimited(k=K, groups=2, kept_groups=1),
    Partners(k=K, partners=2),
]
# These look at values, which fake tensors have none of; and null experts are for other models.
NOT_ON_FAKE_TENSORS = {"held_top_p", "expert_choice", "null_experts"}
HISTORY = RoutingHistory.of(
    synthetic_trace(
        ModelSpec(name="any", layers=1, experts=E, top_k=K, hidden=D, expert_hidden=F), tokens=64, zipf=0.5, seed=0
    )
)
CAPACITIES = [
    None,
    *(Capacity(factor=1.0, drop=d, scope=s) for d in ("position", "probs") for s in ("source_rank", "global")),
]


class OnFakeCuda(TorchFunctionMode):
    """What asks for a driver on a CPU build, or for a value, as operations that fake CUDA tensors know."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        spelled_out = _SPELLED_OUT.get(func, func)
        return spelled_out(*args, **(kwargs or {}))


def _item(tensor: Tensor, key: Any) -> Tensor:
    keys = key if isinstance(key, tuple) else (key,)
    if all(isinstance(one, Tensor) for one in keys):
        gathered: Tensor = torch.ops.aten.index(tensor, list(keys))
        return gathered
    dimension = 0
    for one in keys:
        if isinstance(one, int):
            tensor = tensor.select(dimension, one)
        elif one is None:
            tensor = tensor.unsqueeze(dimension)
            dimension += 1
        elif isinstance(one, Tensor):
            tensor = torch.ops.aten.index(tensor, [None] * dimension + [one])
            dimension += 1
        else:
            start, stop, step = one.indices(tensor.shape[dimension])
            assert step == 1
            tensor = tensor.narrow(dimension, start, stop - start)
            dimension += 1
    return tensor


def _set_item(tensor: Tensor, key: Any, value: Any) -> None:
    if isinstance(key, Tensor):
        torch.ops.aten.index_put_(tensor, [key], value)
    else:
        _item(tensor, key).fill_(value)


def _bincount(keys_N: Tensor, *, weights: Tensor | None = None, minlength: int) -> Tensor:
    added_N = torch.ones_like(keys_N, dtype=torch.int64) if weights is None else weights
    counts = torch.zeros(minlength, dtype=added_N.dtype, device=keys_N.device)
    return counts.index_add_(0, keys_N, added_N)


def _to(
    tensor: Tensor, device: torch.device | None = None, *, dtype: torch.dtype | None = None, copy: bool = False
) -> Tensor:
    moved: Tensor = torch.ops.aten._to_copy(tensor, dtype=dtype, device=device)
    return moved


_SPELLED_OUT = {
    Tensor.__getitem__: _item,
    Tensor.__setitem__: _set_item,
    Tensor.__invert__: torch.logical_not,
    Tensor.__int__: lambda tensor: 3,
    Tensor.to: _to,
    torch.bincount: _bincount,
}


@pytest.fixture(autouse=True)
def fake_cuda() -> Iterator[None]:
    with FakeTensorMode(), OnFakeCuda():
        yield


def on_cuda(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda")


def ids(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int64, device="cuda")


def check(tensor: Tensor, *shape: int) -> None:
    assert tensor.device.type == "cuda"
    assert tuple(tensor.shape) == shape


def test_the_harness_sees_what_was_left_on_the_cpu() -> None:
    with pytest.raises(RuntimeError, match=r"[Dd]evice"):
        gate(on_cuda(T, D), torch.randn(E, D), 0)
    with pytest.raises(RuntimeError, match=r"[Dd]evice"):
        combine(on_cuda(10, D), ids(10), torch.rand(T, K))
    with pytest.raises(RuntimeError, match=r"[Dd]evice"):
        on_cuda(T)[torch.zeros(3, dtype=torch.int64)] + torch.zeros(3)


def test_primitives() -> None:
    values_TK, ids_TK = topk(on_cuda(T, E), K)
    check(values_TK, T, K)
    check(ids_TK, T, K)
    check(bincount(ids(T), E), E)
    check(rank_within_group(ids(T), E), T)
    check(rank_within_group(ids(T), E, order_N=torch.arange(T, device="cuda")), T)


def test_gate() -> None:
    candidates = gate(on_cuda(T, D), on_cuda(E, D), 1)
    for tensor in (candidates.ids_TC, candidates.probs_TC):
        check(tensor, T, E)
    check(candidates.source_rank_T, T)


def test_every_selection_is_under_test() -> None:
    assert {selection.name for selection in SELECTIONS_UNDER_TEST} == set(SELECTIONS) - NOT_ON_FAKE_TENSORS


@pytest.mark.parametrize("selection", SELECTIONS_UNDER_TEST, ids=lambda selection: selection.name)
@pytest.mark.parametrize("capacity", CAPACITIES, ids=lambda c: f"{c.drop}-{c.scope}" if c else "none")
@pytest.mark.parametrize("renormalise", [True, False])
def test_routing(selection: Any, capacity: Capacity | None, renormalise: bool) -> None:
    candidates = gate(on_cuda(T, D), on_cuda(E, D), 1)
    context = RouteContext(layer=0, ranks=RANKS, renormalise=renormalise, history=HISTORY)
    assignment, _ = RoutingPolicy(selection=selection, capacity=capacity).route(candidates, context, {})
    for tensor in (assignment.ids_TK, assignment.scores_TK, assignment.weights_TK, assignment.kept_TK):
        check(tensor, T, K)
    assert assignment.kept_TK.dtype == torch.bool


@pytest.mark.parametrize("slots", [E, E + RANKS])
@pytest.mark.parametrize("choice", ["even", "local", "nearest", "water_filling"])
def test_replicas(slots: int, choice: Any) -> None:
    assignment = Assignment(
        ids_TK=ids(T, K),
        scores_TK=on_cuda(T, K),
        weights_TK=on_cuda(T, K),
        kept_TK=torch.ones(T, K, dtype=torch.bool, device="cuda"),
        rerouted_TK=torch.zeros(T, K, dtype=torch.bool, device="cuda"),
    )
    placement = place("lpt", np.ones((1, E)), ranks=RANKS, slots=slots)
    rows_GS = np.ones((RANKS, slots), dtype=np.int64) if choice == "water_filling" else None
    check(choose_slots(assignment, placement, 0, ids(T), choice, rows_GS=rows_GS), T, K)


def test_permute_and_combine() -> None:
    rows_ND, pair_N, count_S = permute(on_cuda(T, D), ids(T, K), E)
    check(rows_ND, T * K - 3, D)  # the 3 that were read back as not kept
    check(pair_N, T * K - 3)
    check(count_S, E)
    check(combine(rows_ND, pair_N, on_cuda(T, K)), T, D)


def test_regroup() -> None:
    check(regroup(on_cuda(10, D), [[1, 2], [3, 4]]), 10, D)


def test_expert_mlps() -> None:
    check(expert_mlp(on_cuda(10, D), [3, 0, 7], on_cuda(3, F, D), on_cuda(3, F, D), on_cuda(3, D, F)), 10, D)


def test_weights_move_and_divide() -> None:
    weights = MoEWeights(
        gate_ED=torch.randn(E, D),
        w_gate_EFD=torch.randn(E, F, D),
        w_up_EFD=torch.randn(E, F, D),
        w_down_EDF=torch.randn(E, D, F),
    ).to(torch.device("cuda"))
    own = weights.of_experts(torch.zeros(2, dtype=torch.int64))  # the placement's table is on the host
    check(own.gate_ED, E, D)
    for tensor, shape in ((own.w_gate_EFD, (2, F, D)), (own.w_up_EFD, (2, F, D)), (own.w_down_EDF, (2, D, F))):
        check(tensor, *shape)

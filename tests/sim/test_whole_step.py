"""A whole step: what attention, dense layers, head, sampling and the host ask the cost model for, by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from recorder import Recorder

from cost_models.devices import DEVICES
from cost_models.ops import Attention, Collective, DenseMlp, Gate, Gemm, MemoryCopy, Mla, Permute
from router.assignment import Assignment
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.policies.top_k import TopK
from sim.analytic import simulate_analytic
from sim.blocks import blocks_of
from sim.engine import simulate_events
from sim.execution import GRAPH_BUCKETS, Execution
from sim.layout import Layout
from sim.lower import Work, lower
from sim.program import Program
from sim.stages import Block, Stage
from sim.timeline import Timeline
from traces.context import Context
from traces.errors import InputError
from traces.model import ModelSpec

# A row is 8 elements of 2 bytes. 4 query and 2 key-value heads, 4 wide; two dense layers come before the MoE layer.
MODEL = ModelSpec(
    name="tiny",
    layers=1,
    experts=4,
    top_k=2,
    hidden=8,
    expert_hidden=16,
    dense_layers=2,
    dense_hidden=32,
    attention="grouped",
    heads=4,
    kv_heads=2,
    head_dim=4,
    vocab=100,
)
# Two requests of 3 tokens on rank 0, one on rank 1, each looking back on 5.
PREFILL = Context(
    phase="prefill",
    requests_G=np.array([2.0, 1.0]),
    new_tokens_G=np.array([3.0, 3.0]),
    cached_tokens_G=np.array([5.0, 5.0]),
)
DECODE = Context(
    phase="decode",
    requests_G=np.array([6.0, 3.0]),
    new_tokens_G=np.array([1.0, 1.0]),
    cached_tokens_G=np.array([10.0, 20.0]),
)


def work_of(context: Context | None, model: ModelSpec = MODEL, **layout: int) -> Work:
    """Nine tokens: six of rank 0, three of rank 1, each to experts 0 and 2."""
    ids_TK = np.tile([0, 2], (9, 1))
    one = np.ones((9, 2), dtype=np.float32)
    return lower(
        model,
        [Assignment(ids_TK=ids_TK, scores_TK=one, weights_TK=one, kept_TK=ids_TK >= 0, rerouted_TK=ids_TK < -1)]
        * model.layers,
        Placement(slot_to_expert_LS=np.tile(np.arange(4), (model.layers, 1)), experts=4, ranks=2),
        policy=RoutingPolicy(selection=TopK(k=2)),
        source_rank_T=np.repeat([0, 1], [6, 3]),
        layout=Layout(node_of_G=np.zeros(2, dtype=np.int64), **layout),
        context=context,
    )


def stages_of(work: Work, execution: Execution | None = None) -> tuple[Recorder, tuple[Block, ...]]:
    costs = Recorder()
    return costs, blocks_of(work, costs, execution or Execution(launch_s=0), device=DEVICES["h100_sxm"])


def by_rank(value: Any) -> list[float]:
    """A [1, G] or [1, 1] size on both ranks."""
    both: list[float] = np.broadcast_to(value, (1, 2))[0].tolist()
    return both


def test_a_step_is_embedding_dense_layers_moe_layers_and_head() -> None:
    _, blocks = stages_of(work_of(PREFILL), Execution(host_gap_s=1e-3))
    assert [[stage.name for stage in block.stages] for block in blocks] == [
        ["embed"],
        ["norm", "attention", "norm", "dense"],
        [
            *("norm", "attention", "norm"),
            *("gate", "route", "permute", "counts", "dispatch", "regroup", "experts", "ungroup", "return", "combine"),
        ],
        ["head", "sample", "host gap"],
    ]
    assert [(len(block.row_of_layer), block.first_layer) for block in blocks] == [(1, 0), (2, 0), (1, 2), (1, 3)]


def test_what_attention_costs_by_hand() -> None:
    costs, blocks = stages_of(work_of(PREFILL))
    norm, attention, _, dense = blocks[1].stages
    # Read and written: a row of 16 bytes for each of 6 and 3 tokens, of both the sums and the values.
    (copy,) = costs.operations_of(norm)
    assert isinstance(copy, MemoryCopy)
    assert by_rank(copy.bytes_X) == [2 * 6 * 16, 2 * 3 * 16]
    project, attend, out = costs.operations_of(attention)
    assert isinstance(project, Gemm)
    assert isinstance(attend, Attention)
    assert isinstance(out, Gemm)
    # 4 query heads and twice 2 key-value heads, 4 wide: 32 columns; back from 4 heads of 4 to 8.
    assert (by_rank(project.rows_X), project.columns_X, project.inner_X) == ([6, 3], 32, 8)
    assert (by_rank(out.rows_X), out.columns_X, out.inner_X) == ([6, 3], 8, 16)
    assert (by_rank(attend.batch_X), by_rank(attend.new_tokens_X)) == ([2, 1], [3, 3])
    assert by_rank(attend.cached_tokens_X) == [5, 5]
    assert (attend.heads_X, attend.kv_heads_X, attend.head_dim, attend.phase) == (4, 2, 4, "prefill")
    (mlp,) = costs.operations_of(dense)
    assert isinstance(mlp, DenseMlp)
    assert (by_rank(mlp.rows_X), mlp.mlp_hidden) == ([6, 3], 32)


def test_only_tokens_that_get_a_successor_have_logits() -> None:
    """At prefill the last of each request, at decode each."""
    for context, rows in ((PREFILL, [2, 1]), (DECODE, [8, 8])):
        costs, blocks = stages_of(work_of(context))
        head, sample = blocks[-1].stages
        (product,) = costs.operations_of(head)
        assert isinstance(product, Gemm)
        assert (by_rank(product.rows_X), product.columns_X, product.inner_X) == (rows, 100, 8)
        passes = costs.operations_of(sample)
        assert len(passes) == 3  # scale, normalise, draw, over float32 logits
        assert [by_rank(copy.bytes_X) for copy in passes if isinstance(copy, MemoryCopy)] == [
            [row * 100 * 4 for row in rows]
        ] * 3


def test_latent_attention_is_one_block() -> None:
    costs, blocks = stages_of(work_of(PREFILL, replace(MODEL, attention="latent")), Execution(kv_dtype="fp8"))
    (block,) = costs.operations_of(blocks[1].stages[1])
    assert isinstance(block, Mla)
    assert (by_rank(block.batch_X), by_rank(block.new_tokens_X), block.heads_X) == ([2, 1], [3, 3], 4)
    assert (block.part, block.phase, block.kv_dtype, block.gemm_dtype) == ("block", "prefill", "fp8", "bfloat16")


def test_a_decode_step_pads_dense_work_to_a_captured_size() -> None:
    """6 tokens on the fullest rank run in a graph of 8, on both ranks; what is routed are the real ones."""
    assert Execution().bucket(6) == 8
    costs, blocks = stages_of(work_of(DECODE))
    moe = blocks[2].stages
    gate, permute = costs.operation_of(moe, "gate"), costs.operation_of(moe, "permute")
    assert isinstance(gate, Gate)
    assert isinstance(permute, Permute)
    assert by_rank(gate.tokens_X) == [8, 8]
    assert by_rank(permute.rows_X) == [12, 6]
    _, attend, _ = costs.operations_of(moe[1])
    assert isinstance(attend, Attention)
    assert by_rank(attend.batch_X) == [8, 8]
    # 6 requests of 10 tokens are 60 in all, 3 of 20 are too: 7.5 for each of 8.
    assert by_rank(attend.cached_tokens_X) == [7.5, 7.5]


def test_buckets_by_hand() -> None:
    assert GRAPH_BUCKETS[:5] == (1, 2, 4, 8, 16)
    assert [Execution().bucket(tokens) for tokens in (1, 3, 5, 9, 512, 513)] == [1, 4, 8, 16, 512, None]
    assert Execution(graph_buckets=()).bucket(1) is None
    assert Execution(graph_buckets=(16, 4)).bucket(3) == 4  # in whatever order they are given


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"graph_buckets": (4, 0)}, "graph_buckets are [4, 0]; each must be at least 1"),
        ({"launch_s": -1.0}, "launch_s is -1.0; it must be 0 or more"),
        ({"host_gap_s": float("inf")}, "host_gap_s is inf; it must be 0 or more"),
        ({"comm_sms": -1}, "comm_sms is -1; it must be 0 or more"),
        ({"overlap_pace": 0.0}, "overlap_pace is 0.0; it must be above 0 and at most 1"),
    ],
    ids=["bucket", "launch", "gap", "multiprocessors", "pace"],
)
def test_an_execution_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        Execution(**options)
    assert str(refused.value) == message


class Nothing(Recorder):
    """Every kernel takes no time at all."""

    def predict(self, operation: Any) -> Any:
        prediction = super().predict(operation)
        return replace(prediction, seconds_X=np.zeros_like(prediction.seconds_X))


def test_without_graphs_a_kernel_takes_at_least_its_launch() -> None:
    """2 s a launch. A gate is 2 kernels, experts and dense MLPs 4, attention with its projections 12, sampling 6."""
    execution = Execution(graph_buckets=(), launch_s=2.0)
    blocks = blocks_of(work_of(DECODE), Nothing(), execution)
    seconds = {s.name: float(s.seconds_LG[0, 0]) for block in blocks for s in block.stages}
    assert seconds == {
        "embed": 2,
        "norm": 2,
        "attention": 24,
        "dense": 8,
        "gate": 4,
        "route": 2,
        "permute": 2,
        "regroup": 2,
        "experts": 8,
        "ungroup": 2,
        "combine": 2,
        "counts": 0,
        "dispatch": 0,
        "return": 0,  # links are launched by nobody's stream of kernels
        "head": 4,
        "sample": 12,
    }
    captured = blocks_of(work_of(DECODE), Nothing(), Execution(launch_s=2.0))
    assert not any(stage.seconds_LG.any() for block in captured for stage in block.stages)


def test_a_step_larger_than_every_graph_is_launched_kernel_by_kernel() -> None:
    blocks = blocks_of(work_of(DECODE), Nothing(), Execution(graph_buckets=(4,), launch_s=2.0))
    assert blocks[0].stages[0].seconds_LG.tolist() == [[2, 2]]


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (work_of(None), "a whole step needs the context of its requests; give it, or simulate the MoE layers alone"),
        (
            work_of(PREFILL, replace(MODEL, attention="")),
            "the attention of tiny is not known, or no cost model has it; simulate its MoE layers alone (extent: moe)",
        ),
        (
            work_of(PREFILL, replace(MODEL, heads=3), attention_tensor=2),
            "attention_tensor is 2, which does not divide the 3 heads; use a divisor",
        ),
    ],
    ids=["no context", "unknown attention", "heads"],
)
def test_a_whole_step_that_cannot_be_priced_is_refused(work: Work, message: str) -> None:
    with pytest.raises(InputError) as refused:
        stages_of(work)
    assert str(refused.value) == message


def test_ranks_that_share_heads_work_on_the_requests_of_both_and_sum_up() -> None:
    costs, blocks = stages_of(work_of(PREFILL, attention_tensor=2))
    names = [stage.name for stage in blocks[1].stages]
    assert names == ["norm", "attention", "attention sum", "norm", "dense"]
    project, attend, out = costs.operations_of(blocks[1].stages[1])
    assert isinstance(project, Gemm)
    assert isinstance(attend, Attention)
    assert isinstance(out, Gemm)
    # Half the heads, 2 and 1, for all nine tokens of three requests.
    assert (by_rank(project.rows_X), project.columns_X) == ([9, 9], (2 + 2 * 1) * 4)
    assert (by_rank(attend.batch_X), by_rank(attend.new_tokens_X)) == ([3, 3], [3, 3])
    assert (by_rank(attend.cached_tokens_X), attend.heads_X, attend.kv_heads_X) == ([5, 5], 2, 1)
    assert (by_rank(out.rows_X), out.inner_X) == ([9, 9], 8)
    summed = blocks[1].stages[2]
    (collective,) = costs.operations_of(summed)
    assert isinstance(collective, Collective)
    assert (collective.kind, by_rank(collective.bytes_X), int(collective.ranks_X)) == ("all_reduce", [9 * 16] * 2, 2)
    assert (summed.stream, summed.group) == ("communication", 2)
    # The dense layer is data-parallel again.
    (mlp,) = costs.operations_of(blocks[1].stages[4])
    assert isinstance(mlp, DenseMlp)
    assert by_rank(mlp.rows_X) == [6, 3]


def stage(name: str, *seconds_G: float, communication: bool = False, group: int = 0) -> Stage:
    return Stage(
        name=name,
        stream="communication" if communication else "compute",
        seconds_LG=np.array([seconds_G], dtype=float),
        group=group,
    )


@pytest.mark.parametrize("simulate", [simulate_analytic, simulate_events])
def test_tensor_parallel_attention_by_hand(simulate: Any) -> None:
    """Groups of two: 0 and 1 are ready at 2, 2 and 3 at 4; their sums take 1 s. Experts wait for all: from 5.

    rank 0  attention 0-1, sum 2-3, dispatch 5-7
    rank 1  attention 0-2, sum 2-3, dispatch 5-7
    rank 2  attention 0-4, sum 4-5, dispatch 5-7
    rank 3  attention 0-3, sum 4-5, dispatch 5-7
    """
    stages = [
        stage("attention", 1, 2, 4, 3),
        stage("attention sum", 1, 1, 1, 1, communication=True, group=2),
        stage("dispatch", 2, 2, 2, 2, communication=True),
    ]
    timeline: Timeline = simulate(Program.of([(Block.of(stages),)]))
    assert timeline.start_OG[1].tolist() == [2, 2, 4, 4]
    assert timeline.start_OG[2].tolist() == [5, 5, 5, 5]
    assert timeline.step_s == 7
    assert timeline.arrival_OG[1].tolist() == [1, 2, 4, 3]
    assert timeline.arrival_OG[2].tolist() == [3, 3, 5, 5]


def test_the_hosts_gap_holds_all_ranks_up() -> None:
    _, blocks = stages_of(work_of(PREFILL), Execution(host_gap_s=0.5, launch_s=0))
    gap = blocks[-1].stages[-1]
    assert (gap.name, gap.stream, gap.seconds_LG.tolist()) == ("host gap", "communication", [[0.5, 0.5]])


def test_layers_that_are_simulated_stand_for_their_neighbours() -> None:
    """Four layers of which two are simulated, all alike: the step is that of four."""
    model = replace(MODEL, layers=4)
    every = work_of(PREFILL, model)
    some = replace(work_of(PREFILL, replace(MODEL, layers=2)), model=model, row_of_layer=np.array([0, 0, 1, 1]))
    # The recorder prices both alike: in the same order, whatever the number of layers.
    steps = [simulate_analytic(Program.of([stages_of(work)[1]])) for work in (every, some)]
    assert steps[0].program.layer_O.tolist() == steps[1].program.layer_O.tolist()
    np.testing.assert_array_equal(steps[0].end_OG, steps[1].end_OG)
    assert every.bytes_by_tier() == some.bytes_by_tier()

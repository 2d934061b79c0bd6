from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest

from cost_models.description import Description
from cost_models.devices import DEVICES
from cost_models.kernels.base import Columns, TableKind
from cost_models.kernels.exchange import TABLES, outlasts_bytes
from cost_models.kernels.token_traffic import (
    Chance,
    balanced_chance,
    bytes_between_ranks,
    chance_in_models,
    chance_in_tests,
    chance_of_a_copy,
    copies_of_a_token,
    even_chance,
    expected_load,
    measured_load,
    row_bytes,
)
from cost_models.ops import TokenExchange
from cost_models.traffic import Traffic
from traces.errors import InputError

Direction = Literal["dispatch", "combine"]
Mode = Literal["normal", "low_latency"]
H100 = DEVICES["h100_sxm"]
BY_NAME = {kind.name: kind for kind in TABLES}


def exchange(mode: Mode = "normal", direction: Direction = "dispatch", **changes: Any) -> TokenExchange:
    return replace(
        TokenExchange(
            tokens_X=np.array(64.0),
            hidden=7168,
            top_k=2,
            experts=4,
            ranks_X=np.array(4),
            nodes_X=np.array(2),
            direction=direction,
            mode=mode,
            dtype="fp8",
        ),
        **changes,
    )


def with_even_traffic(operation: TokenExchange) -> TokenExchange:
    """The operation told how many rows even choice gives each pair of ranks, and each node."""
    ranks, nodes = int(operation.ranks_X), int(operation.nodes_X)
    copies = (
        float(operation.top_k) / ranks
        if operation.mode == "low_latency"
        else float(chance_of_a_copy(operation.experts, operation.top_k, ranks))
    )
    tokens = float(operation.tokens_X)
    to_node = tokens * float(chance_of_a_copy(operation.experts, operation.top_k, nodes))
    return replace(
        operation,
        traffic=Traffic.of(
            np.full((ranks, ranks), tokens * copies),
            nodes=nodes,
            node_rows_XGN=None if operation.mode == "low_latency" else np.full((ranks, nodes), to_node),
        ),
    )


@pytest.mark.parametrize(
    ("dtype", "direction", "expected"),
    [
        ("fp8", "dispatch", 7168 + 4 * 56),  # 56 groups of 128 values, each with a 4-byte scale
        ("bfloat16", "dispatch", 14336),
        ("nvfp4", "dispatch", 3584 + 448),  # 4 bits a value, a byte for 16
        ("fp8", "combine", 14336),
        ("fp4", "combine", 4032),
    ],
)
def test_bytes_of_a_row(dtype: str, direction: Direction, expected: float) -> None:
    assert row_bytes(7168, dtype, direction) == expected


@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "chance"),
    [
        (4, 1, 4, 1 / 4),
        (4, 2, 4, 1 / 2),  # a given expert is among the 2 of 4
        (4, 2, 2, 5 / 6),  # both on the other side: 1 of 6
        (8, 8, 8, 1),
        (256, 8, 1, 1),
    ],
)
def test_chance_of_a_copy(experts: int, top_k: int, groups: int, chance: float) -> None:
    assert chance_of_a_copy(experts, top_k, groups) == pytest.approx(chance)


def test_group_limited_routing_reaches_fewer_ranks() -> None:
    hidden, experts, top_k = np.array([7168, 7168]), np.array([256, 384]), np.array([8, 8])
    eight = chance_in_models(hidden, experts, top_k, np.array([8, 8]), np.array([1, 2]))
    # a rank's group is kept in half of all cases, and then holds one of 8 of 128 with 1 - C(96, 8) / C(128, 8)
    assert eight.rank[0] == pytest.approx(0.5 * chance_of_a_copy(128, 8, 4))
    assert eight.rank[1] == chance_of_a_copy(384, 8, 8)
    assert eight.node.tolist() == [1, chance_of_a_copy(384, 8, 2)]


def test_tokens_of_deepep_tests_keep_to_four_nodes() -> None:
    nodes = np.array([1, 2, 4, 8])
    of_row = np.ones(4, dtype=int)
    chance = chance_in_tests(7168 * of_row, 256 * of_row, 8 * of_row, 8 * nodes, nodes)
    even = even_chance(7168, 256, 8, 8 * nodes, nodes)
    np.testing.assert_array_equal(chance.node[:3], even.node[:3])  # there are no more than four
    np.testing.assert_array_equal(chance.rank[:3], even.rank[:3])
    # The best experts of the four best nodes are among a token's eight but for 2 of 100: 3.98 nodes, not 8 * 0.66.
    assert 8 * chance.node[3] == pytest.approx(3.98, abs=0.01)
    assert 8 * even.node[3] == pytest.approx(5.30, abs=0.01)
    # Eight of some 128 experts on 32 ranks of four: 32 * (1 - C(124, 8) / C(128, 8)) = 7.21 if even, a few more as
    # each node has one at least.
    assert 32 * float(chance_of_a_copy(128, 8, 32)) < 64 * chance.rank[3] < 64 * even.rank[3]


def test_copies_of_a_token_by_hand() -> None:
    # One of two nodes of two experts is kept, two a token: both of its experts, on two ranks of one.
    assert copies_of_a_token(4, 2, 4, 2, 1) == (1, 2)
    # All are kept: both on one node in 2 of 6 cases, 1 * 1/3 + 2 * 2/3.
    assert copies_of_a_token(4, 2, 4, 2, 2) == pytest.approx((5 / 3, 2), rel=0.01)


def test_only_the_test_between_nodes_is_group_limited() -> None:
    limited = [kind.name for kind in TABLES if kind.kernel.routing is chance_in_tests]  # type: ignore[attr-defined]
    assert limited == ["deepep_normal_multinode"]


def test_eight_nodes_are_suspect_by_the_bytes_of_four_kept_nodes() -> None:
    # From 4 nodes to 8 what leaves a node grows from 3 * 0.91 = 2.7 copies to 7 * 3.98 / 8 = 3.5, by 1.28: over
    # 1.28 * 1.25 = 1.60 times the time is suspect. Even choice would explain 7 * 0.66 / 2.7 * 1.25 = 2.12 times.
    columns = {name: np.repeat(values[:1], 4) for name, values in ROWS["deepep"].items()}
    columns["node_num"] = np.array([4, 8, 4, 8])
    columns["num_token"] = np.array([128, 128, 4096, 4096])
    kernel = BY_NAME["deepep_normal_multinode"].kernel
    assert kernel.suspects(columns, np.array([1.0, 1.55, 10.0, 16.5]), op="dispatch").tolist() == [False] * 3 + [True]


def test_balanced_routing_reaches_as_many_ranks_as_it_can() -> None:
    ranks = np.array([2, 8, 64])
    chance = balanced_chance(np.array(7168), np.array(256), np.array(8), ranks, np.array([1, 2, 16]))
    assert (ranks * chance.rank).tolist() == [2, 8, 8]
    assert chance.node.tolist() == [1, 1, 0.5]


def test_load_of_normal_mode() -> None:
    # 4 experts on 4 ranks of 2 nodes, 2 a token: each rank gets one of 2 tokens of each rank, 4 * 32 rows, of which
    # half reach it over NVLink (from or by way of the rank of the other number); the other node gets 5 of 6 tokens
    operation = exchange(tokens_X=np.array(60.0))
    load = expected_load(operation, np.array(100.0), even_chance(7168, 4, 2, np.array(4), np.array(2)))
    assert (load.rows, load.up, load.out) == pytest.approx((12000, 6000, 5000))


def test_load_of_low_latency() -> None:
    # 2 copies of each of 60 tokens: a quarter stay, a quarter cross NVLink, half go out
    unused = Chance(rank=np.array(0.0), node=np.array(0.0))
    load = expected_load(exchange("low_latency", tokens_X=np.array(60.0)), np.array(100.0), unused)
    assert (load.rows, load.up, load.out) == pytest.approx((12000, 3000, 6000))


def test_load_of_traffic_counts_the_busiest_rank() -> None:
    # ranks 0, 1 and 2, 3 are nodes; rank 0 sends 10 to its neighbour and 7 to each rank of the other node
    rows_GG = np.array([[5, 10, 7, 7], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    row = np.array(100.0)
    straight = measured_load(exchange("low_latency", traffic=Traffic.of(rows_GG, nodes=2)), row)
    assert (straight.rows, straight.up, straight.out) == (1000, 1000, 1400)
    # 9 tokens leave for the other node, to rank 2, which keeps 7 and passes 7 on to rank 3: up are still the 10.
    node_rows_GN = np.array([[13, 9], [0, 0], [0, 0], [0, 0]])
    passed_on = measured_load(exchange(traffic=Traffic.of(rows_GG, nodes=2, node_rows_XGN=node_rows_GN)), row)
    assert (passed_on.rows, passed_on.up, passed_on.out) == (1000, 1000, 900)
    # With no rows for rank 1, what rank 2 passes on is the most that crosses NVLink.
    rows_GG[0, 1] = 0
    assert measured_load(exchange(traffic=Traffic.of(rows_GG, nodes=2, node_rows_XGN=node_rows_GN)), row).up == 700


def test_traffic_of_every_leg() -> None:
    rows_GG = np.array([[5, 10, 7, 8], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    node_rows_GN = np.array([[13, 9], [0, 0], [0, 0], [0, 0]])
    straight = exchange(traffic=Traffic.of(rows_GG, nodes=2), dtype="bfloat16", hidden=50)  # rows of 100 bytes
    np.testing.assert_array_equal(bytes_between_ranks(straight), rows_GG * 100)
    passed_on = replace(straight, traffic=Traffic.of(rows_GG, nodes=2, node_rows_XGN=node_rows_GN))
    there_GG = [[500, 1000, 900, 0], [0, 0, 0, 0], [0, 0, 700, 800], [0, 0, 0, 0]]
    assert bytes_between_ranks(passed_on).tolist() == there_GG
    assert bytes_between_ranks(replace(passed_on, direction="combine")).tolist() == np.transpose(there_GG).tolist()


def test_nodes_need_not_be_of_one_size() -> None:
    # Node 0 has lost a rank: ranks 0, 1 | 2, 3, 4. Rank 4 is number 2 over there; number 0 here takes in its rows.
    node_of_G = np.array([0, 0, 1, 1, 1])
    rows_GG = np.zeros((5, 5), dtype=np.int64)
    rows_GG[4] = [3, 6, 0, 0, 1]
    node_rows_GN = np.zeros((5, 2), dtype=np.int64)
    node_rows_GN[4] = [7, 1]
    load = measured_load(
        exchange(traffic=Traffic(rows_XGG=rows_GG, node_rows_XGN=node_rows_GN, node_of_G=node_of_G)),
        np.array(1.0),
    )
    assert (load.rows, load.up, load.out) == (6, 6, 7)


def test_the_way_back_is_as_the_way_there() -> None:
    rows_GG = np.random.default_rng(0).integers(0, 100, (4, 4))
    for mode in ("normal", "low_latency"):
        there = measured_load(exchange(mode, traffic=Traffic.of(rows_GG, nodes=2)), np.array(1.0))
        back = measured_load(exchange(mode, "combine", traffic=Traffic.of(rows_GG, nodes=2)), np.array(1.0))
        assert there == back


def test_an_exchange_that_does_not_say_its_traffic_is_told_so() -> None:
    with pytest.raises(InputError, match="prices an exchange by its traffic; give it"):
        bytes_between_ranks(exchange())


@pytest.mark.parametrize("mode", ["normal", "low_latency"])
@pytest.mark.parametrize("direction", ["dispatch", "combine"])
@pytest.mark.parametrize(("ranks", "nodes"), [(8, 1), (16, 2), (64, 8)])
def test_even_traffic_looks_as_if_none_were_given(mode: Mode, direction: Direction, ranks: int, nodes: int) -> None:
    operation = exchange(
        mode, direction, experts=256, top_k=8, ranks_X=np.array(ranks), nodes_X=np.array(nodes), tokens_X=np.array(96.0)
    )
    kernel = BY_NAME[f"deepep_{'normal' if mode == 'normal' else 'll'}_multinode"].kernel
    told = kernel.describe(with_even_traffic(operation), H100)
    assert_same(kernel.describe(operation, H100), told, tolerance=1e-9, turns=1)


def assert_same(one: Description, other: Description, *, tolerance: float = 1e-12, turns: float = 0) -> None:
    assert one.stages.keys() == other.stages.keys()
    np.testing.assert_allclose(one.bound_s, other.bound_s, rtol=tolerance)
    for name, values in one.features.items():
        np.testing.assert_allclose(values, other.features[name], rtol=tolerance, atol=1e-9)
    for stage, terms in one.stages.items():
        for name, term in terms.items():
            whole = stage.endswith("turns") or name == "turns"  # rounded up: a hair more may be a turn more
            np.testing.assert_allclose(
                term, other.stages[stage][name], rtol=0.2 if whole and turns else tolerance, atol=1e-30
            )


def test_a_hot_rank_is_as_so_many_more_tokens() -> None:
    operation = exchange(ranks_X=np.array(8), nodes_X=np.array(1), experts=8)
    told = with_even_traffic(operation).traffic
    assert told is not None
    rows_GG = told.rows_XGG.copy()
    rows_GG[:, 3] *= 2
    kernel = BY_NAME["deepep_normal_1node"].kernel
    hot = kernel.describe(replace(operation, traffic=Traffic.of(rows_GG)), H100)
    assert_same(kernel.describe(replace(operation, tokens_X=np.array(128.0)), H100), hot, tolerance=1e-9, turns=1)


@pytest.mark.parametrize("mode", ["normal", "low_latency"])
def test_terms_never_fall_with_tokens_and_nodes(mode: Mode) -> None:
    kernel = BY_NAME[f"deepep_{'normal' if mode == 'normal' else 'll'}_multinode"].kernel
    operation = exchange(mode, experts=256, top_k=8, tokens_X=2.0 ** np.arange(12), ranks_X=np.array(16))
    for terms in kernel.describe(operation, H100).stages.values():
        for term in terms.values():
            assert np.all(np.diff(term) >= 0)
    nodes = np.array([1, 2, 4, 8, 16])
    by_nodes = kernel.describe(replace(operation, tokens_X=np.array(128.0), ranks_X=8 * nodes, nodes_X=nodes), H100)
    outward = next(terms["out"] for stage, terms in by_nodes.stages.items() if stage.endswith("move"))
    assert np.all(np.diff(outward) > 0)
    assert outward[0] == 0


def test_published_low_latency_bytes() -> None:
    # DeepEP on 16 ranks, 128 tokens of 7168, top-8, FP8: half of 1,024 copies of 7,392 bytes leave by a 50 GB/s NIC:
    # 75.7 us; 118 us were published
    operation = exchange(
        "low_latency", experts=256, top_k=8, ranks_X=np.array(16), nodes_X=np.array(2), tokens_X=np.array(128.0)
    )
    bound = BY_NAME["deepep_ll_multinode"].kernel.describe(operation, H100).bound_s
    assert bound == pytest.approx(512 * 7392 / 50e9)
    assert 0.5 * 118e-6 < bound < 118e-6


def test_slower_than_bytes_explain() -> None:
    nodes = np.array([1, 2, 4, 8, 8])
    seconds = np.array([1.0, 10.0, 30.0, 80.0, 60.0])
    copies = np.array([0, 1, 2.7, 4.6, 4.6])
    tokens = np.array([64, 64, 64, 64, 128])
    # 4 nodes: 3.0 times for 2.7 times the bytes; 8: 2.7 times for 1.7; the last has nothing to be compared with
    assert outlasts_bytes(nodes, seconds, copies, [tokens]).tolist() == [False, False, False, True, False]


ROWS = {
    "deepep": {
        "node_num": np.array([1, 1]),
        "hidden_size": np.array([7168, 4096]),
        "num_token": np.array([128, 16]),
        "num_topk": np.array([8, 6]),
        "num_experts": np.array([256, 256]),
        "dispatch_sms": np.array([24, 8]),
        "combine_sms": np.array([24, 8]),
    },
    "moe_a2a": {
        "node_num": np.array([1, 1]),
        "ep_size": np.array([8, 8]),
        "hidden_size": np.array([7168, 4096]),
        "num_tokens": np.array([128, 16]),
        "topk": np.array([6, 6]),
        "num_experts": np.array([384, 256]),
        "sms": np.array([0, 0]),
    },
}


@pytest.mark.parametrize("direction", ["dispatch", "combine"])
@pytest.mark.parametrize("kind", [kind for kind in TABLES if "alltoall" not in kind.name], ids=lambda kind: kind.name)
def test_a_row_and_an_operation_of_the_same_work_look_the_same(kind: TableKind, direction: Direction) -> None:
    columns: Columns = ROWS["deepep" if kind.name.startswith("deepep") else "moe_a2a"]
    sources: dict[str, Mode] = dict(kind.kernel.sources)  # type: ignore[attr-defined]
    for source, mode in sources.items():
        table = {**columns, "comm_backend": np.array([source, source]), "op_name": np.array(["moe_a2a", "moe_a2a"])}
        rows = kind.kernel.describe_table(table, op=direction, dtype="fp8", device=H100)
        operation = TokenExchange(
            tokens_X=columns.get("num_token", columns.get("num_tokens")),  # type: ignore[arg-type]
            hidden=columns["hidden_size"],
            top_k=columns.get("num_topk", columns.get("topk")),  # type: ignore[arg-type]
            experts=columns["num_experts"],
            ranks_X=np.array([8, 8]),
            nodes_X=np.array([1, 1]),
            direction=direction,
            mode=mode,
            dtype="fp8",
            sms_X=columns["dispatch_sms"] if kind.name.startswith("deepep_normal") else 0,
            kernel=source,
        )
        assert kind.kernel.serves(operation, op=direction)
        described = kind.kernel.describe(operation, H100)
        own = {stage: rows.stages[stage] for stage in described.stages}
        assert_same(replace(rows, stages=own), described)
        for stage in rows.stages.keys() - described.stages.keys():  # other kernels of the table
            assert all(np.all(term == 0) for term in rows.stages[stage].values())


def test_low_precision_combine_is_a_kernel_of_its_own() -> None:
    kind = BY_NAME["trtllm_alltoall_ep2_64"]
    columns = {
        "num_tokens": np.array([64, 64]),
        "hidden_size": np.array([7168, 7168]),
        "topk": np.array([8, 8]),
        "num_experts": np.array([256, 256]),
        "moe_ep_size": np.array([16, 16]),
        "kernel_source": np.array(["NVLinkTwoSided", "NVLinkTwoSided"]),
        "op_name": np.array(["alltoall_combine", "alltoall_combine_low_precision"]),
    }
    rows = kind.kernel.describe_table(columns, op="combine", dtype="nvfp4", device=DEVICES["gb200"])
    assert np.asarray(rows.source).tolist() == ["NVLinkTwoSided", "NVLinkTwoSidedLowPrecision"]
    # 64 tokens to 8 ranks, 15 in 16 of them others: 480 rows of 14,336 or 4,032 bytes at 900 GB/s
    np.testing.assert_allclose(rows.bound_s, [480 * 14336 / 900e9, 480 * 4032 / 900e9])


def test_what_a_kernel_serves() -> None:
    kernel = BY_NAME["moe_a2a_trtllm"].kernel
    assert kernel.serves(exchange("low_latency"), op="dispatch")
    assert not kernel.serves(exchange("low_latency"), op="combine")
    assert not kernel.serves(exchange("normal", kernel="trtllm_deepep_ll"), op="dispatch")
    assert not BY_NAME["deepep_ll_1node"].kernel.serves(exchange("normal"), op="dispatch")


@pytest.mark.parametrize("framework", ["trtllm", "vllm"])
def test_of_few_shapes_no_price_and_no_feature_tells_which_it_is(framework: str) -> None:
    description = BY_NAME[f"moe_a2a_{framework}"].kernel.describe(exchange(), H100)
    assert list(description.features) == ["log tokens", "log row bytes", "log ranks", "log nodes"]
    assert [float(values) for values in description.features.values()] == [6, np.log2(7392), 2, 1]  # 64, 4 and 2
    assert [stage.split()[-1] for stage in description.stages] == ["call", "nodes", "turns", "move"]
    many = BY_NAME["deepep_normal_1node"].kernel.describe(exchange(), H100)
    assert "log experts" in many.features
    assert many.stages["experts"]["local"] == pytest.approx(0.1e-6)  # 4 experts on 4 ranks


@pytest.mark.parametrize("mode", ["normal", "low_latency"])
def test_any_leading_shape(mode: Mode) -> None:
    kernel = BY_NAME["moe_a2a_trtllm"].kernel
    operation = exchange(
        mode, tokens_X=np.array([[0.0], [5.0], [64.0]]), ranks_X=np.array([1, 2, 4, 8]), nodes_X=np.array(1), experts=64
    )
    description = kernel.describe(operation, H100)
    for terms in (*description.stages.values(), description.features):
        for values in terms.values():
            assert np.shape(values) == (3, 4)
            assert np.all(np.isfinite(values))
    layers = exchange(mode, tokens_X=np.full(5, 64.0), traffic=Traffic.of(np.ones((5, 4, 4)), nodes=2))
    assert np.shape(kernel.describe(layers, H100).bound_s) == (5,)


@pytest.mark.parametrize("kind", TABLES, ids=lambda kind: kind.name)
def test_whole_shapes_are_held_out_together(kind: TableKind) -> None:
    names: tuple[str, ...] = kind.kernel.together  # type: ignore[attr-defined]
    columns = {name: np.array([1, 1, 2]) for name in {*names, "node_num"}}
    folds = kind.kernel.holdouts(columns, op="dispatch")["shape"]
    assert folds[0] == folds[1]
    assert np.all(folds >= 0)

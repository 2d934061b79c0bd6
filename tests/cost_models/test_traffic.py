"""Traffic by hand and against plain Python: what ranks compute, send and pass on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models.cluster import gpu_cluster
from cost_models.devices import DEVICES
from cost_models.kernels.token_traffic import bytes_between_ranks, bytes_by_tier, measured_load
from cost_models.ops import TokenExchange
from cost_models.traffic import Traffic, forwarders

SIZES = ((1,), (3,), (2, 2), (2, 1), (1, 3), (3, 2), (1, 1, 1), (2, 3, 1))  # ranks of each node


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """Rows that one rank sends to another."""

    source: int
    rank: int
    rows: int


def legs_of(rows_GG: Any, node_rows_GN: Any, node_of_G: Any) -> list[Leg]:
    """Every leg, written out: straight to the rank, or to the rank of the source's number in a node and on from it."""
    ranks, legs = len(node_of_G), []
    members = [[rank for rank in range(ranks) if node_of_G[rank] == node] for node in range(node_of_G[-1] + 1)]
    for source in range(ranks):
        own = node_of_G[source]
        number = members[own].index(source)
        for node, there in enumerate(members):
            through = source
            if node != own and node_rows_GN is not None:
                through = there[number % len(there)]
                legs.append(Leg(source=source, rank=through, rows=node_rows_GN[source][node]))
            legs += [Leg(source=through, rank=rank, rows=rows_GG[source][rank]) for rank in there]
    return legs


@st.composite
def traffics(draw: st.DrawFn) -> tuple[Traffic, list[list[Leg]]]:
    """One to three exchanges between ranks of nodes of any size, and their legs."""
    node_of_G = np.repeat(*(np.array(x) for x in zip(*enumerate(draw(st.sampled_from(SIZES))), strict=True)))
    ranks, nodes, exchanges = node_of_G.size, int(node_of_G[-1]) + 1, draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    most = draw(st.integers(0, 9))
    rows_XGG = rng.integers(0, most, (exchanges, ranks, ranks), endpoint=True)
    node_rows_XGN = rng.integers(0, most, (exchanges, ranks, nodes), endpoint=True) if draw(st.booleans()) else None
    legs = [
        legs_of(rows_XGG[x].tolist(), None if node_rows_XGN is None else node_rows_XGN[x].tolist(), node_of_G.tolist())
        for x in range(exchanges)
    ]
    return Traffic(rows_XGG=rows_XGG, node_rows_XGN=node_rows_XGN, node_of_G=node_of_G), legs


@settings(deadline=None)  # the first example compiles
@given(traffics())
def test_loads_are_those_of_the_legs(given_: tuple[Traffic, list[list[Leg]]]) -> None:
    told, legs_X = given_
    node_of_G, ranks = told.node_of_G, range(told.ranks)
    for x, legs in enumerate(legs_X):
        moves = [leg for leg in legs if leg.source != leg.rank]
        inside = [leg for leg in moves if node_of_G[leg.source] == node_of_G[leg.rank]]
        between = [leg for leg in moves if node_of_G[leg.source] != node_of_G[leg.rank]]

        def busiest(some: list[Leg]) -> int:
            sent = max(sum(leg.rows for leg in some if leg.source == rank) for rank in ranks)
            return max(sent, max(sum(leg.rows for leg in some if leg.rank == rank) for rank in ranks))

        assert told.rows.computed[x] == told.rows_XGG[x].sum(axis=0).max()
        assert (told.rows.up[x], told.rows.out[x]) == (busiest(inside), busiest(between))
        assert told.rows.all_up[x] == sum(leg.rows for leg in inside)
        assert told.rows.all_out[x] == sum(leg.rows for leg in between)


@settings(deadline=None)
@given(traffics())
def test_legs_are_all_there_and_no_row_is_lost(given_: tuple[Traffic, list[list[Leg]]]) -> None:
    told, legs_X = given_
    legs_XGG = told.legs_XGG()
    for x, legs in enumerate(legs_X):
        want_GG = np.zeros((told.ranks, told.ranks), dtype=int)
        for leg in legs:
            want_GG[leg.source, leg.rank] += leg.rows
        np.testing.assert_array_equal(legs_XGG[x], want_GG)
    # What a rank computes came to it from its own node, or straight; and each row for a node left once for it.
    inside_GG = told.node_of_G[:, None] == told.node_of_G
    if told.node_rows_XGN is None:
        np.testing.assert_array_equal(legs_XGG, told.rows_XGG)
    else:
        np.testing.assert_array_equal((legs_XGG * inside_GG).sum(axis=1), told.rows_XGG.sum(axis=1))
        elsewhere_GN = told.node_of_G[:, None] != np.arange(told.node_of_G[-1] + 1)
        left_XG = (told.node_rows_XGN * elsewhere_GN).sum(axis=2)
        np.testing.assert_array_equal((legs_XGG * ~inside_GG).sum(axis=2), left_XG)


def exchange(told: Traffic, direction: Any = "dispatch") -> TokenExchange:
    return TokenExchange(
        tokens_X=np.zeros(told.rows_XGG.shape[:-2]),
        hidden=50,  # rows of 100 bytes
        top_k=2,
        experts=8,
        ranks_X=np.array(told.ranks),
        nodes_X=np.array(int(told.node_of_G[-1]) + 1),
        direction=direction,
        mode="normal",
        traffic=told,
    )


@settings(deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.sampled_from(["dispatch", "combine"]))
def test_the_busiest_port_of_a_nominal_cluster_is_the_load_over_its_bandwidth(
    seed: int, passed_on: bool, direction: str
) -> None:
    """So that kernels, which see loads, and links, which see legs, agree where links are those of the datasheet."""
    rng, sheet = np.random.default_rng(seed), DEVICES["h100_sxm"]
    told = Traffic.of(
        rng.integers(0, 50, (2, 16, 16)),
        nodes=2,
        node_rows_XGN=rng.integers(0, 50, (2, 16, 2)) if passed_on else None,
    )
    operation = exchange(told, direction)
    load = measured_load(operation, np.array(100.0))
    ports_L = np.maximum(load.up / sheet.scale_up, load.out / sheet.scale_out)
    cluster = gpu_cluster(sheet, 16)
    np.testing.assert_allclose(cluster.port_load_s(bytes_between_ranks(operation)), ports_L, rtol=1e-12)
    # Bytes by tier add up over all ranks, whichever way they go.
    by_tier = {tier: bytes_X.sum() for tier, bytes_X in bytes_by_tier(operation).items()}
    assert by_tier == cluster.bytes_by_tier(bytes_between_ranks(operation))


def test_a_token_that_is_passed_on_crosses_the_network_once() -> None:
    # Nodes of ranks 0, 1 and 2, 3. Rank 1 has four tokens for ranks 2 and 3, both of each: eight rows. They go to rank
    # 3, the number 1 over there, which keeps its four and passes on the four of rank 2.
    rows_GG = np.zeros((4, 4), dtype=int)
    rows_GG[1, 2:] = 4
    node_rows_GN = np.array([[0, 0], [0, 4], [0, 0], [0, 0]])
    told = Traffic.of(rows_GG, nodes=2, node_rows_XGN=node_rows_GN)
    legs_GG = np.zeros((4, 4), dtype=int)
    legs_GG[1, 3], legs_GG[3, 2], legs_GG[3, 3] = 4, 4, 4
    np.testing.assert_array_equal(told.legs_XGG(), legs_GG)
    rows = told.rows
    assert [float(x) for x in (rows.computed, rows.up, rows.out, rows.all_up, rows.all_out)] == [4, 4, 4, 4, 4]
    # Straight, each of the eight rows leaves rank 1's NIC and nothing crosses NVLink.
    rows = Traffic.of(rows_GG, nodes=2).rows
    assert [float(x) for x in (rows.computed, rows.up, rows.out, rows.all_up, rows.all_out)] == [4, 0, 8, 0, 8]


def test_forwarders_of_nodes_of_unequal_size() -> None:
    # Ranks 0, 1 | 2, 3, 4: number 2 of the larger node goes round to number 0 of the smaller.
    assert forwarders(np.array([0, 0, 1, 1, 1])).tolist() == [[0, 2], [1, 3], [0, 2], [1, 3], [0, 4]]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_any_shape_of_exchanges(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    rows_XGG, node_rows_XGN = rng.integers(0, 9, (*shape, 4, 4)), rng.integers(0, 9, (*shape, 4, 2))
    told = Traffic.of(rows_XGG, nodes=2, node_rows_XGN=node_rows_XGN)
    assert told.legs_XGG().shape == (*shape, 4, 4)
    for index in np.ndindex(shape):
        one = Traffic.of(rows_XGG[index], nodes=2, node_rows_XGN=node_rows_XGN[index])
        np.testing.assert_array_equal(told.legs_XGG()[index], one.legs_XGG())
        for name in ("computed", "up", "out", "all_up", "all_out"):
            assert getattr(told.rows, name).shape == shape
            assert getattr(told.rows, name)[index] == getattr(one.rows, name)


@pytest.mark.parametrize("passed_on", [False, True])
def test_one_of_several_and_nothing_at_all(passed_on: bool) -> None:
    rng = np.random.default_rng(0)
    told = Traffic.of(
        rng.integers(1, 9, (3, 4, 4)), nodes=2, node_rows_XGN=rng.integers(1, 9, (3, 4, 2)) if passed_on else None
    )
    second = told.at(1)
    assert second.rows.up.tolist() == [told.rows.up[1]]
    assert second.rows.out.tolist() == [told.rows.out[1]]
    nothing = told.nothing()
    assert nothing.rows_XGG.shape == told.rows_XGG.shape
    assert nothing.rows.up.tolist() == nothing.rows.out.tolist() == nothing.rows.computed.tolist() == [0, 0, 0]
    assert (nothing.node_rows_XGN is None) is not passed_on
    assert told.rows_XGG.min() == 1  # left as it was

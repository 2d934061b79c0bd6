"""Lowering by hand: rows by slot, pairs by rank, bytes by leg; and against a count in plain Python."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models.kernels.token_traffic import bytes_between_ranks
from router.assignment import UNUSED, Assignment
from router.candidates import Candidates
from router.capacity import Capacity
from router.context import RouteContext
from router.placement import place
from router.placement.base import Placement
from router.policies import RoutingPolicy
from router.policies.skip import Skip
from router.policies.top_k import TopK
from router.policies.top_p import TopP
from router.replicas import REPLICA_CHOICES, ReplicaChoice
from router.spill import Spill
from router.splits import SPLITS, split
from sim.layout import Layout
from sim.lower import PROTOCOLS, Protocol, Work, lower, route_operation
from traces.errors import InputError
from traces.model import ModelSpec

# A row is 8 elements of 2 bytes: 16 bytes.
TINY = ModelSpec(name="tiny", layers=1, experts=4, top_k=2, hidden=8, expert_hidden=16)
# Rank 0 holds experts 0 and 1, rank 1 holds 2 and 3.
PLACEMENT = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3]]), experts=4, ranks=2)
TOP_2 = RoutingPolicy(selection=TopK(k=2))
# Ranks 0 and 1 on one node, 2 and 3 on the other.
TWO_NODES = Layout(node_of_G=np.array([0, 0, 1, 1]))


def assigned(ids_TK: Any, dropped: Any = ()) -> Assignment:
    ids = np.array(ids_TK)
    kept = ids != UNUSED
    for token, column in dropped:
        kept[token, column] = False
    weights = kept.astype(np.float32)
    return Assignment(ids_TK=ids, scores_TK=weights, weights_TK=weights, kept_TK=kept, rerouted_TK=np.zeros_like(kept))


def work_of(ids_TK: Any, *, dropped: Any = (), **options: Any) -> Work:
    """Three tokens: two of rank 0, one of rank 1."""
    return lower(
        TINY, [assigned(ids_TK, dropped)], PLACEMENT, policy=TOP_2, source_rank_T=np.array([0, 0, 1]), **options
    )


# Rank 0: token 0 to experts 0 (here) and 2, token 1 to experts 2 and 3. Rank 1: token 2 to experts 1 and 0.
IDS = [[0, 2], [2, 3], [1, 0]]


def test_rows_and_pairs_by_hand() -> None:
    work = work_of(IDS)
    assert work.rows_LS.tolist() == [[2, 1, 2, 1]]
    assert work.rows_LGS.tolist() == [[[2, 1], [2, 1]]]
    # From rank 0: token 0 once to itself; tokens 0, 1, 1 to rank 1. From rank 1: token 2 twice to rank 0.
    assert work.pairs_LGG.tolist() == [[[1, 3], [2, 0]]]
    assert work.tokens_G.tolist() == [2, 1]
    assert work.ranks == 2


def dispatched(work: Work) -> Any:
    return bytes_between_ranks(work.exchange("dispatch")).tolist()


def test_per_expert_sends_a_token_once_for_each_expert() -> None:
    assert dispatched(work_of(IDS, protocol="per_expert")) == [[[16, 48], [32, 0]]]


def test_per_rank_sends_a_token_once_to_each_rank() -> None:
    # Token 1 goes to rank 1 once for its two experts there, token 2 to rank 0 once.
    work = work_of(IDS, protocol="per_rank")
    assert dispatched(work) == [[[16, 32], [16, 0]]]
    assert work.pairs_LGG.tolist() == [[[1, 3], [2, 0]]]  # what is computed is the same
    assert work.copies_LGG.tolist() == [[[1, 2], [1, 0]]]
    assert (work.sent_LG.tolist(), work.received_LG.tolist()) == ([[4, 2]], [[3, 3]])
    assert work.routed_LG.tolist() == [[2, 2]]  # tokens 0 and 2 on rank 0, tokens 0 and 1 on rank 1


def two_nodes(ids_TK: Any, sources: list[int], **options: Any) -> Work:
    """One expert on each of four ranks, two nodes."""
    placement = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3]]), experts=4, ranks=4)
    return lower(
        TINY,
        [assigned(ids_TK)],
        placement,
        policy=TOP_2,
        source_rank_T=np.array(sources),
        layout=TWO_NODES,
        **options,
    )


def test_per_node_sends_a_token_once_to_each_node_and_passes_it_on_there() -> None:
    # Rank 0's token goes to experts 2 and 3, both on the other node; rank 1's to expert 2 there and 0 here.
    ids, sources = [[2, 3], [2, 0]], [0, 1]
    per_rank, per_node = (two_nodes(ids, sources, protocol=protocol) for protocol in ("per_rank", "per_node"))
    assert per_rank.node_copies_LGN.tolist() == [[[0, 1], [1, 1], [0, 0], [0, 0]]]
    assert dispatched(per_rank) == [[[0, 0, 16, 16], [16, 0, 16, 0], [0, 0, 0, 0], [0, 0, 0, 0]]]
    # Rank 2 takes rank 0's token in, keeps it for its own expert, and passes it on to rank 3. Rank 3 takes rank 1's
    # token in, has no use for it, and passes it on to rank 2.
    assert dispatched(per_node) == [[[0, 0, 16, 0], [16, 0, 0, 16], [0, 0, 16, 16], [0, 0, 16, 0]]]
    # 3 rows over the network and 1 inside, there and back; then 2 and 3.
    assert per_rank.bytes_by_tier() == {"scale_up": 2 * 16, "scale_out": 2 * 3 * 16}
    assert per_node.bytes_by_tier() == {"scale_up": 2 * 3 * 16, "scale_out": 2 * 2 * 16}


def test_ranks_that_share_an_experts_width_all_get_its_tokens() -> None:
    """Two groups of two ranks; each group's slot has an expert. Both ranks of a group compute the same rows."""
    placement = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3]]), experts=4, ranks=2)
    layout = Layout(node_of_G=np.zeros(4, dtype=np.int64), expert_tensor=2)
    work = lower(TINY, [assigned([[0, 2]])], placement, policy=TOP_2, source_rank_T=np.array([1]), layout=layout)
    assert work.rows_LS.tolist() == [[1, 0, 1, 0]]
    assert work.rows_LGS.tolist() == [[[1, 0], [1, 0], [1, 0], [1, 0]]]
    assert work.pairs_LGG.tolist() == [[[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]]
    # A copy for each of the four ranks, of which the sender has one already.
    assert work.bytes_by_tier() == {"scale_up": 2 * 3 * 16, "scale_out": 0}


def test_rows_go_out_in_the_dispatch_dtype_and_come_back_as_activations() -> None:
    # 8 elements: in FP8 a byte each and a 4-byte scale for 128 of them.
    work = work_of(IDS, dispatch_dtype="fp8")
    out, back = (bytes_between_ranks(work.exchange(direction)) for direction in ("dispatch", "combine"))
    assert out[0, 0, 1] == 3 * 8 * (1 + 4 / 128)
    assert back[0, 1, 0] == 3 * 8 * 2
    in_float32 = replace(TINY, activation_bytes=4)
    work = lower(in_float32, [assigned(IDS)], PLACEMENT, policy=TOP_2, source_rank_T=np.array([0, 0, 1]))
    assert work.dispatch_dtype == "float32"
    assert bytes_between_ranks(work.exchange("combine"))[0, 1, 0] == 3 * 8 * 4


def test_layers_that_stand_for_others_count_for_them_too() -> None:
    """Two of five layers are simulated: the first stands for two, the other for three."""
    placement = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), experts=4, ranks=2)
    # Layer 0 sends 3 + 2 rows to the other rank; layer 1 none.
    layers = [assigned(IDS), assigned([[0, 1], [1, 0], [2, 3]])]
    work = lower(
        TINY,
        layers,
        placement,
        policy=TOP_2,
        source_rank_T=np.array([0, 0, 1]),
        row_of_layer=np.array([0, 0, 1, 1, 1]),
    )
    assert work.bytes_by_tier() == {"scale_up": 2 * (2 * 5 + 3 * 0) * 16, "scale_out": 0}


def test_a_placement_and_a_layout_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError) as refused:
        work_of(IDS, layout=TWO_NODES)
    assert str(refused.value) == (
        "the placement is for 2 ranks, the layout spreads experts over 4 (ranks / expert_tensor); place for these"
    )
    two_layers = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3]] * 2), experts=4, ranks=2)
    with pytest.raises(InputError, match="1 layers of assignments, but the placement has 2; place for these layers"):
        lower(TINY, [assigned(IDS)], two_layers, policy=TOP_2, source_rank_T=np.array([0, 0, 1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_tensor": 3}, "attention_tensor is 3, which does not divide 4 ranks; use a divisor of them"),
        ({"expert_tensor": 0}, "expert_tensor is 0, which does not divide 4 ranks; use a divisor of them"),
        (
            {"expert_tensor": 4},
            "expert_tensor is 4, but then some ranks that work together lie on different nodes; use a divisor of 2",
        ),
    ],
    ids=["no divisor", "zero", "over nodes"],
)
def test_a_layout_that_cannot_be_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError) as refused:
        Layout(node_of_G=TWO_NODES.node_of_G, **options)
    assert str(refused.value) == message


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_goes_out_comes_back(protocol: Protocol) -> None:
    work = two_nodes([[2, 3], [2, 0], [1, 3]], [0, 1, 3], protocol=protocol)
    out, back = (bytes_between_ranks(work.exchange(direction)) for direction in ("dispatch", "combine"))
    np.testing.assert_array_equal(back[0], out[0].T)


def test_unused_and_dropped_pairs_are_neither_sent_nor_computed() -> None:
    work = work_of([[0, UNUSED], [2, 3], [1, 0]], dropped=[(1, 1), (2, 0)])
    assert work.rows_LS.tolist() == [[2, 0, 1, 0]]
    assert work.pairs_LGG.tolist() == [[[1, 1], [1, 0]]]


def test_each_layer_has_a_placement_of_its_own() -> None:
    placement = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3], [2, 3, 0, 1]]), experts=4, ranks=2)
    work = lower(TINY, [assigned(IDS)] * 2, placement, policy=TOP_2, source_rank_T=np.array([0, 0, 1]))
    assert work.rows_LS.tolist() == [[2, 1, 2, 1], [2, 1, 2, 1]]  # slots 0 and 1 now hold experts 2 and 3
    assert work.pairs_LGG.tolist() == [[[1, 3], [2, 0]], [[3, 1], [0, 2]]]


def test_counts_go_ahead_as_int64_a_slot() -> None:
    assert work_of(IDS).count_bytes == 8 * 2


def test_replicas_share_the_rows() -> None:
    # Both ranks hold both of two experts; rank 0's tokens take turns: slots 0 and 2; rank 1's starts at slot 2.
    placement = Placement(slot_to_expert_LS=np.array([[0, 1, 0, 1]]), experts=2, ranks=2)
    ids, sources = [[0, UNUSED]] * 3, np.array([0, 0, 1])
    even = lower(TINY, [assigned(ids)], placement, policy=TOP_2, source_rank_T=sources, replica_choice="even")
    assert even.rows_LS.tolist() == [[1, 0, 2, 0]]
    local = lower(TINY, [assigned(ids)], placement, policy=TOP_2, source_rank_T=sources, replica_choice="local")
    assert local.rows_LS.tolist() == [[2, 0, 1, 0]]
    assert local.pairs_LGG.tolist() == [[[2, 0], [0, 1]]]


def test_near_replicas_are_those_of_the_layouts_nodes() -> None:
    # Expert 0 is on ranks 1 and 2, one on each node. Rank 0 goes to rank 1, rank 3 to rank 2.
    placement = Placement(slot_to_expert_LS=np.array([[1, 2, 0, 3, 0, 3, 1, 2]]), experts=4, ranks=4)
    options: Any = {"policy": TOP_2, "source_rank_T": np.array([0, 0, 3, 3]), "layout": TWO_NODES}
    nearest, local = (
        lower(TINY, [assigned([[0, UNUSED]] * 4)], placement, replica_choice=choice, **options)
        for choice in ("nearest", "local")
    )
    assert nearest.pairs_LGG[0].tolist() == [[0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 2, 0]]
    assert (nearest.bytes_by_tier()["scale_out"], local.bytes_by_tier()["scale_out"]) == (0, 2 * 2 * 16)


def test_a_split_by_counts_evens_out_the_whole_step() -> None:
    # Expert 0 is on both ranks, expert 1 on rank 0 alone. Expert 1 has 2 of 6 rows, so rank 0 takes 1 of expert 0's 4.
    placement = Placement(slot_to_expert_LS=np.array([[0, 1, 0, 2]]), experts=3, ranks=2)
    ids, sources = [[0, 1], [0, UNUSED], [0, 1], [0, UNUSED]], np.array([0, 0, 1, 1])
    work = lower(TINY, [assigned(ids)], placement, policy=TOP_2, source_rank_T=sources, replica_choice="water_filling")
    assert work.rows_LS.tolist() == [[1, 2, 3, 0]]
    # Rank 0's own tokens have the row that stays there; rank 1's stay at home.
    assert work.pairs_LGG.tolist() == [[[2, 1], [1, 2]]]


def test_ranks_tell_each_other_the_counts_of_all_experts_before_they_split_them() -> None:
    placement = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 0, 3, 1]]), experts=4, ranks=2)
    spill = RoutingPolicy(selection=TopK(k=2), capacity=Spill(factor=1.0, least_rows=1, guests=1))

    def counts(choice: ReplicaChoice, policy: RoutingPolicy = TOP_2, to: Placement = placement) -> tuple[int, bool]:
        sources = np.array([0, 0, 1])
        work = lower(TINY, [assigned(IDS)], to, policy=policy, source_rank_T=sources, replica_choice=choice)
        return work.count_bytes, work.counts_first

    assert counts("even") == (8 * 3, False)
    assert counts("water_filling") == (8 * 4, True)
    assert counts("even", spill) == (8 * 6, True)
    assert counts("water_filling", spill) == (8 * 4, True)  # who knows those knows the rows of slots
    assert counts("water_filling", to=PLACEMENT) == (8 * 2, False)  # nothing to choose


def test_padding_beside_a_split_by_counts_is_refused() -> None:
    placement = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 0, 3, 1]]), experts=4, ranks=2)
    options: Any = {"policy": PADDED, "source_rank_T": np.array([0, 0, 1]), "replica_choice": "water_filling"}
    with pytest.raises(InputError) as refused:
        lower(TINY, [assigned(IDS)], placement, **options)
    assert str(refused.value) == (
        "replica_choice water_filling, but the capacity pads: its places are fixed before counts are known; "
        "use even, local or nearest, or pad: false"
    )
    assert lower(TINY, [assigned(IDS)], PLACEMENT, **options).padding_share == 3 / 9  # no replicas, no choice


PADDED = RoutingPolicy(selection=TopK(k=2), capacity=Capacity(factor=1.0, pad=True))


def test_empty_places_are_sent_and_computed() -> None:
    """C is ceil(2 * 2 / 4) = 1 for rank 0's two tokens, and ceil(1 * 2 / 4) = 1 for rank 1's one."""
    work, without = (
        lower(TINY, [assigned(IDS, [(1, 0)])], PLACEMENT, policy=policy, source_rank_T=np.array([0, 0, 1]))
        for policy in (PADDED, TOP_2)
    )
    # Kept: rank 0 has rows for experts 0, 2 and 3, so it pads expert 1; rank 1 for 0 and 1, so it pads 2 and 3.
    assert work.padding is not None
    assert work.padding.rows_LS.tolist() == [[0, 1, 1, 1]]
    assert work.padding.rows_LGG.tolist() == [[[1, 0], [0, 2]]]
    assert without.rows_LS.tolist() == [[2, 1, 1, 1]]
    assert work.rows_LS.tolist() == [[2, 2, 2, 2]]
    assert work.padding_share == 3 / 8
    assert dispatched(work) == [[[32, 32], [32, 32]]]
    # They are gathered and sent, but no token's: pairs are what they were, and only these are added up.
    assert work.packed_LG.tolist() == [[4, 4]]
    assert work.sent_LG.tolist() == without.sent_LG.tolist() == [[3, 2]]
    assert work.received_LG.tolist() == [[4, 4]]
    assert without.padding_share == 0


@pytest.mark.parametrize("protocol", ["per_rank", "per_node"])
def test_where_tokens_are_sent_once_padding_is_computed_but_not_sent(protocol: Protocol) -> None:
    work, without = (
        lower(TINY, [assigned(IDS)], PLACEMENT, policy=policy, source_rank_T=np.array([0, 0, 1]), protocol=protocol)
        for policy in (PADDED, TOP_2)
    )
    assert dispatched(work) == dispatched(without)
    assert work.rows_LS.sum() > without.rows_LS.sum()


def test_places_over_all_ranks_are_filled_where_they_are() -> None:
    """C is ceil(3 * 2 / 4) = 2 for all: experts 1 and 3 have a row each."""
    policy = RoutingPolicy(selection=TopK(k=2), capacity=Capacity(factor=1.0, scope="global", pad=True))
    work = lower(TINY, [assigned(IDS)], PLACEMENT, policy=policy, source_rank_T=np.array([0, 0, 1]))
    assert work.rows_LS.tolist() == [[2, 2, 2, 2]]
    assert dispatched(work) == dispatched(work_of(IDS))


def test_padding_to_the_fullest_expert() -> None:
    """Tutel's factor 0: rank 0's expert 2 has two rows, so every rank has two places in every expert."""
    policy = RoutingPolicy(selection=TopK(k=2), capacity=Capacity(factor=0.0, rule="tutel", pad=True))
    work = lower(TINY, [assigned(IDS)], PLACEMENT, policy=policy, source_rank_T=np.array([0, 0, 1]))
    assert work.rows_LS.tolist() == [[4, 4, 4, 4]]
    assert work.padding_share == 10 / 16


def test_places_lie_over_replicas_as_pairs_do() -> None:
    """Both ranks hold both of two experts; C is ceil(3 * 1 / 2 * 2) = 3 for three tokens of each rank."""
    placement = Placement(slot_to_expert_LS=np.array([[0, 1, 0, 1]]), experts=2, ranks=2)
    policy = RoutingPolicy(selection=TopK(k=1), capacity=Capacity(factor=2.0, pad=True))
    ids, sources = [[0]] * 3 + [[1]] * 3, np.array([0, 0, 0, 1, 1, 1])
    even, local = (
        lower(TINY, [assigned(ids)], placement, policy=policy, source_rank_T=sources, replica_choice=choice)
        for choice in ("even", "local")
    )
    # In turn, a rank's first and third place of each expert are on itself, as those of its pairs are.
    assert dispatched(even) == [[[4 * 16, 2 * 16], [2 * 16, 4 * 16]]]
    assert dispatched(local) == [[[6 * 16, 0], [0, 6 * 16]]]
    assert even.rows_LS.tolist() == local.rows_LS.tolist() == [[3, 3, 3, 3]]


def test_what_the_policy_itself_does() -> None:
    tokens_G = np.array([2, 1])
    plain = route_operation(TOP_2, PLACEMENT, tokens_G)
    assert (plain.width, plain.parts, plain.passes) == (2, ("top_k",), 1)
    with_replicas = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3, 0, 1]]), experts=4, ranks=2)
    policy = RoutingPolicy(selection=TopP(p=0.5, k_max=3), capacity=Capacity(factor=1.0, drop="position"))
    full = route_operation(policy, with_replicas, tokens_G)
    assert (full.width, full.parts) == (3, ("top_p", *policy.work[1:], "replicas"))
    assert full.passes == sum(part.passes for part in policy.parts) > 1
    assert full.tokens_X.tolist() == [2, 1]


@dataclass(frozen=True, kw_only=True)
class RoutedStep:
    """Any step under any policy on any placement and layout: two layers, and the arguments of `lower`."""

    assignments: list[Assignment]
    layout: Layout
    placement: Placement
    policy: RoutingPolicy
    source_rank_T: Any
    replica_choice: ReplicaChoice

    def lower(self, protocol: Protocol) -> Work:
        return lower(
            TINY,
            self.assignments,
            self.placement,
            policy=self.policy,
            source_rank_T=self.source_rank_T,
            layout=self.layout,
            protocol=protocol,
            replica_choice=self.replica_choice,
        )


@st.composite
def routed(draw: st.DrawFn, choices: Sequence[ReplicaChoice] = REPLICA_CHOICES) -> RoutedStep:
    nodes, tensor = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    per_node = tensor * draw(st.integers(1, 2))
    lost = tensor * draw(st.integers(0, per_node // tensor - 1)) if nodes > 1 else 0  # the last node may be smaller
    ranks = nodes * per_node - lost
    groups = ranks // tensor
    experts = draw(st.integers(1, 8))
    slots = groups * draw(st.integers(-(-experts // groups), experts))
    width = draw(st.integers(1, experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    selection = draw(
        st.sampled_from([TopK(k=width), TopP(p=0.4, k_max=width), Skip(threshold=0.7, k_max=width)]),
    )
    capacity = draw(
        st.sampled_from([None, Capacity(factor=0.75), Capacity(factor=0.5, drop="position", scope="global")])
    )
    policy = RoutingPolicy(selection=selection, capacity=capacity)
    source_rank_T = np.sort(rng.integers(0, ranks, draw(st.integers(0, 24))))
    assignments = []
    for layer in range(2):
        logits_TE = rng.normal(size=(source_rank_T.size, experts)).astype(np.float32)
        candidates = Candidates.from_logits(logits_TE, source_rank_T)
        context = RouteContext(layer=layer, ranks=ranks, renormalise=True)
        assignments.append(policy.route(candidates, context, {})[0])
    algorithm = draw(st.sampled_from(["contiguous", "random", "lpt"]))
    return RoutedStep(
        assignments=assignments,
        layout=Layout(node_of_G=np.arange(ranks) // per_node, expert_tensor=tensor),
        placement=place(algorithm, rng.random((2, experts)), ranks=groups, slots=slots),
        policy=policy,
        source_rank_T=source_rank_T,
        replica_choice=draw(st.sampled_from(choices)),
    )


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What goes where in one layer: `pairs` and `copies` by (source, rank), `node_copies` by (source, node)."""

    rows: Counter[int]
    pairs: Counter[tuple[int, int]]
    copies: Counter[tuple[int, int]]
    node_copies: Counter[tuple[int, int]]
    legs: Counter[tuple[int, int]]


def counted(step: RoutedStep, layer: int) -> Counts:
    """Token by token, as the docs say it; `legs` are those of the `per_node` protocol."""
    assignment, layout, placement = step.assignments[layer], step.layout, step.placement
    tensor = layout.expert_tensor
    node_of_rank = layout.node_of_G.tolist()
    ranks_of = [np.flatnonzero(layout.node_of_G == node).tolist() for node in range(layout.nodes)]
    slots_of = [np.flatnonzero(placement.slot_to_expert_LS[layer] == e).tolist() for e in range(placement.experts)]
    turns: Counter[tuple[int, int]] = Counter()
    shares = dealt(step, layer) if step.replica_choice in SPLITS else Counter()
    counts = Counts(rows=Counter(), pairs=Counter(), copies=Counter(), node_copies=Counter(), legs=Counter())
    for source, ids, kept in zip(
        step.source_rank_T.tolist(), assignment.ids_TK.tolist(), assignment.kept_TK.tolist(), strict=True
    ):
        ranks: list[int] = []
        for expert, is_kept in zip(ids, kept, strict=True):
            if not is_kept:
                continue
            home, slots = source // tensor, slots_of[expert]
            own = [s for s in slots if s // placement.slots_per_rank == home]
            own_node = node_of_rank[home * tensor]
            near = [s for s in slots if node_of_rank[s // placement.slots_per_rank * tensor] == own_node]
            if step.replica_choice in SPLITS:
                slot = next(s for s in slots if shares[home, s])
                shares[home, slot] -= 1
            elif step.replica_choice != "even" and own:
                slot = own[-1]
            else:
                in_turn = near if step.replica_choice == "nearest" and near else slots
                slot = in_turn[(turns[home, expert] + home) % len(in_turn)]
                turns[home, expert] += 1
            counts.rows[slot] += 1
            group = slot // placement.slots_per_rank
            ranks += range(group * tensor, (group + 1) * tensor)
        counts.pairs.update((source, rank) for rank in ranks)
        counts.copies.update((source, rank) for rank in set(ranks))
        counts.node_copies.update((source, node) for node in {node_of_rank[rank] for rank in ranks})
        for node in {node_of_rank[rank] for rank in ranks}:
            sender = source
            if node != node_of_rank[source]:
                own_number = ranks_of[node_of_rank[source]].index(source)
                sender = ranks_of[node][own_number % len(ranks_of[node])]
                counts.legs[source, sender] += 1
            counts.legs.update((sender, rank) for rank in set(ranks) if node_of_rank[rank] == node and rank != sender)
    return counts


def dealt(step: RoutedStep, layer: int) -> Counter[tuple[int, int]]:
    """Rows by (group of ranks that they come from, slot), row by row: those that stay near go first."""
    assignment, layout, placement = step.assignments[layer], step.layout, step.placement
    node_of_group = layout.node_of_G[:: layout.expert_tensor].tolist()
    home_T = step.source_rank_T // layout.expert_tensor
    sources = [np.repeat(home_T[:, None], assignment.ids_TK.shape[1], axis=1)[assignment.kept_TK], assignment.ids_TK]
    left = Counter(zip(sources[0].tolist(), sources[1][assignment.kept_TK].tolist(), strict=True))
    counts_E = np.bincount(assignment.ids_TK[assignment.kept_TK], minlength=placement.experts)
    rows_EX = split(step.replica_choice, counts_E, placement, layer)
    room = dict(zip(placement.expert_slots_LEX[layer].reshape(-1).tolist(), rows_EX.reshape(-1).tolist(), strict=True))
    shares: Counter[tuple[int, int]] = Counter()
    for farthest in range(3):
        for slot, expert in enumerate(placement.slot_to_expert_LS[layer].tolist()):
            group = slot // placement.slots_per_rank
            for home in range(placement.ranks):
                distance = 0 if home == group else 1 if node_of_group[home] == node_of_group[group] else 2
                while distance <= farthest and room[slot] and left[home, expert]:
                    shares[home, slot] += 1
                    room[slot] -= 1
                    left[home, expert] -= 1
    return shares


def as_matrix(counts: Counter[tuple[int, int]], shape: Sequence[int]) -> Any:
    matrix = np.zeros(shape, dtype=np.int64)
    for pair, count in counts.items():
        matrix[pair] = count
    return matrix


@settings(max_examples=100, deadline=None)
@given(step=routed())
def test_every_kept_pair_is_computed_once(step: RoutedStep) -> None:
    """However tokens travel, each chosen pair is dropped, or computed by the ranks of the one slot that it goes to."""
    works = [step.lower(protocol) for protocol in PROTOCOLS]
    layout, placement = step.layout, step.placement
    ranks = layout.ranks
    for layer, assignment in enumerate(step.assignments):
        expected = counted(step, layer)
        kept, dropped = int(assignment.kept_TK.sum()), int((assignment.chosen_TK & ~assignment.kept_TK).sum())
        assert kept + dropped == int((assignment.ids_TK != UNUSED).sum())
        for work in works:
            assert work.rows_LS[layer].sum() == kept
            assert work.pairs_LGG[layer].sum() == kept * layout.expert_tensor
            assert work.rows_LS[layer].tolist() == [expected.rows[slot] for slot in range(placement.slots)]
            np.testing.assert_array_equal(work.pairs_LGG[layer], as_matrix(expected.pairs, (ranks, ranks)))
            np.testing.assert_array_equal(work.copies_LGG[layer], as_matrix(expected.copies, (ranks, ranks)))
            nodes = as_matrix(expected.node_copies, (ranks, layout.nodes))
            np.testing.assert_array_equal(work.node_copies_LGN[layer], nodes)
            np.testing.assert_array_equal(work.received_LG[layer], work.rows_LGS[layer].sum(axis=1))
        # By expert: what was asked for.
        by_expert_E = np.bincount(
            placement.slot_to_expert_LS[layer], works[0].rows_LS[layer], minlength=placement.experts
        )
        asked_E = np.bincount(assignment.ids_TK[assignment.kept_TK], minlength=placement.experts)
        np.testing.assert_array_equal(by_expert_E, asked_E)
    assert works[0].tokens_G.sum() == step.source_rank_T.size


@settings(max_examples=100, deadline=None)
@given(step=routed())
def test_bytes_sent_are_bytes_received(step: RoutedStep) -> None:
    ranks = step.layout.ranks
    away_GG = ~np.eye(ranks, dtype=bool)
    for protocol in PROTOCOLS:
        work = step.lower(protocol)
        out, back = (bytes_between_ranks(work.exchange(direction)) for direction in ("dispatch", "combine"))
        np.testing.assert_array_equal(out.sum(axis=2), back.sum(axis=1))  # what a rank sends comes back to it
        np.testing.assert_array_equal(out.sum(axis=1), back.sum(axis=2))
        # What crosses links is what the report says, and each leg is where plain counting has it.
        crossing = (out * away_GG).sum() + (back * away_GG).sum()
        assert sum(work.bytes_by_tier().values()) == crossing
        for layer in range(2):
            counts = counted(step, layer)
            legs = {"per_expert": counts.pairs, "per_rank": counts.copies, "per_node": counts.legs}[protocol]
            expected = as_matrix(legs, (ranks, ranks)) * TINY.row_bytes
            np.testing.assert_array_equal(out[layer] * away_GG, expected * away_GG)


@settings(max_examples=100, deadline=None)
@given(step=routed(["even", "local", "nearest"]), rule=st.sampled_from(["megatron", "tutel", "megablocks"]))
def test_padding_adds_rows_up_to_the_places_and_moves_none(step: RoutedStep, rule: Any) -> None:
    limit = Capacity(factor=2.0, rule=rule, pad=True)
    padded_step = replace(step, policy=replace(step.policy, capacity=limit))
    for protocol in PROTOCOLS:
        work, without = padded_step.lower(protocol), step.lower(protocol)
        assert work.padding is not None
        assert (work.padding.rows_LS >= 0).all()
        np.testing.assert_array_equal(work.rows_LS - work.padding.rows_LS, without.rows_LS)
        np.testing.assert_array_equal(work.pairs_LGG, without.pairs_LGG)
        tensor = step.layout.expert_tensor
        assert work.padding.rows_LGG.sum() == work.padding.rows_LS.sum() * tensor
        np.testing.assert_array_equal((work.pairs_LGG + work.padding.rows_LGG).sum(axis=1), work.received_LG)
    if tensor > 1:
        return
    experts, width = step.placement.experts, step.assignments[0].ids_TK.shape[1]
    tokens_G = np.bincount(step.source_rank_T, minlength=step.layout.ranks).tolist()
    for layer, assignment in enumerate(step.assignments):
        loads_GKE = np.zeros((len(tokens_G), width, experts), dtype=np.int64)
        for source, ids, kept in zip(step.source_rank_T, assignment.ids_TK, assignment.kept_TK, strict=True):
            for column in np.flatnonzero(kept):
                loads_GKE[source, column, ids[column]] += 1
        chosen_TK = np.where(assignment.chosen_TK, assignment.ids_TK, experts)
        expected_E = np.zeros(experts, dtype=np.int64)
        for source, tokens in enumerate(tokens_G):
            own_TK = chosen_TK[step.source_rank_T == source]
            fullest_P = [int(np.bincount(own_T, minlength=experts + 1)[:experts].max()) for own_T in own_TK.T]
            places = sum(limit.places(tokens, width, experts, fullest_P))
            load_E = loads_GKE[source].sum(axis=0)
            if (load_E > places).any():
                return  # its own limit would have dropped some: not a step that this capacity lets through
            expected_E += places
        rows_E = np.bincount(step.placement.slot_to_expert_LS[layer], work.rows_LS[layer], minlength=experts)
        np.testing.assert_array_equal(rows_E, expected_E)


@settings(max_examples=100, deadline=None)
@given(step=routed())
def test_sending_once_never_sends_more(step: RoutedStep) -> None:
    per_expert, per_rank, per_node = (step.lower(protocol) for protocol in PROTOCOLS)
    once, for_each = (bytes_between_ranks(work.exchange("dispatch")) for work in (per_rank, per_expert))
    assert (once <= for_each).all()
    np.testing.assert_array_equal(once > 0, for_each > 0)
    tokens_G = np.bincount(step.source_rank_T, minlength=step.layout.ranks)
    assert (once <= tokens_G[None, :, None] * TINY.row_bytes).all()  # no token twice to one rank
    # Once a node: no more over the network, nor do forwarders send more than everything there was.
    tiers = [work.bytes_by_tier() for work in (per_node, per_rank, per_expert)]
    assert tiers[0]["scale_out"] <= tiers[1]["scale_out"] <= tiers[2]["scale_out"]
    if step.layout.nodes == 1:
        assert tiers[0] == tiers[1]
        assert tiers[0]["scale_out"] == 0


def test_layers_and_widths_that_do_not_fit_are_said() -> None:
    sources = np.array([0, 0, 1])
    with pytest.raises(InputError, match="more layers of assignments than the placement's 1; place for these"):
        lower(TINY, [assigned(IDS)] * 2, PLACEMENT, policy=TOP_2, source_rank_T=sources)
    layout = Layout(node_of_G=np.zeros(6, dtype=np.int64), expert_tensor=3)
    with pytest.raises(InputError, match="expert_tensor is 3, which does not divide the experts' width 16"):
        lower(TINY, [assigned(IDS)], PLACEMENT, policy=TOP_2, source_rank_T=sources, layout=layout)


def test_tokens_of_a_rank_that_the_layout_has_not_are_refused() -> None:
    with pytest.raises(InputError, match="tokens of rank 3, but the layout has 2 ranks; use one with as many"):
        lower(TINY, [assigned(IDS)], PLACEMENT, policy=TOP_2, source_rank_T=np.array([0, 0, 3]))

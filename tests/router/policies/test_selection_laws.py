"""Laws of selections: budgets that hold, loads that even out, optima that are optima."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.backends import best_in_groups, first_true, marked, nth_largest, topk
from router.candidates import Candidates
from router.context import RouteContext, State
from router.policies.balance_bias import BalanceBias
from router.policies.expert_choice import ExpertChoice
from router.policies.group_limited import GroupLimited
from router.policies.held_top_p import HeldTopP
from router.policies.null_experts import NullExperts
from router.policies.top_k import TopK
from router.policies.top_k_by_layer import plan_layers
from traces.errors import InputError

CONTEXT = RouteContext(layer=0, ranks=1, renormalise=True)


def stream(seed: int, *, tokens: int, experts: int = 16, spread: float = 1.5, sigmoid: bool = False) -> Candidates:
    """A step of a stationary stream: normal logits, experts of even popularity but for what `spread` draws."""
    logits_TE = np.random.default_rng(seed).normal(scale=spread, size=(tokens, experts)).astype(np.float32)
    source_rank_T = np.zeros(tokens, dtype=np.int64)
    return Candidates.from_logits(logits_TE, source_rank_T, gate="sigmoid" if sigmoid else "softmax")


@pytest.mark.parametrize("target", [1.25, 2.0, 3.5, 6.0])
@pytest.mark.parametrize("spread", [0.0625, 0.5, 1.5, 4.0])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_held_top_p_holds_its_target_within_two_per_cent(target: float, spread: float, gate: str) -> None:
    policy, state = HeldTopP(target=target, k_max=8), {}
    mean_k = []
    for seed in range(50):
        candidates = stream(seed, tokens=512, spread=spread, sigmoid=gate == "sigmoid")
        used_TK, state = policy.choose(candidates, CONTEXT, state)
        mean_k.append(used_TK.sum(axis=1).mean())
    assert np.mean(mean_k[10:]) == pytest.approx(target, rel=0.02)
    json.dumps(state)


@pytest.mark.parametrize("tokens", [16, 64])
def test_held_top_p_holds_its_target_over_small_steps(tokens: int) -> None:
    policy, state = HeldTopP(target=3.0, k_max=8), {}
    mean_k = []
    for seed in range(400):
        used_TK, state = policy.choose(stream(seed, tokens=tokens), CONTEXT, state)
        mean_k.append(used_TK.sum(axis=1).mean())
    assert np.mean(mean_k[20:]) == pytest.approx(3.0, rel=0.02)


def test_held_top_p_follows_traffic_that_changes() -> None:
    policy, state = HeldTopP(target=3.0, k_max=8), {}
    for seed in range(20):
        _, state = policy.choose(stream(seed, tokens=512, spread=2.0), CONTEXT, state)
    p_before = state["p"]
    for seed in range(20, 40):
        used_TK, state = policy.choose(stream(seed, tokens=512, spread=0.5), CONTEXT, state)
    assert state["p"] < 0.8 * p_before  # flatter scores: less mass in the same number of experts
    assert used_TK.sum(axis=1).mean() == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize(("target", "k_max", "held"), [(6.0, 4, 4.0), (1.0, 4, 1.0)])
def test_held_top_p_does_not_wind_up_at_its_ends(target: float, k_max: int, held: float) -> None:
    """A thousand steps at an end, then p answers within a few steps of another target."""
    policy, state = HeldTopP(target=target, k_max=k_max), {}
    for seed in range(1000):
        used_TK, state = policy.choose(stream(seed % 7, tokens=64), CONTEXT, state)
    assert used_TK.sum(axis=1).mean() == pytest.approx(held, rel=0.05)
    other = HeldTopP(target=2.0, k_max=k_max)
    for seed in range(25):
        used_TK, state = other.choose(stream(seed, tokens=512), CONTEXT, state)
    assert used_TK.sum(axis=1).mean() == pytest.approx(2.0, rel=0.05)


def test_held_top_p_starts_where_its_target_is() -> None:
    # What each token holds before its second, third and fourth expert: 1/2, 3/4, 7/8 and 1/4, 1/2, 3/4.
    probs_TC = np.array([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]], dtype=np.float32)
    ids_TC = np.tile(np.arange(4), (2, 1))
    source_rank_T = np.zeros(2, dtype=np.int64)
    step = Candidates(ids_TC=ids_TC, probs_TC=probs_TC, source_rank_T=source_rank_T, experts=4, score_kind="softmax")
    # In order: 0, 0, 1/4, 1/2, 1/2, 3/4, 3/4, 7/8. p lies midway to the first too many: 2, 3, 5 and 7 come before.
    for target, used in ((1.0, [1, 1]), (1.5, [1, 2]), (2.5, [2, 3]), (3.5, [3, 4]), (4.0, [4, 4]), (9.0, [4, 4])):
        used_TK, _ = HeldTopP(target=target, k_max=4).choose(step, CONTEXT, {})
        assert used_TK.sum(axis=1).tolist() == used, target
    # On target the controller stays, at (1/2 + 3/4) / 2 = 5/8: log odds of log (5/3).
    _, state = HeldTopP(target=2.5, k_max=4).choose(step, CONTEXT, {})
    assert state == {"p": pytest.approx(0.625), "integral": pytest.approx(np.log(5 / 3))}
    # Four for a target of 2 are an error of -1: the integral falls by 0.4, the odds of p by 0.2 more.
    _, state = HeldTopP(target=2.0, k_max=4).choose(step, CONTEXT, {"p": 1.0, "integral": 3.0})
    assert state == {"p": pytest.approx(1 / (1 + np.exp(-2.4))), "integral": pytest.approx(2.6)}


def test_held_top_p_waits_through_an_empty_step() -> None:
    state: State = {"p": 0.5, "integral": 0.1}
    _, after = HeldTopP(target=2.0, k_max=4).choose(stream(0, tokens=0), CONTEXT, state)
    assert after == state


errors = st.lists(st.lists(st.integers(0, 8), min_size=3, max_size=3), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(rows=errors, k_max=st.integers(1, 5), quarters=st.integers(4, 24))
def test_a_plan_of_layers_is_the_best_of_all(rows: list[list[int]], k_max: int, quarters: int) -> None:
    """Errors that need not be convex, nor even fall: tried against every plan."""
    error_LK, mean_k = np.array(rows) / 8.0, quarters / 4
    k_L = plan_layers(error_LK, mean_k=mean_k, k_max=k_max)

    def error_of(plan: tuple[int, ...]) -> float:
        return sum(row[k - 1] if k <= row.size else 0.0 for row, k in zip(error_LK, plan, strict=True))

    legal = [
        plan
        for plan in itertools.product(range(1, k_max + 1), repeat=len(rows))
        if sum(plan) <= mean_k * len(rows) + 1e-9
    ]
    assert k_L in legal
    assert error_of(k_L) == min(map(error_of, legal))


@pytest.mark.parametrize("layers", [10, 48, 94])
@pytest.mark.parametrize("tenths", [11, 23, 37])
def test_a_plan_uses_all_of_a_budget_that_helps(layers: int, tenths: int) -> None:
    error_LK = np.tile(np.linspace(1, 0, 8), (layers, 1))
    k_L = plan_layers(error_LK, mean_k=tenths / 10, k_max=8)
    assert sum(k_L) == layers * tenths // 10


def test_biases_even_out_the_loads_of_a_stream() -> None:
    rng = np.random.default_rng(3)
    popularity_E = rng.normal(size=16)
    policy, state = BalanceBias(k=2, rate=0.005), {}
    uneven, even = np.zeros(16), np.zeros(16)
    for step in range(300):
        logits_TE = (popularity_E + rng.normal(size=(256, 16))).astype(np.float32)
        candidates = Candidates.from_logits(logits_TE, np.zeros(256, dtype=np.int64))
        used_TC, state = policy.choose(candidates, CONTEXT, state)
        if step >= 200:
            even += np.bincount(candidates.ids_TC[used_TC], minlength=16)
            uneven += np.bincount(candidates.ids_TC[:, :2].ravel(), minlength=16)
    assert uneven.max() / uneven.mean() > 2.0
    assert even.max() / even.mean() < 1.15


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), tokens=st.integers(1, 40), factor=st.sampled_from([0.5, 1.0, 2.0, 3.3]))
def test_expert_choice_gives_every_expert_the_same_load(seed: int, tokens: int, factor: float) -> None:
    candidates = stream(seed, tokens=tokens, experts=8)
    used_TC, _ = ExpertChoice(factor=factor, k_max=8, mode="batch").choose(candidates, CONTEXT, {})
    load_E = np.bincount(candidates.ids_TC[used_TC], minlength=8)
    assert load_E.tolist() == [min(-(-round(tokens * factor * 10) // 80), tokens)] * 8
    # No token left out scores higher for an expert than one it took.
    for expert in range(8):
        of_expert = candidates.ids_TC == expert
        score_T, took_T = candidates.probs_TC[of_expert], used_TC[of_expert]
        assert score_T[took_T].min() >= score_T[~took_T].max(initial=0)


def test_running_thresholds_reach_the_factor_and_never_look_ahead() -> None:
    policy, state = ExpertChoice(factor=2.0, k_max=8, mode="threshold"), {}
    mean_k = []
    for seed in range(120):
        candidates = stream(seed, tokens=128)
        used_TC, next_state = policy.choose(candidates, CONTEXT, state)
        if state:
            first, _ = policy.choose(candidates.best(16), CONTEXT, state)
            alone = [policy.choose(one(candidates, token), CONTEXT, state)[0][0] for token in (0, 64, 127)]
            np.testing.assert_array_equal(first[[0, 64, 127]], alone)
        state = next_state
        mean_k.append(used_TC.sum(axis=1).mean())
    assert np.mean(mean_k[40:]) == pytest.approx(2.0, rel=0.05)


def one(candidates: Candidates, token: int) -> Candidates:
    return Candidates(
        ids_TC=candidates.ids_TC[token : token + 1],
        probs_TC=candidates.probs_TC[token : token + 1],
        source_rank_T=candidates.source_rank_T[token : token + 1],
        experts=candidates.experts,
        score_kind=candidates.score_kind,
    )


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), groups=st.sampled_from([1, 2, 4, 8]), kept=st.integers(1, 8), k=st.integers(1, 8))
def test_group_limited_stays_in_few_groups_and_takes_their_best(seed: int, groups: int, kept: int, k: int) -> None:
    size = 16 // groups
    kept = min(kept, groups)
    policy = GroupLimited(k=k, groups=groups, kept_groups=kept)
    candidates = stream(seed, tokens=12)
    if k > kept * size:
        with pytest.raises(InputError, match=r"keep at least"):
            policy.check(candidates)
        return
    used_TC, _ = policy.choose(candidates, CONTEXT, {})
    for ids_C, probs_C, used_C in zip(candidates.ids_TC, candidates.probs_TC, used_TC, strict=True):
        assert used_C.sum() == k
        best_of = [sorted(probs_C[ids_C // size == group].tolist(), reverse=True) for group in range(groups)]
        score_of = [sum(best[: max(k // kept, 1)]) for best in best_of]
        best_groups = sorted(range(groups), key=lambda group: (-score_of[group], group))[:kept]
        inside = [column for column, expert in enumerate(ids_C) if expert // size in best_groups]
        assert np.flatnonzero(used_C).tolist() == inside[:k]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), k=st.integers(1, 6))
def test_null_experts_is_the_gate_over_both_kinds(seed: int, k: int) -> None:
    logits_TX = np.random.default_rng(seed).normal(size=(9, 8)).astype(np.float32)
    candidates = Candidates.from_logits(logits_TX, np.zeros(9, dtype=np.int64), null_experts=3)
    null_used, _ = NullExperts(k=k).choose(candidates, CONTEXT, {})
    plain_used, _ = TopK(k=k).choose(candidates, CONTEXT, {})
    np.testing.assert_array_equal(null_used, plain_used)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), tokens=st.integers(1, 20), experts=st.integers(1, 9), data=st.data())
def test_the_nth_of_an_expert_is_that_of_its_column(seed: int, tokens: int, experts: int, data: st.DataObject) -> None:
    scores_TE = np.random.default_rng(seed).integers(0, 9, (tokens, experts)) / 8
    scores_TC, ids_TC = topk(scores_TE, experts)
    n = data.draw(st.integers(1, tokens))
    ours = nth_largest(scores_TC, ids_TC, experts, n)
    np.testing.assert_array_equal(ours, np.sort(scores_TE, axis=0)[::-1][n - 1])
    assert best_in_groups(scores_TC, ids_TC, experts, 1).tolist() == scores_TE.tolist()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), tokens=st.integers(0, 12), experts=st.integers(1, 9), count=st.integers(1, 9))
def test_primitives_are_equal_on_numpy_and_torch(seed: int, tokens: int, experts: int, count: int) -> None:
    """Scores that float64 cannot add exactly: the order of the sum has to be the same."""
    rng = np.random.default_rng(seed)
    scores_TC, ids_TC = topk(rng.integers(1, 99, (tokens, experts)) / 97, experts)
    group_TC, used_TC = ids_TC // 2, rng.integers(0, 2, (tokens, experts)) > 0
    columns_TK = np.argsort(rng.random((tokens, experts)), axis=1)[:, :count]
    theirs = [torch.as_tensor(array) for array in (scores_TC, ids_TC, group_TC, used_TC, columns_TK)]
    groups = -(-experts // 2)
    pairs = [
        (best_in_groups(scores_TC, group_TC, groups, count), best_in_groups(theirs[0], theirs[2], groups, count)),
        (first_true(used_TC, count), first_true(theirs[3], count)),
        (marked(columns_TK, experts), marked(theirs[4], experts)),
    ]
    if tokens:
        n = min(count, tokens)
        pairs += [(nth_largest(scores_TC, ids_TC, experts, n), nth_largest(*theirs[:2], experts, n))]
    for ours, other in pairs:
        np.testing.assert_array_equal(ours, other.numpy())
    assert (pairs[1][0].sum(axis=1) == np.minimum(used_TC.sum(axis=1), count)).all()

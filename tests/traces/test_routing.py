"""Routing of a known unevenness: the law that choices follow, groups of experts, and what is refused."""

import math
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from traces.errors import InputError
from traces.presets import preset
from traces.routing import balanced_experts, choose_experts, power_law_popularity

TOKENS = 20_000


def plackett_luce(popularity_E: NDArray[np.float64], top_k: int) -> dict[tuple[int, ...], float]:
    """The chance of every ordered choice: each next expert in proportion to popularity among those that are left."""
    chances = {}
    for ids in permutations(range(popularity_E.size), top_k):
        left, chance = 1.0, 1.0
        for expert in ids:
            chance *= popularity_E[expert] / left
            left -= popularity_E[expert]
        chances[ids] = chance
    return chances


def chi_square(ids_TK: NDArray[np.int32], chances: dict[tuple[int, ...], float]) -> float:
    """Pearson's statistic over its degrees of freedom: about one where the law holds."""
    seen, count = np.unique(ids_TK, axis=0, return_counts=True)
    counted = {tuple(ids): int(n) for ids, n in zip(seen.tolist(), count, strict=True)}
    assert counted.keys() <= chances.keys()
    expected = {ids: chance * len(ids_TK) for ids, chance in chances.items()}
    statistic = sum((counted.get(ids, 0) - due) ** 2 / due for ids, due in expected.items())
    return statistic / (len(chances) - 1)


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (2, 2)])  # to keep all groups is to have none
def test_choices_follow_plackett_luce(groups: int, kept: int) -> None:
    popularity_E = np.array([0.4, 0.3, 0.2, 0.1])
    ids_TK = choose_experts(popularity_E, tokens=TOKENS, top_k=2, seed=1, groups=groups, kept_groups=kept)
    # By hand: expert 0 and then 1 in .4 * .3 / .6 = .2 of the tokens.
    chances = plackett_luce(popularity_E, 2)
    assert chances[0, 1] == pytest.approx(0.2)
    assert sum(chances.values()) == pytest.approx(1)
    assert chi_square(ids_TK, chances) < 3  # 11 degrees of freedom: by chance in 1 of 2,000 runs


def test_the_group_whose_two_best_scores_add_up_to_the_most_is_kept() -> None:
    # Two groups of two, one twice as popular, one kept. The sum of its scores leads by 2 log 2 + l + l', where l and l'
    # are logistic (differences of Gumbels). P(l + l' > -x) = (c log c - (c - 1)) / (c - 1)^2 with c = exp(-x) = 1/4:
    # (1/4 log 1/4 + 3/4) / (9/16) = .7172.
    chance = (0.25 * math.log(0.25) + 0.75) / (9 / 16)
    assert chance == pytest.approx(0.7172, abs=1e-4)
    popularity_E = np.array([2, 2, 1, 1]) / 6
    ids_TK = choose_experts(popularity_E, tokens=TOKENS, top_k=2, seed=2, groups=2, kept_groups=1)
    first_T = (ids_TK < 2).all(axis=1)
    assert (first_T | (ids_TK >= 2).all(axis=1)).all()
    assert first_T.mean() == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / TOKENS))
    # Inside a group of equals either may come first.
    chances: dict[tuple[int, ...], float] = {
        (0, 1): chance / 2,
        (1, 0): chance / 2,
        (2, 3): (1 - chance) / 2,
        (3, 2): (1 - chance) / 2,
    }
    assert chi_square(ids_TK, chances) < 5


def test_choices_follow_the_router_written_out() -> None:
    popularity_E = power_law_popularity(16, exponent=1.01, tokens=1000, seed=3)
    ids_TK = choose_experts(popularity_E, tokens=TOKENS, top_k=3, seed=4, groups=4, kept_groups=2)
    score_TE = np.log(popularity_E) + np.random.default_rng(5).gumbel(size=(TOKENS, 16))
    score_TXS = score_TE.reshape(TOKENS, 4, 4)
    best_TX = np.sort(score_TXS, axis=2)[:, :, -2:].sum(axis=2)
    dropped_TX = np.argsort(best_TX, axis=1)[:, :2]
    np.put_along_axis(score_TXS, dropped_TX[:, :, None], -np.inf, axis=1)
    expected_TK = np.argsort(-score_TXS.reshape(TOKENS, 16), axis=1)[:, :3]
    for column in range(3):
        shares, expected = (np.bincount(ids[:, column], minlength=16) / TOKENS for ids in (ids_TK, expected_TK))
        assert shares == pytest.approx(expected, abs=4 * math.sqrt(2 * 0.25 / TOKENS))


def test_groups_of_one_expert_are_scored_by_it() -> None:
    # Four groups of one, two kept, two experts a token: as if there were no groups.
    popularity_E = np.array([0.4, 0.3, 0.2, 0.1])
    ids_TK = choose_experts(popularity_E, tokens=TOKENS, top_k=2, seed=6, groups=4, kept_groups=2)
    assert chi_square(ids_TK, plackett_luce(popularity_E, 2)) < 3


@given(
    seed=st.integers(0, 99),
    tokens=st.integers(0, 30),
    groups=st.sampled_from([1, 2, 4]),
    kept=st.integers(1, 4),
    top_k=st.integers(1, 4),
)
def test_laws_of_choices(seed: int, tokens: int, groups: int, kept: int, top_k: int) -> None:
    kept = min(kept, groups)
    popularity_E = power_law_popularity(16, exponent=1.01, tokens=50, seed=seed)
    given_ = {"tokens": tokens, "top_k": top_k, "seed": seed, "groups": groups, "kept_groups": kept}
    ids_TK = choose_experts(popularity_E, **given_)
    assert ids_TK.shape == (tokens, top_k)
    assert ((ids_TK >= 0) & (ids_TK < 16)).all()
    for ids in ids_TK.tolist():
        assert len(set(ids)) == top_k
        assert len({expert * groups // 16 for expert in ids}) <= kept
    assert (choose_experts(popularity_E, **given_) == ids_TK).all()
    # Scaled popularity is the same popularity.
    assert (choose_experts(popularity_E * 4, **given_) == ids_TK).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_another_seed_gives_other_choices(groups: int) -> None:
    popularity_E = np.full(16, 1 / 16)
    one, other = (
        choose_experts(popularity_E, tokens=3000, top_k=4, seed=seed, groups=groups, kept_groups=groups)
        for seed in (0, 1)
    )
    assert (one != other).mean() > 0.8  # equals by chance: 1 in 16
    assert (one[:1024] != one[1024:2048]).any()  # tokens drawn in another batch


@given(exponent=st.floats(0.5, 1.5), tokens=st.integers(2, 10**6), seed=st.integers(0, 9))
def test_power_law_shares_add_up_and_lie_within_the_law(exponent: float, tokens: int, seed: int) -> None:
    share_E = power_law_popularity(64, exponent=exponent, tokens=tokens, seed=seed)
    assert share_E.sum() == pytest.approx(1)
    assert (share_E > 0).all()
    assert share_E.max() / share_E.min() <= max(0.8 * tokens, 1) * (1 + 1e-6)


def test_an_exponent_of_one_spreads_shares_evenly_over_orders_of_magnitude() -> None:
    # x = 100^u on [1, 100]: half of the draws lie below 10, for 125 tokens.
    share_E = power_law_popularity(10_000, exponent=1, tokens=125, seed=0)
    assert (share_E < 10 * share_E.min()).mean() == pytest.approx(0.5, abs=0.02)


def test_balanced_tokens_load_every_slot_alike() -> None:
    model = preset("mixtral-8x7b")
    # 2 of 8 slots, 4 apart: token 0 takes 0 and 4, token 1 takes 1 and 5, …
    ids_TK = balanced_experts(model, tokens=16, slots=8)
    assert ids_TK[:2].tolist() == [[0, 4], [1, 5]]
    assert np.bincount(ids_TK.ravel()).tolist() == [4] * 8


@pytest.mark.parametrize(("groups", "kept", "top_k"), [(3, 1, 1), (2, 3, 1), (2, 0, 1), (2, 1, 3), (1, 1, 5)])
def test_groups_that_do_not_fit_are_refused(groups: int, kept: int, top_k: int) -> None:
    with pytest.raises(InputError, match=f"{top_k} of 4 experts in {kept} of {groups} groups"):
        choose_experts(np.full(4, 0.25), tokens=1, top_k=top_k, seed=0, groups=groups, kept_groups=kept)


def test_an_expert_that_nobody_chooses_is_refused() -> None:
    with pytest.raises(InputError, match="the popularity of expert 2 is 0; each must be above 0"):
        choose_experts(np.array([0.5, 0.5, 0]), tokens=1, top_k=2, seed=0)


def test_a_power_law_needs_tokens() -> None:
    with pytest.raises(InputError, match="power-law popularity for 1 tokens; it needs at least 2"):
        power_law_popularity(8, exponent=1, tokens=1, seed=0)
    shares = [power_law_popularity(8, exponent=1, tokens=100, seed=seed).tolist() for seed in (0, 0, 1)]
    assert [one == other for one, other in pairwise(shares)] == [True, False]

"""Hardware-aware routing: what its plans are worth, and that its passes agree with what they stand for."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.backends import topk
from router.candidates import Candidates
from router.context import RouteContext
from router.openings import Served, in_units, serve_open, serve_priced, served
from router.policies.hardware_aware import HardwareAware
from router.prices import RoutePrices
from router.route_plan import StepToPlan
from router.step_load import StepLoad

RANKS = 4


def step_of(seed: int, *, tokens: int, experts: int, sigma: float = 1.0) -> Candidates:
    """All experts as candidates, some of them popular."""
    rng = np.random.default_rng(seed)
    logits_TE = rng.normal(size=(tokens, experts)) + sigma * rng.normal(size=experts)
    exp_TE = np.exp(logits_TE)
    probs_TC, ids_TC = topk((exp_TE / exp_TE.sum(axis=1, keepdims=True)).astype(np.float32), experts)
    return Candidates(
        ids_TC=ids_TC,
        probs_TC=probs_TC,
        source_rank_T=np.arange(tokens) % RANKS,
        experts=experts,
        score_kind="softmax",
    )


def prices_of(experts: int, *, row_s: float, active_s: float, hop_s: float) -> RoutePrices:
    share_LEG = np.zeros((1, experts, RANKS), dtype=np.float32)
    share_LEG[0, np.arange(experts), np.arange(experts) * RANKS // experts] = 1
    return RoutePrices(
        share_LEG=share_LEG,
        row_s=row_s,
        active_s=active_s,
        hop_s_GG=hop_s * (1 - np.eye(RANKS)),
        load_s_LE=np.zeros((1, experts)),
        node_of_G=np.zeros(RANKS, dtype=np.int64),
    )


REGIMES = {
    "weights": prices_of(16, row_s=1e-8, active_s=1e-5, hop_s=0.0),
    "rows": prices_of(16, row_s=1e-6, active_s=1e-8, hop_s=0.0),
    "links": prices_of(16, row_s=1e-8, active_s=1e-8, hop_s=1e-6),
    "all": prices_of(16, row_s=1e-6, active_s=1e-5, hop_s=1e-6),
}
every_regime = pytest.mark.parametrize("regime", sorted(REGIMES))


def measure(candidates: Candidates, used_TC: Any, prices: RoutePrices) -> tuple[float, float]:
    """Gate mass and predicted seconds of a mask."""
    load = StepLoad.of(prices, 0, experts=candidates.experts, source=None, ranks=RANKS)
    plan = served(
        used_TC,
        in_units(candidates.probs_TC),
        candidates.ids_TC,
        candidates.source_rank_T,
        sources=RANKS,
        experts=candidates.experts,
    )
    return plan.mass, load.seconds(plan.rows_XE)


def adjusted(candidates: Candidates, price: float, prices: RoutePrices, *, k: int = 4, may_skip: bool = True) -> Any:
    used_TC = np.zeros(candidates.ids_TC.shape, dtype=np.bool_)
    used_TC[:, :k] = True
    context = RouteContext(layer=0, ranks=RANKS, renormalise=True, prices=prices)
    policy = HardwareAware(price=price, may_skip=may_skip, closing_rounds=8, pricing_rounds=6, scope="global")
    return used_TC, policy.adjust(used_TC, candidates, context, {})[0]


@every_regime
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    tokens=st.sampled_from([1, 7, 64, 900]),
    price=st.sampled_from([0.01, 0.1, 1.0, 10.0]),
    may_skip=st.booleans(),
)
def test_the_objective_never_gets_worse(regime: str, seed: int, tokens: int, price: float, may_skip: bool) -> None:
    candidates, prices = step_of(seed, tokens=tokens, experts=16), REGIMES[regime]
    used_TC, adjusted_TC = adjusted(candidates, price, prices, may_skip=may_skip)
    (own_mass, own_s), (mass, seconds) = (measure(candidates, mask, prices) for mask in (used_TC, adjusted_TC))
    assert mass / own_mass - price * seconds / own_s >= 1 - price - 1e-9
    if not may_skip and regime == "rows":  # where no expert closes
        np.testing.assert_array_equal(adjusted_TC.sum(axis=1), 4)


@every_regime
@pytest.mark.parametrize("seed", range(3))
def test_a_higher_price_buys_less_time_for_less_mass(regime: str, seed: int) -> None:
    """By ten times more, so that what the search misses does not decide."""
    candidates, prices = step_of(seed, tokens=512, experts=16), REGIMES[regime]
    points = [measure(candidates, adjusted(candidates, p, prices)[1], prices) for p in (0.01, 0.1, 1.0, 10.0)]
    for (more_mass, longer_s), (less_mass, shorter_s) in pairwise(points):
        assert shorter_s <= longer_s * (1 + 1e-9)
        assert less_mass <= more_mass * (1 + 1e-9)
    assert points[-1][1] < 0.8 * points[0][1]


@every_regime
def test_it_beats_fewer_experts_for_all(regime: str) -> None:
    """At the same gate mass as top-3 instead of top-4, or more, its predicted step is shorter."""
    candidates, prices = step_of(5, tokens=512, experts=16), REGIMES[regime]
    three_TC = np.broadcast_to(np.arange(16) < 3, candidates.ids_TC.shape)
    mass_of_three, seconds_of_three = measure(candidates, three_TC, prices)
    points = [measure(candidates, adjusted(candidates, p, prices)[1], prices) for p in np.geomspace(0.01, 10, 13)]
    assert min(seconds for mass, seconds in points if mass >= mass_of_three) < 0.97 * seconds_of_three


def test_a_large_step_closes_experts_by_a_sample_of_its_tokens() -> None:
    """Of 4,096 tokens of four alternating sources 256 are looked at: no rank may keep more experts than another."""
    prices = prices_of(16, row_s=1e-12, active_s=1e-5, hop_s=0.0)
    for tokens in (256, 4096):
        candidates = step_of(1, tokens=tokens, experts=16)
        _, adjusted_TC = adjusted(candidates, 0.3, prices)
        active_E = np.bincount(candidates.ids_TC[adjusted_TC], minlength=16) > 0
        assert active_E.reshape(RANKS, -1).sum(axis=1).tolist() == [2] * RANKS


def test_a_sample_has_tokens_of_every_source_also_where_they_take_turns() -> None:
    candidates = step_of(0, tokens=4096, experts=16)
    step = StepToPlan(
        used_TC=np.arange(16) < np.full((4096, 1), 4),
        scores_TC=in_units(candidates.probs_TC),
        ids_TC=candidates.ids_TC,
        source_T=candidates.source_rank_T,
        load=StepLoad.of(REGIMES["all"], 0, experts=16, source=None, ranks=RANKS),
        price=1.0,
        may_skip=True,
        closing_rounds=2,
        pricing_rounds=2,
    )
    sample = step.sample()
    # 256 tokens, each for 16: the load of a rank is that of the whole step, give or take.
    assert np.bincount(sample.source_T, minlength=RANKS).min() > 256 / RANKS / 2
    assert sample.load.row_s == 16 * step.load.row_s
    whole, part = (
        served(s.used_TC, s.scores_TC, s.ids_TC, s.source_T, sources=RANKS, experts=16) for s in (step, sample)
    )
    assert sample.load.seconds(part.rows_XE) == pytest.approx(step.load.seconds(whole.rows_XE), rel=0.15)


@st.composite
def passes(draw: st.DrawFn) -> dict[str, Any]:
    """A step in small whole numbers, with many ties."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tokens, experts, sources = draw(st.integers(0, 12)), draw(st.integers(1, 8)), draw(st.integers(1, 3))
    count = draw(st.integers(1, experts))
    return {
        "scores_TC": -np.sort(-rng.integers(0, 8, (tokens, count)).astype(np.float64), axis=1),
        "ids_TC": rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :count],
        "limits_T": rng.integers(0, count + 1, tokens),
        "source_T": rng.integers(0, sources, tokens),
        "open_E": rng.random(experts) < rng.random(),
        "price_XE": rng.integers(0, 6, (sources, experts)).astype(np.float64),
    }


def on_torch(step: dict[str, Any]) -> list[Any]:
    return [torch.as_tensor(step[name]) for name in ("scores_TC", "ids_TC", "limits_T", "source_T")]


def on_numpy(step: dict[str, Any]) -> list[Any]:
    return [step[name] for name in ("scores_TC", "ids_TC", "limits_T", "source_T")]


def assert_same(ours: Served, theirs: Served) -> None:
    np.testing.assert_array_equal(ours.used_TC, np.asarray(theirs.used_TC))
    np.testing.assert_array_equal(ours.rows_XE, theirs.rows_XE)
    assert ours.mass == theirs.mass


@settings(max_examples=200, deadline=None)
@given(step=passes())
def test_open_experts_serve_alike_on_both_backends(step: dict[str, Any]) -> None:
    (ours, our_openings), (theirs, their_openings) = (
        serve_open(*arrays, open_E=step["open_E"], sources=3) for arrays in (on_numpy(step), on_torch(step))
    )
    assert_same(ours, theirs)
    for name in ("regret_E", "gain_E", "want_E", "lone_E"):
        np.testing.assert_array_equal(getattr(our_openings, name), getattr(their_openings, name))


@settings(max_examples=200, deadline=None)
@given(step=passes(), may_skip=st.booleans())
def test_priced_experts_serve_alike_on_both_backends(step: dict[str, Any], may_skip: bool) -> None:
    prices = {"open_E": step["open_E"], "price_XE": step["price_XE"], "may_skip": may_skip}
    assert_same(serve_priced(*on_numpy(step), **prices), serve_priced(*on_torch(step), **prices))


@settings(max_examples=100, deadline=None)
@given(step=passes())
def test_without_prices_both_passes_are_one(step: dict[str, Any]) -> None:
    free, _ = serve_open(*on_numpy(step), open_E=step["open_E"], sources=len(step["price_XE"]))
    zero_XE = np.zeros_like(step["price_XE"])
    assert_same(free, serve_priced(*on_numpy(step), open_E=step["open_E"], price_XE=zero_XE, may_skip=False))


@settings(max_examples=100, deadline=None)
@given(step=passes())
def test_regret_and_gain_are_what_closing_and_opening_one_does(step: dict[str, Any]) -> None:
    """Where nobody is left without an open expert: one whose candidates are all closed uses its first all the same."""
    step["open_E"][:] |= step["open_E"].sum() == 0
    plan, openings = serve_open(*on_numpy(step), open_E=step["open_E"], sources=3)
    open_TC = step["open_E"][step["ids_TC"]]
    stranded = bool((~open_TC.any(axis=1) & (step["limits_T"] > 0)).any())
    for expert, is_open in enumerate(step["open_E"].tolist()):
        if stranded or openings.lone_E[expert]:
            continue
        other_E = step["open_E"].copy()
        other_E[expert] = not is_open
        changed, _ = serve_open(*on_numpy(step), open_E=other_E, sources=3)
        change = openings.gain_E[expert] if not is_open else -openings.regret_E[expert]
        assert changed.mass - plan.mass == change

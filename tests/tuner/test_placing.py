"""Placing: gains and bounds by hand, what windows see, and verdicts with their reasons."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.placement.bound import bound_of
from router.placement.problem import PlacementProblem
from sim.memory import MemoryUse
from traces.errors import InputError
from traces.loads import Loads
from traces.presets import preset
from traces.progress import quiet
from traces.synthetic import synthetic_trace
from traces.trace import RoutingTrace
from tuner.placing.answer import Answer, Balance, Steps
from tuner.placing.current import read_current
from tuner.placing.gain import Gain, gain_of
from tuner.placing.loads import place_by_loads
from tuner.placing.plan import servable
from tuner.placing.request import PlacingRequest
from tuner.placing.serving_setup import ServingSetup, default_nodes
from tuner.placing.setting import Setting
from tuner.placing.steps import with_scores
from tuner.placing.trace import place_by_trace
from tuner.placing.verdict import Limit, Verdict, limit_of, verdict_by_balance, verdict_by_steps
from tuner.placing.windows import PlacingWindows

SMALL = ServingSetup(costs=("datasheet",), tokens_per_rank=64)


def loads_of(rows: Any) -> Loads:
    counts = np.array(rows)
    return Loads(
        loads_LE=(counts if counts.ndim == 2 else counts.sum(axis=0)).astype(float),
        steps_WLE=counts if counts.ndim == 3 else None,
        source="by hand",
    )


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    """40 requests of 64 tokens, whose popular experts stay so; two layers of Mixtral's 32."""
    model = replace(preset("mixtral-8x7b"), layers=2)
    return synthetic_trace(model, tokens=2560, zipf=1.0, seed=3, tokens_per_request=64, phase="decode")


def placed(trace: RoutingTrace, serving: ServingSetup = SMALL, **request: Any) -> Answer:
    return place_by_trace(PlacingRequest(**{"ranks": 4, "nodes": 4, "slots": 12, **request}), trace, serving, quiet)


def steps_of(*windows: Sequence[float]) -> list[Any]:
    return [np.array(window, dtype=float) for window in windows]


def test_a_gain_is_the_mean_of_windows_of_paired_steps() -> None:
    # 1 - 9/10 = .1 and 1 - 8/10 = .2: a window of .15; the other saves nothing: .075.
    gain = gain_of(steps_of([10, 10], [5]), steps_of([9, 8], [5]))
    np.testing.assert_allclose(gain.mean, 0.075)
    assert gain.windows == 2


def test_two_windows_are_as_unsure_as_they_can_be() -> None:
    # t of one degree of freedom is 6.31 at 5%: the expanded tail is far outside what resampling two windows gives.
    gain = gain_of(steps_of([1], [1]), steps_of([1.0], [0.8]))
    assert gain.interval is not None
    np.testing.assert_allclose(gain.interval, (0.0, 0.2))


def test_steps_without_anything_save_nothing() -> None:
    # One step of nothing, before and after, and one of which half is saved.
    assert gain_of(steps_of([0, 2]), steps_of([0, 1])).mean == 0.25


def test_one_window_has_no_interval() -> None:
    assert gain_of(steps_of([2, 2]), steps_of([1, 1])) == Gain(mean=0.5, interval=None, windows=1)


def test_intervals_of_few_windows_hold_the_truth_as_often_as_they_say() -> None:
    """90% intervals of six windows with normal savings around .1: between 85 and 95% of 200 of them hold it."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        after = 1 - rng.normal(0.1, 0.05, size=6)
        interval = gain_of([np.ones(1)] * 6, [np.array([s]) for s in after]).interval
        assert interval is not None
        held += interval[0] <= 0.1 <= interval[1]
    assert 0.85 <= held / 200 <= 0.95


@settings(max_examples=30, deadline=None)
@given(savings=st.lists(st.floats(-0.5, 0.5), min_size=2, max_size=8), scale=st.floats(0.1, 10))
def test_gains_have_no_unit_and_lie_in_their_intervals(savings: list[float], scale: float) -> None:
    after = [np.array([1 - saving]) for saving in savings]
    gain = gain_of([np.ones(1)] * len(savings), after)
    scaled = gain_of([np.full(1, scale)] * len(savings), [scale * after_W for after_W in after])
    np.testing.assert_allclose(scaled.mean, gain.mean, atol=1e-12)
    assert gain.interval is not None
    assert gain.interval[0] - 1e-12 <= gain.mean <= gain.interval[1] + 1e-12


def test_loads_alone_are_balanced_and_the_saving_is_that_of_the_busiest_rank() -> None:
    # Contiguous: 3 + 3 and 1 + 1, mean 4 over 6. Planned: 4 and 4, so the busiest has 1 - 4/6 = a third less.
    answer = place_by_loads(PlacingRequest(ranks=2), loads_of([[3, 3, 1, 1]]))
    assert (answer.tokens.before, answer.tokens.after, answer.tokens.upper_bound) == (4 / 6, 1.0, 1.0)
    assert answer.chosen.plan.algorithm == "balanced"
    assert answer.chosen.plan.moved_share == 0.5  # one expert of each rank changes place
    assert answer.gain is None
    assert answer.worth_it
    assert answer.verdict.startswith("worth it: the busiest rank has 33.3% fewer rows")


def test_even_loads_are_left_alone() -> None:
    answer = place_by_loads(PlacingRequest(ranks=2), loads_of([[2, 2, 2, 2]]))
    assert not answer.worth_it
    assert answer.verdict.startswith("not worth it: loads are already balanced (balancedness 1.000 of at most 1.000)")


def test_one_hot_expert_asks_for_redundant_slots() -> None:
    answer = place_by_loads(PlacingRequest(ranks=2), loads_of([[90, 0, 5, 5]]))
    assert answer.verdict.startswith("not worth it: these slots allow no better balance")
    # With a second slot for it: 45 and two of the small ones on one rank, 45 and the other on the other.
    more = place_by_loads(PlacingRequest(ranks=2, slots=6), loads_of([[90, 0, 5, 5]]))
    assert more.tokens.upper_bound == 1.0
    assert more.tokens.after > 0.9


def test_steps_are_judged_by_later_ones() -> None:
    early, late = [[9, 1, 8, 2]], [[8, 9, 1, 2]]  # on ranks (0, 1), (2, 3): 10 and 10, then 17 and 3
    kept = place_by_loads(PlacingRequest(ranks=2), loads_of([early] * 10))
    assert kept.gain is not None
    assert kept.tokens == kept.planned
    # Planned (9, 1) and (8, 2), which then are 18 and 2: worse than the (9, 8) and (2, 1) that run now, then 10 and 10.
    skewed, other = [[9, 8, 2, 1]], [[9, 1, 1, 9]]
    drifted = place_by_loads(PlacingRequest(ranks=2), loads_of([skewed] * 6 + [other] * 4))
    assert drifted.planned.after > 0.9
    assert drifted.gain is not None
    assert drifted.gain.mean <= 0
    assert drifted.verdict.startswith("not worth it: ")
    assert any("first 6 of 10 steps" in note for note in drifted.notes)
    assert place_by_loads(PlacingRequest(ranks=2), loads_of([early, late])).gain is None  # too few to hold some out


def test_drift_is_named() -> None:
    # Now (9, 8) and (2, 1), planned (9, 1) and (8, 2): 10 of 17, then all. Later 8 and 6 now, 11 and 3 as planned.
    drifted = place_by_loads(PlacingRequest(ranks=2), loads_of([[[9, 8, 2, 1]]] * 6 + [[[6, 2, 1, 5]]] * 4))
    assert drifted.verdict == (
        "not worth it: later loads differ from those planned on (balancedness 0.588 → 1.000 there, 0.875 → 0.636 later)"
    )


def test_groups_stay_on_their_nodes_unless_slots_may_leave() -> None:
    rng = np.random.default_rng(1)
    loads = loads_of(rng.integers(1, 100, size=(3, 16)))
    home = place_by_loads(PlacingRequest(ranks=4, nodes=2, slots=20, groups=4), loads)
    away = place_by_loads(PlacingRequest(ranks=4, nodes=2, slots=20, groups=4, away_share=1.0), loads)
    assert (home.chosen.plan.algorithm, away.chosen.plan.algorithm) == ("hierarchical", "soft_hierarchical")
    assert home.tokens.after <= away.tokens.after <= away.tokens.upper_bound + 1e-9
    for expert_S in home.after.slot_to_expert_LS:
        groups_NX = np.array([np.unique(half // 4) for half in expert_S.reshape(2, -1)])
        assert sorted(groups_NX.ravel().tolist()) == [0, 1, 2, 3]


def grouped(trace: RoutingTrace, groups: int) -> RoutingTrace:
    return replace(trace, model=replace(trace.model, expert_groups=groups))


@pytest.mark.parametrize(
    ("model_groups", "request_", "tried"),
    [
        (4, {}, ["hierarchical", "soft_hierarchical", "balanced", "cost_aware"]),
        (4, {"away_share": 0.0}, ["hierarchical", "balanced", "cost_aware"]),
        (4, {"groups": 1}, ["balanced", "cost_aware"]),
        (4, {"nodes": 1}, ["balanced", "cost_aware"]),
        (2, {"nodes": 4}, ["balanced", "cost_aware"]),  # two groups are not for four nodes
        (1, {"groups": 4}, ["hierarchical"]),
        (1, {"groups": 4, "away_share": 0.5}, ["hierarchical", "soft_hierarchical"]),
    ],
    ids=str,
)
def test_the_models_groups_may_be_kept_on_nodes_and_those_asked_for_are(
    trace: RoutingTrace, model_groups: int, request_: dict[str, Any], tried: list[str]
) -> None:
    request = PlacingRequest(**{"ranks": 4, "nodes": 2, "slots": 12, **request_})
    setting = Setting.of(request, grouped(trace, model_groups), SMALL)
    assert setting.problem.groups == request_.get("groups", model_groups)
    others = {"lpt", "eplb", "contiguous", "round_robin", "affinity", "active_aware"}
    assert set(servable(request, setting.problem)) - others == set(tried)
    assert others.isdisjoint(servable(request, setting.problem)) == ("balanced" not in tried)


def test_the_best_that_is_asked_to_keep_groups_does(trace: RoutingTrace) -> None:
    answer = placed(grouped(trace, 2), nodes=2, groups=4)
    assert [c.plan.algorithm for c in answer.candidates] == ["contiguous", "random", "hierarchical"]
    assert answer.chosen.plan.algorithm == "hierarchical"
    for expert_S in answer.after.slot_to_expert_LS:
        first, second = (set((half // 2).tolist()) for half in expert_S.reshape(2, -1))
        assert not first & second


def test_slots_that_may_leave_groups_need_some(trace: RoutingTrace) -> None:
    with pytest.raises(InputError, match=r"an away_share of 0\.5 is of .*; give groups too"):
        placed(trace, away_share=0.5)
    assert placed(grouped(trace, 4), nodes=2, away_share=0.5, algorithm="soft_hierarchical").after.slots == 12


def test_a_layer_without_load_is_placed_and_named() -> None:
    answer = place_by_loads(PlacingRequest(ranks=2, slots=6), loads_of([[9, 1, 1, 1], [0, 0, 0, 0]]))
    assert any(note == "layer 1 has no load: placed as if every expert had the same" for note in answer.notes)
    assert np.bincount(answer.after.slot_to_expert_LS[1]).max() <= 2


def test_a_budget_limits_what_moves() -> None:
    rng = np.random.default_rng(2)
    loads = loads_of(rng.pareto(2, size=(6, 32)))
    answer = place_by_loads(PlacingRequest(ranks=8, slots=40, budget_share=0.1), loads)
    assert answer.chosen.plan.algorithm == "incremental"
    assert 0 < answer.chosen.plan.moved_share <= 0.1
    assert answer.tokens.after > answer.tokens.before


def test_what_runs_now_is_what_is_compared_with() -> None:
    current_LS = np.array([[3, 1, 2, 0]])  # (1, 4) and (2, 8)
    answer = place_by_loads(PlacingRequest(ranks=2, current_LS=current_LS), loads_of([[8, 4, 2, 1]]))
    assert answer.before.slot_to_expert_LS.tolist() == [[3, 1, 2, 0]]
    assert answer.tokens.before == 7.5 / 10
    assert answer.chosen.plan.moved_share == 0.5  # (8, 1) and (4, 2): either way two experts change places


def test_what_was_taken_for_granted_is_noted() -> None:
    loads = loads_of([[8, 4, 2, 1]])
    assumed = "what runs now was not given: taken as contiguous in 8 slots; --current FILE says it"
    groups = "on one node all 2 groups are together, whatever the plan"
    answer = place_by_loads(PlacingRequest(ranks=4, slots=8, groups=2), loads)
    assert answer.notes == [assumed, groups]
    assert answer.facts == (
        "Loads: by hand.",
        "4 ranks on 1 node, 2 groups of experts. Now: contiguous; random: experts in random order, as many slots.",
    )
    given = place_by_loads(PlacingRequest(ranks=2, nodes=2, groups=2, current_LS=np.array([[3, 1, 2, 0]])), loads)
    assert given.notes == []
    assert "2 ranks on 2 nodes, 2 groups of experts. Now: as given;" in given.facts[1]


@pytest.mark.parametrize(("gone", "renumbered"), [(1, True), (3, False)])
def test_ranks_are_numbered_without_the_one_that_is_gone(gone: int, renumbered: bool) -> None:
    answer = place_by_loads(PlacingRequest(ranks=4, slots=12, gone=gone), loads_of([[5, 4, 3, 2, 1, 1, 1, 1]]))
    note = f"ranks are numbered without it: rank R of the plan is rank R + 1 from R = {gone} on"
    assert (note in answer.notes) == renumbered
    assert answer.to_json()["gone"] == gone


def test_a_budget_that_moves_nothing_says_what_would() -> None:
    with pytest.raises(InputError, match=r"a budget of 0\.01 of 8 slots moves none; give more: one slot is 0\.12"):
        place_by_loads(PlacingRequest(ranks=2, slots=8, budget_share=0.01), loads_of([[8, 4, 2, 1]]))


def test_a_rank_that_is_gone_leaves_the_others() -> None:
    answer = place_by_loads(PlacingRequest(ranks=4, slots=12, gone=1), loads_of([[5, 4, 3, 2, 1, 1, 1, 1]]))
    assert (answer.after.ranks, answer.after.slots, answer.before.ranks) == (3, 9, 3)
    with pytest.raises(InputError, match="3 ranks × 2 slots hold 6, fewer than 8 experts"):
        place_by_loads(PlacingRequest(ranks=4, gone=0), loads_of([[5, 4, 3, 2, 1, 1, 1, 1]]))


def test_windows_are_requests_in_order_and_share_none(trace: RoutingTrace) -> None:
    windows = PlacingWindows.of(trace, phase="decode", ranks=4, tokens_per_rank=None)
    parts = [np.unique(w.trace.request_T) for w in (windows.plan, windows.choose, *windows.held_out)]
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(40))
    assert len(windows.held_out) >= 4
    assert windows.tokens_per_rank == 64 or len(windows.held_out) < 12


def test_rows_of_steps_are_those_of_the_models_own_top_k(trace: RoutingTrace) -> None:
    windows = PlacingWindows.of(trace, phase="decode", ranks=4, tokens_per_rank=8)
    rows_WLE = windows.choose.rows_WLE()
    assert rows_WLE.shape[1:] == (2, 8)
    assert (rows_WLE.sum(axis=2) == 4 * 8 * 2).all()  # 32 tokens of two experts


def test_the_plan_knows_nothing_of_held_out_requests(trace: RoutingTrace) -> None:
    """With every expert of the last 40% of the requests renamed, plans and the choice are the same."""
    later_T = trace.request_T >= 24
    renamed_TLC = trace.expert_ids_TLC.copy()
    renamed_TLC[later_T] = 7 - renamed_TLC[later_T]
    first, second = placed(trace), placed(replace(trace, expert_ids_TLC=renamed_TLC))
    assert first.chosen.plan.algorithm == second.chosen.plan.algorithm
    np.testing.assert_array_equal(first.after.slot_to_expert_LS, second.after.slot_to_expert_LS)
    assert [c.step_s for c in first.candidates] == [c.step_s for c in second.candidates]
    assert first.tokens.after > second.tokens.after
    assert not second.worth_it


def test_the_best_is_the_shortest_step_of_the_requests_that_choose(trace: RoutingTrace) -> None:
    answer = placed(trace)
    others = [c for c in answer.candidates if c.plan.algorithm != "random"]
    assert answer.chosen.step_s == min(c.step_s for c in others if c.step_s is not None)
    assert {"contiguous", "random", "balanced", "eplb"} <= {c.plan.algorithm for c in answer.candidates}
    assert "hierarchical" not in {c.plan.algorithm for c in answer.candidates}  # it has no groups to keep together


def test_skewed_traffic_that_lasts_is_worth_it(trace: RoutingTrace) -> None:
    answer = placed(trace, algorithm="balanced")
    assert answer.steps is not None
    assert answer.gain is not None
    assert answer.steps.after_s < answer.steps.before_s
    for parts_s, step_s in zip(answer.steps.parts_s, (answer.steps.before_s, answer.steps.after_s), strict=True):
        np.testing.assert_allclose(sum(parts_s.values()), step_s)
    assert answer.gain.interval is not None
    assert 0 < answer.gain.interval[0] <= answer.gain.mean
    assert answer.steps.migration_s > 0
    assert answer.worth_it


def test_staying_as_it_is_gains_nothing_and_moves_nothing(trace: RoutingTrace) -> None:
    answer = placed(trace, algorithm="contiguous")
    assert answer.gain == Gain(mean=0.0, interval=(0.0, 0.0), windows=answer.gain.windows if answer.gain else 0)
    assert answer.steps is not None
    assert answer.steps.migration_s == 0
    assert answer.chosen.plan.moved_share == 0
    assert not answer.worth_it


def test_a_trace_of_one_rank_less_is_served_by_the_others(trace: RoutingTrace) -> None:
    answer = placed(trace, gone=3, slots=16, algorithm="balanced")
    assert (answer.after.ranks, answer.after.slots) == (3, 12)
    assert "rank3=lost" in " ".join(answer.facts)


def test_gates_are_not_needed(trace: RoutingTrace) -> None:
    scored, said = with_scores(replace(trace, gates_TLC=None))
    assert said == ["the trace has no gates: the first 2 candidates of each token are the ones it uses"]
    assert scored.gates_TLC is not None
    assert (np.diff(scored.gates_TLC.astype(float), axis=2) < 0).all()
    assert with_scores(trace) == (trace, [])


def test_what_was_never_measured_is_priced_by_the_datasheet_and_says_so(trace: RoutingTrace) -> None:
    packed = replace(trace, model=replace(trace.model, weight_bytes=0.53125, weight_dtype="w4a16_mxfp4"))
    unasked = placed(packed, ServingSetup(tokens_per_rank=64), algorithm="balanced")
    assert any("priced by the datasheet" in note and "w4a16_mxfp4" in note for note in unasked.notes)
    with pytest.raises(InputError, match="give other costs or other weights"):
        placed(packed, ServingSetup(tokens_per_rank=64, costs=("sglang", "trtllm")))


def test_a_trace_too_short_says_so(trace: RoutingTrace) -> None:
    with pytest.raises(InputError, match="leave a part empty"):
        placed(trace.take(trace.request_T < 2))
    cut = (
        "the trace's 40 requests are cut into 16 to plan on, 8 to choose by and 16 to judge by; decode steps need 16384"
    )
    with pytest.raises(InputError, match=f"{cut} .* use fewer ranks, fewer tokens a rank"):
        placed(trace, ServingSetup(tokens_per_rank=4096))


def test_nodes_default_to_those_that_the_gpu_comes_in() -> None:
    assert [default_nodes("h100_sxm", ranks) for ranks in (4, 8, 16, 20)] == [1, 1, 2, 4]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"ranks": 0}, "0 ranks; use at least 1"),
        ({"ranks": 8, "nodes": 3}, "8 ranks do not divide over 3 nodes"),
        ({"ranks": 8, "algorithm": "magic"}, "unknown placement 'magic'; known are best, "),
        ({"ranks": 8, "gone": 8}, "rank 8 is gone, but the ranks are 0 to 7"),
        ({"ranks": 8, "budget_share": 0.0}, "a budget of 0 of the slots"),
        ({"ranks": 8, "budget_share": float("nan")}, "a budget of nan of the slots"),
        ({"ranks": 8, "budget_share": 0.1, "algorithm": "lpt"}, "leave out one of the two"),
        ({"ranks": 8, "gone": 1, "groups": 4}, "leave out groups"),
        ({"ranks": 8, "budget_share": 0.1, "groups": 4}, "leave out groups or the budget"),
        ({"ranks": 8, "horizon_steps": 0}, "a horizon of 0 steps"),
    ],
)
def test_requests_that_make_no_sense_say_the_mend(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PlacingRequest(**request_)


@pytest.mark.parametrize("key", ["slot_to_expert", "physical_to_logical_map"])
def test_the_current_placement_is_read_as_engines_write_it(tmp_path: Path, key: str) -> None:
    path = tmp_path / "now.json"
    path.write_text(f'{{"{key}": [[1, 0], [0, 1]]}}')
    assert read_current(path, ranks=2).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[1]", "no slot_to_expert and physical_to_logical_map"),
        ('{"slot_to_expert": []}', "not a list of layers with slots"),
        ('{"slot_to_expert": [[0, 1], [0]]}', "layer 1 has 1 slots, layer 0 has 2"),
        ('{"slot_to_expert": [[0, -1]]}', "layer 0, slot 1 is -1"),
        ('{"slot_to_expert": [[0, 1.5]]}', "layer 0, slot 1 is 1.5"),
        (f'{{"slot_to_expert": [[0, {10**30}]]}}', "layer 0, slot 1 is 1000000"),
        ('{"slot_to_expert": ' + 100_000 * "[", "not a JSON file"),
        ('{"slot_to_expert": [[0, 1]], "ranks": 8}', "of 8 ranks, not 2; give as many ranks"),
        ('{"slot_to_expert": [[0]], "physical_to_logical_map": [[0]]}', "both"),
    ],
)
def test_a_current_placement_that_is_none_says_why(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "now.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as refused:
        read_current(path, ranks=2)
    assert str(path) in str(refused.value)


EVEN = Balance(before=0.6, after=0.9, random=0.5, upper_bound=1.0)
SLOTS = Limit(what="these slots", more="redundant slots")
FITS = MemoryUse(expert_bytes=5e9, other_weight_bytes=0.0, kv_cache_bytes=0.0, buffer_bytes=1e9, capacity_bytes=8e9)
SAVES = Gain(mean=0.1, interval=(0.05, 0.15), windows=5)


def simulated(**changes: Any) -> Steps:
    parts_s = {"experts": 5e-3, "dispatch": 1e-3, "combine": 1e-3}
    values: dict[str, Any] = {
        "before_s": 10e-3,
        "after_s": 9e-3,
        "random_s": 11e-3,
        "gain_over_random": SAVES,
        "parts_s": (parts_s, parts_s),
        "bytes_by_tier": ({}, {}),
        "migration_s": 0.1,
        "busiest_active": (3.0, 2.0, 2.0),
        "memory": FITS,
        "costs": "by hand",
    }
    return Steps(**{**values, **changes})


def judged_by_steps(
    tokens: Balance = EVEN, planned: Balance = EVEN, *, gain: Gain = SAVES, steps: Steps | None = None, **changes: Any
) -> Verdict:
    details: dict[str, Any] = {"limit": SLOTS, "moved_share": 0.5, "choices": 5, "horizon_steps": 3000, **changes}
    return verdict_by_steps(tokens, planned, gain, steps or simulated(), **details)


def test_a_sure_gain_that_pays_is_worth_it() -> None:
    # 0.1 s over 1 ms a step: 100 steps.
    verdict = judged_by_steps()
    assert verdict.worth_it
    assert verdict.words == (
        "worth it: a step takes 10.0% less (90% interval 5.0 to 15.0% over 5 held-out windows), "
        "and moving 50% of the slots pays for itself after 100 steps"
    )


def test_a_plan_that_does_not_fit_is_not_worth_it() -> None:
    verdict = judged_by_steps(steps=simulated(memory=replace(FITS, expert_bytes=80e9)))
    assert verdict.words == "not worth it: a rank needs 81.0 GB and has 8.0; moeroute simulate says what helps"


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        (1, "not worth it: the plan is what runs now"),
        (5, "not worth it: the plan is what runs now, since none was found whose steps are shorter"),
    ],
)
def test_a_plan_that_is_what_runs_now_says_so(choices: int, words: str) -> None:
    nothing = Gain(mean=0.0, interval=(0.0, 0.0), windows=5)
    assert judged_by_steps(gain=nothing, moved_share=0.0, choices=choices).words == words


def test_what_is_worth_it_says_what_it_falls_short_of() -> None:
    kept_little = judged_by_steps(DRIFTED).words
    assert kept_little.endswith(
        "; later loads differ from those planned on (balancedness 0.600 → 0.900 there, 0.600 → 0.650 later)"
    )
    bound = replace(EVEN, after=0.7, upper_bound=0.75)
    assert judged_by_steps(bound, bound).words.endswith("after 100 steps; redundant slots would allow more")


def test_what_promised_little_has_not_drifted() -> None:
    hardly = replace(EVEN, after=0.61)
    gain = Gain(mean=-0.02, interval=(-0.03, -0.01), windows=5)
    assert "differ" not in judged_by_steps(replace(EVEN, after=0.58), hardly, gain=gain).words


def test_what_allows_no_better_balance_is_named() -> None:
    loads_LE = np.array([[8.0, 8, 1, 1]])  # one node's ranks get 8 each, the mean is 4.5
    by_node = PlacementProblem(loads_LE=loads_LE, ranks=4, slots=4, nodes=2, groups=2)
    assert limit_of(by_node, loads_LE, bound_of(by_node, loads_LE, "balanced")) == SLOTS
    more = replace(by_node, slots=8)  # two nodes, of which one has 16 for 2 ranks: 8 over 4.5, or all even
    assert limit_of(more, loads_LE, bound_of(more, loads_LE, "balanced")).more == "more redundant slots"
    assert limit_of(more, loads_LE, bound_of(more, loads_LE, "hierarchical")).what == "groups kept on nodes"


def test_one_window_can_be_worth_it_too() -> None:
    alone = Gain(mean=0.1, interval=None, windows=1)
    verdict = judged_by_steps(gain=alone)
    assert verdict.worth_it
    assert "one held-out window, so without an interval" in verdict.words


CHANCE = Gain(mean=0.02, interval=(-0.01, 0.05), windows=5)
STEADY = Balance(before=0.99, after=0.995, random=0.9, upper_bound=1.0)
DRIFTED = Balance(before=0.6, after=0.65, random=0.5, upper_bound=1.0)
NETWORK = {"experts": 1e-3, "dispatch": 4e-3, "combine": 3e-3}


@pytest.mark.parametrize(
    ("tokens", "gain", "steps", "reason"),
    [
        (EVEN, SAVES, {"migration_s": 10.0}, "takes 10 s and pays only after 10,000 steps, not in 3,000"),
        (STEADY, CHANCE, {}, "loads are already balanced (balancedness 0.990 of at most 1.000)"),
        (
            DRIFTED,
            CHANCE,
            {},
            "later loads differ from those planned on (balancedness 0.600 → 0.900 there, ",
        ),
        (EVEN, CHANCE, {}, "which may be chance (90% interval −1.0 to 5.0%): balance moves little of it"),
        (EVEN, CHANCE, {"parts_s": (NETWORK, NETWORK)}, "the network is what limits: sending tokens takes 70% of a"),
        (EVEN, Gain(mean=-0.02, interval=(-0.03, -0.01), windows=5), {}, "a step would even take 2.0% more"),
    ],
)
def test_what_is_not_worth_it_says_why(tokens: Balance, gain: Gain, steps: dict[str, Any], reason: str) -> None:
    verdict = judged_by_steps(tokens, gain=gain, steps=simulated(**steps))
    assert not verdict.worth_it
    assert verdict.words.startswith("not worth it: ")
    assert reason in verdict.words


def test_more_rows_than_now_are_said() -> None:
    loads = (np.array([[5.0, 3]]), np.array([[6.0, 2]]))
    verdict = verdict_by_balance(EVEN, EVEN, loads, None, limit=SLOTS, moved_share=0.5)
    assert verdict.words == "not worth it: the busiest rank would even have 20.0% more rows"


def test_a_saving_of_rows_that_may_be_chance_is_not_worth_it() -> None:
    loads = (np.array([[6.0, 2]]), np.array([[5.0, 3]]))
    verdict = verdict_by_balance(EVEN, EVEN, loads, CHANCE, limit=SLOTS, moved_share=0.5)
    assert verdict.words == "not worth it: the saving of 2.0% may be chance (90% interval −1.0 to 5.0%)"

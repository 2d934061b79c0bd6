"""Completion: laws that hold of any trace, routers whose rule is known, and scores that a person can work out."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_strategies import tiny_model, trace_of

from moeroute.cli.complete import complete as command
from traces.batching import split_requests
from traces.completion import complete, complete_windows, fit_completion
from traces.completion_error import estimate, hidden_error, tail_error
from traces.errors import InputError
from traces.formats.base import check_values
from traces.formats.npz import import_npz
from traces.presets import PRESETS
from traces.store import read_trace, write_trace
from traces.tail import anchored_tail, continued_tail, fit_decay, stored

_KINDS = ("softmax", "softmax_over_topk", "sigmoid", "logits", "none")


def _routed(ids_TLC, *, kind="none", gates_TLC=None, tokens_per_request=20, experts=8, top_k=2, **columns):
    """A trace of requests of equal length, of a model of the ids' layers."""
    tokens, layers, _ = np.shape(ids_TLC)
    return trace_of(
        ids_TLC,
        gates_TLC,
        model=tiny_model(layers=layers, experts=experts, top_k=top_k),
        request_T=(np.arange(tokens) // tokens_per_request).astype(np.int32),
        position_T=(np.arange(tokens) % tokens_per_request).astype(np.int32),
        score_kind=kind,
        **columns,
    )


def _drawn(rng, *, tokens=80, layers=2, experts=8, candidates=3, kind="softmax", top_k=2):
    """Experts drawn from softmax routers of random logits, with scores of a kind."""
    logits_TLE = 2 * rng.standard_normal((tokens, layers, experts))
    ids_TLC = np.argsort(-logits_TLE, axis=2)[:, :, :candidates]
    exp_TLE = np.exp(logits_TLE)
    scores_TLE = {
        "softmax": exp_TLE / exp_TLE.sum(axis=2, keepdims=True),
        "softmax_over_topk": exp_TLE / np.sort(exp_TLE, axis=2)[:, :, -top_k:].sum(axis=2, keepdims=True),
        "sigmoid": 1 / (1 + 1 / exp_TLE),
        "logits": logits_TLE,
        "none": exp_TLE,
    }[kind]
    gates_TLC = None if kind == "none" else np.take_along_axis(scores_TLE, ids_TLC, axis=2)
    return _routed(ids_TLC, kind=kind, gates_TLC=gates_TLC, experts=experts, top_k=top_k)


def _followers(rng, *, candidates=2, tokens=400, experts=8):
    """After expert e comes e + 1, then e + 2 and so on; the first is random."""
    first_TL = rng.integers(0, experts, (tokens, 1))
    return _routed((first_TL[:, :, None] + np.arange(candidates)) % experts, experts=experts)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(_KINDS),
    recorded=st.integers(2, 6),
    more=st.integers(1, 6),
    order=st.sampled_from(["likeliest", "sampled"]),
)
def test_a_completed_trace_is_the_recorded_one_and_goes_on(seed, kind, recorded, more, order):
    trace = _drawn(np.random.default_rng(seed), candidates=recorded, kind=kind)
    plan, others = split_requests(trace, (1, 1))
    candidates = min(recorded + more, 8)
    done = complete(others, candidates=candidates, fitted_on=plan, seed=3, order=order)
    check_values(done)  # distinct experts, scores finite and best first
    np.testing.assert_array_equal(done.expert_ids_TLC[:, :, :recorded], others.expert_ids_TLC)
    assert (done.candidates, done.recorded_candidates, done.completed) == (candidates, recorded, True)
    assert done.source == f"by hand, completed from {recorded} to {candidates} candidates"
    assert done.score_kind == others.score_kind
    again = complete(others, candidates=candidates, fitted_on=fit_completion(plan), seed=3, order=order)
    np.testing.assert_array_equal(done.expert_ids_TLC, again.expert_ids_TLC)
    if kind == "none":
        assert done.gates_TLC is None
        return
    np.testing.assert_array_equal(done.gates_TLC[:, :, :recorded], others.gates_TLC)
    if kind == "softmax":
        recorded_TL = others.gates_TLC.astype(np.float64).sum(axis=2)
        total_TL = done.gates_TLC.astype(np.float64).sum(axis=2)
        assert (total_TL <= np.maximum(recorded_TL, 1)).all()
        if candidates == 8:  # all mass is given out, but for what float16 cannot hold
            left_TL = done.gates_TLC[:, :, recorded - 1].astype(np.float64) * (8 - recorded)
            reachable_TL = recorded_TL + np.minimum(left_TL, 1 - recorded_TL)
            np.testing.assert_allclose(total_TL, reachable_TL, atol=2e-3)


def test_a_rule_between_ranks_is_found_and_carried_on():
    full = _followers(np.random.default_rng(0), candidates=6)
    plan, others = split_requests(full, (1, 1))
    fitted = fit_completion(plan.best(2))
    hidden = hidden_error(others.best(2), fitted)
    assert hidden.completion.recall[1].mean > 0.99
    assert hidden.popularity.recall[1].mean < 0.3
    assert hidden.completion.log_loss.mean < 0.7 < 1.9 < hidden.uniform_log_loss
    tail = tail_error(others, fitted)  # e + 1 after e says e + 2 after e + 1, though no third was ever seen
    assert tail.completion.recall[1].mean > 0.99
    assert tail.uniform_recall[1] == pytest.approx(1 / 6)
    done = complete(others.best(2), candidates=3, fitted_on=fitted)
    np.testing.assert_array_equal(done.expert_ids_TLC, others.best(3).expert_ids_TLC)


def test_where_there_is_no_rule_none_is_claimed():
    trace = _drawn(np.random.default_rng(0), tokens=2000, kind="softmax")
    plan, others = split_requests(trace, (1, 1))
    hidden = hidden_error(others, fit_completion(plan))
    assert hidden.uniform_log_loss == pytest.approx(np.log(6))
    assert hidden.completion.log_loss.mean == pytest.approx(np.log(6), abs=0.06)
    assert hidden.completion.recall[1].mean == pytest.approx(1 / 6, abs=0.03)


def test_the_rest_of_a_request_tells_what_it_uses():
    rng = np.random.default_rng(1)
    ids_TLC = np.stack([rng.permutation(4)[None, :2] + 4 * (token // 20 % 2) for token in range(400)])
    plan, others = split_requests(_routed(ids_TLC), (1, 1))
    done = complete(others, candidates=4, fitted_on=plan)
    half_T11 = (others.request_T % 2)[:, None, None]
    np.testing.assert_array_equal(done.expert_ids_TLC // 4, np.broadcast_to(half_T11, done.expert_ids_TLC.shape))


@pytest.mark.parametrize("beside", ["layer before", "layer after", "token before", "token after"])
def test_what_is_beside_a_token_tells_its_last_expert(beside):
    """The second expert here is the first one there, plus 1."""
    rng = np.random.default_rng(2)
    first_TL = 2 * rng.integers(0, 4, (600, 2))
    second_TL = 2 * rng.integers(0, 4, (600, 2)) + 1
    sources = {"layer before": (1, first_TL[:, 0]), "layer after": (0, first_TL[:, 1])}
    sources |= {"token before": (0, np.roll(first_TL[:, 0], 1)), "token after": (0, np.roll(first_TL[:, 0], -1))}
    layer, source_T = sources[beside]
    second_TL[:, layer] = source_T + 1
    plan, others = split_requests(_routed(np.stack([first_TL, second_TL], axis=2), tokens_per_request=100), (1, 1))
    found = hidden_error(others, fit_completion(plan)).completion.recall[1]
    assert found.by_layer[layer] > 0.95
    assert found.by_layer[1 - layer] < 0.5


def test_sampled_experts_follow_the_predicted_chances_and_the_seed():
    plan, others = split_requests(_drawn(np.random.default_rng(0), tokens=400, kind="softmax"), (1, 1))
    fitted = fit_completion(plan)
    one, same, other = (
        complete(others, candidates=4, fitted_on=fitted, seed=seed, order="sampled").expert_ids_TLC
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    likeliest = [complete(others, candidates=4, fitted_on=fitted, seed=seed).expert_ids_TLC for seed in (1, 2)]
    np.testing.assert_array_equal(*likeliest)


def test_windows_are_completed_by_what_the_plan_taught():
    plan, *others = split_requests(_drawn(np.random.default_rng(0)), (2, 1, 1))
    windows = complete_windows(plan, others, 5, seed=0)
    fitted = fit_completion(plan)
    assert [window.tokens for window in windows] == [20, 20]
    for window, other in zip(windows, others, strict=True):
        expected = complete(other, candidates=5, fitted_on=fitted)
        np.testing.assert_array_equal(window.expert_ids_TLC, expected.expert_ids_TLC)
        np.testing.assert_array_equal(window.gates_TLC, expected.gates_TLC)


@pytest.mark.parametrize(
    ("candidates", "change", "message"),
    [
        (3, lambda plan, other: (plan, other), r"complete 3 candidates to 3; use 4 to 8"),
        (9, lambda plan, other: (plan, other), r"complete 3 candidates to 9; use 4 to 8"),
        (5, lambda plan, other: (other, other), r"cannot be completed from itself"),
        (5, lambda plan, other: (other.take(np.arange(5)), other), r"1 of its requests \(the first is 2\) were fitted"),
        (5, lambda plan, other: (plan.best(2), other), r"3 candidates .*; .* fitted on 2 candidates"),
        (5, lambda plan, other: (plan, replace(other, score_kind="logits")), r"kind logits; .* of kind softmax"),
        (5, lambda plan, other: (plan, replace(other, gates_TLC=None)), r"kind none; .* of kind softmax"),
        (
            5,
            lambda plan, other: (plan, replace(other, model=tiny_model(layers=2, experts=9))),
            r"tiny, 2 layers of 9 experts; .* tiny, 2 layers of 8 experts",
        ),
        (5, lambda plan, other: (replace(plan, recorded_candidates=2), other), r"completed; fit on what was recorded"),
        (5, lambda plan, other: (plan, replace(other, recorded_candidates=2)), r"already completed from 2 to 3"),
    ],
)
def test_what_cannot_be_completed_is_refused(candidates, change, message):
    plan, other = change(*split_requests(_drawn(np.random.default_rng(0)), (1, 1)))
    with pytest.raises(InputError, match=message) as caught:
        complete(other, candidates=candidates, fitted_on=plan)
    assert "\n" not in str(caught.value)


def test_requests_of_another_recording_may_have_the_same_numbers():
    plan = _drawn(np.random.default_rng(0))
    other = replace(_drawn(np.random.default_rng(1)), source="another")
    assert complete(other, candidates=4, fitted_on=plan).candidates == 4


def test_nothing_can_be_fitted_where_every_expert_is_recorded():
    with pytest.raises(InputError, match=r"all 8 experts are recorded"):
        fit_completion(_drawn(np.random.default_rng(0), candidates=8))


def test_one_recorded_expert_can_be_completed_but_its_error_is_not_known():
    trace = _drawn(np.random.default_rng(0), candidates=1, top_k=1)
    plan, others = split_requests(trace, (1, 1))
    fitted = fit_completion(plan)
    check_values(complete(others, candidates=4, fitted_on=fitted))
    with pytest.raises(InputError, match=r"hiding one of them needs at least 2"):
        hidden_error(others, fitted)
    with pytest.raises(InputError, match=r"one recorded logits score a token shows no decay"):
        fit_completion(replace(trace, score_kind="logits"))


def test_true_candidates_are_needed_to_compare_with():
    plan, others = split_requests(_drawn(np.random.default_rng(0)), (1, 1))
    with pytest.raises(InputError, match=r"3 recorded candidates, 3 of them given"):
        tail_error(others, fit_completion(plan))


@pytest.mark.parametrize(
    ("gates", "experts", "tail"),
    [
        ([0.6, 0.3], 3, [0.1]),  # one is left: it has what is left
        ([0.25, 0.25], 4, [0.25, 0.25]),  # two are left with as much as two of the last recorded
        ([0.5, 0.5], 5, [0, 0, 0]),  # nothing is left
        ([0.5, 0.0], 4, [0, 0]),  # none may be above the last recorded
    ],
)
def test_softmax_scores_share_what_is_left(gates, experts, tail):
    np.testing.assert_allclose(anchored_tail(np.array([gates]), experts, experts - 2), [tail], atol=1e-7)


def test_a_tail_is_as_wide_as_its_mass_asks():
    narrow, wide = anchored_tail(np.array([[0.4, 0.2], [0.6, 0.2]]), 6, 4)
    assert narrow.sum() == pytest.approx(0.4)
    assert wide.sum() == pytest.approx(0.2)
    assert narrow[0] > wide[0] > wide[1] > wide[3]
    quantile = np.array([0.6433, 0.2019, -0.2019, -0.6433, -1.2816])  # normal, at (rank - 3/8) / 6.25, ranks 2 to 6
    slope = np.log(0.2 / narrow) / (quantile[0] - quantile[1:])
    np.testing.assert_allclose(slope, slope[0], rtol=1e-3)


def test_other_scores_fall_with_the_square_root_of_the_rank():
    # From rank 1 to 4 the root rises by 1, to 9 by 2: at a steepness of 3 logits fall by 3 and by 6.
    tail = continued_tail(np.array([[5.0]]), (3.0, 0.0), "logits", 8)
    assert tail[0, 2] == pytest.approx(2)
    assert tail[0, 7] == pytest.approx(-1)
    # Scores relative to the chosen fall by as much in their log.
    tail = continued_tail(np.array([[1.0]]), (3.0, 0.0), "softmax_over_topk", 8)
    np.testing.assert_allclose(tail[0, [2, 7]], np.exp([-3, -6]))
    # A sigmoid of one half has log odds 0: three below is 1 / (1 + e^3).
    assert continued_tail(np.array([[0.5]]), (3.0, 0.0), "sigmoid", 3)[0, 2] == pytest.approx(1 / (1 + np.exp(3)))
    # A fitted rise is no rise.
    np.testing.assert_array_equal(continued_tail(np.array([[5.0]]), (-3.0, 0.0), "logits", 2), [[5, 5]])


def test_the_decay_is_read_off_the_recorded_ranks():
    steep_T1 = np.array([[1.0], [2.0], [4.0]])
    logits_TC = -steep_T1 * np.sqrt(np.arange(1, 5))
    np.testing.assert_allclose(fit_decay(logits_TC, "logits"), (0, 1), atol=1e-9)
    # Two ranks: the mean fall, (1 + 2 + 4) / 3, and no ranks before it to tell tokens apart.
    np.testing.assert_allclose(fit_decay(logits_TC[:, :2], "logits"), (7 / 3, 0))
    # All alike before the last rank: its own mean.
    same_TC = np.array([[0.0, -1.0, -2.0], [0.0, -1.0, -3.0]])
    np.testing.assert_allclose(fit_decay(same_TC, "logits"), (1.5 / (np.sqrt(3) - np.sqrt(2)), 0))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_stored_scores_are_never_rounded_up(scores):
    kept = stored(np.array(scores))
    assert kept.dtype == np.float16
    assert np.isfinite(kept).all()
    inside = np.abs(scores) <= 65504
    assert (kept.astype(np.float64)[inside] <= np.array(scores)[inside]).all()
    np.testing.assert_allclose(kept[inside], np.array(scores)[inside], rtol=1e-3, atol=1e-7)


def test_intervals_are_over_requests():
    values_TL = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    both = estimate(values_TL, np.array([4, 4, 9]), seed=0)
    assert both.mean == pytest.approx(4 / 6)
    assert both.by_layer == pytest.approx((1 / 3, 1))
    assert both.interval == pytest.approx((0.5, 1))  # both draws of request 4, or both of request 9
    assert estimate(values_TL, np.array([4, 4, 4]), seed=0).interval is None


def test_errors_of_scores_are_shares_of_the_recorded_mass():
    # Three of four experts: what is left is known to the last digit, and so is its order.
    trace = _drawn(np.random.default_rng(0), experts=4, candidates=4)
    plan, others = split_requests(trace, (1, 1))
    tail = tail_error(others, fit_completion(plan.best(3)))
    assert tail.score_error.mean < 1e-3
    assert tail.mass_error.mean == pytest.approx(tail.score_error.mean)
    recorded_TL = others.gates_TLC[:, :, :3].astype(np.float64).sum(axis=2)
    assert tail.true_mass.mean == pytest.approx((others.gates_TLC[:, :, 3] / recorded_TL).mean(), rel=1e-3)
    assert (tail.refill.mean, tail.load_distance) == (1, 0)


def test_the_command_writes_only_requests_that_it_did_not_fit_on(tmp_path, capsys):
    trace = _drawn(np.random.default_rng(0), tokens=200)
    write_trace(tmp_path / "trace.parquet", trace)
    command(tmp_path / "trace.parquet", candidates=6, fit_share=0.3, out=tmp_path / "out", json=True)
    said = json.loads(capsys.readouterr().out)
    done = read_trace(tmp_path / "out" / "trace.parquet")
    assert sorted(set(done.request_T.tolist())) == [3, 4, 5, 6, 7, 8, 9]
    assert (done.candidates, done.recorded_candidates) == (6, 3)
    assert (said["fitted_tokens"], said["tokens"], said["source"]) == (60, 140, done.source)
    assert said["hidden"]["rank"] == 3
    assert 0 <= said["hidden"]["completion"]["recall"]["1"]["mean"] <= 1


def test_the_command_fits_on_another_trace(tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 1)):
        write_trace(tmp_path / name, replace(_drawn(np.random.default_rng(seed)), source=name))
    command(tmp_path / "a", candidates=5, fit_on=tmp_path / "b", out=tmp_path)
    said = capsys.readouterr()
    assert "fitted on 80 tokens of others" in said.out
    assert "80 tokens, 5 candidates each, 3 of them recorded" in said.err
    assert read_trace(tmp_path / "trace.parquet").tokens == 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit_share": 1.0}, r"--fit-share is 1; use a share above 0 and below 1"),
        ({"fit_share": 0.01}, r"leave a part empty"),
        ({"fit_on": "same", "fit_share": 0.5}, r"exclude each other"),
        ({"fit_on": "same"}, r"4 of its requests \(the first is 0\) were fitted on"),
        ({"candidates": 99}, r"complete 3 candidates to 99; use 4 to 8"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(tmp_path, options, message):
    path = tmp_path / "recorded.parquet"
    write_trace(path, _drawn(np.random.default_rng(0)))
    options = {"candidates": 5} | options | ({"fit_on": path} if "fit_on" in options else {})
    with pytest.raises(InputError, match=message):
        command(path, out=tmp_path, **options)
    assert not (tmp_path / "trace.parquet").exists()


def test_recorded_gpt_oss(shared_data):
    file = shared_data / "traces/gptoss20b/gptoss20b_ship.npz"
    plan, others = split_requests(import_npz(file, model=PRESETS["gpt-oss-20b"]).trace, (0.4, 0.6))
    fitted = fit_completion(plan)
    hidden = hidden_error(others, fitted)
    found, popular = hidden.completion.recall[4], hidden.popularity.recall[4]
    assert found.interval[0] > 0.65 > 0.35 > popular.interval[1]
    assert hidden.completion.log_loss.interval[1] < 2.3 < 3.0 < hidden.popularity.log_loss.interval[0]
    assert hidden.score_error.mean < 0.03
    check_values(complete(others, candidates=16, fitted_on=fitted))


def test_null_experts_are_completed_as_others_are():
    rng = np.random.default_rng(0)
    plan, other = (_followers(rng, candidates=2) for _ in range(2))
    model = replace(plan.model, experts=6, null_experts=2)
    plan, other = replace(plan, model=model), replace(other, model=model, source="another recording")
    done = complete(other, candidates=8, fitted_on=plan)
    check_values(done)
    # After expert e comes e + 1 and then e + 2, of 6 experts and 2 null ones alike.
    right_T = done.expert_ids_TLC[:, 0, 2] == (done.expert_ids_TLC[:, 0, 1] + 1) % 8
    assert right_T.mean() > 0.9
    assert hidden_error(other, fit_completion(plan)).completion.recall[1].mean > 0.9
    full = replace(_followers(rng, candidates=4), model=model, source="a third")
    assert tail_error(full, fit_completion(plan)).load_distance < 0.5

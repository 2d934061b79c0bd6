import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from cost_models.profile import FitError, Profile
from sim.memory import MemoryUse
from sim.report import Report
from traces.stats import Balance, TraceStats
from tuner.html import ReportPage, write_html
from tuner.scenario import Config
from tuner.study import StudyResult, Trial, pareto_front
from tuner.validate import ValidatedRun, Validation

HOSTILE = "<script>alert('&')</script>"

SECTIONS = (
    "Configurations",
    "Step time against quality",
    "Predicted against measured",
    "Where the time of a step goes",
    "Load of experts and ranks",
    "Trace",
    "Calibration",
    "What these numbers are, and their limits",
)
PLOTS = ("front", "accuracy", "stages", "expert-loads", "rank-loads")


MOVES = {
    "opportunistic": {"k0": 1},
    "batch_set": {"active_share": 0.5},
    "cache_aware": {"bonus": 0.3, "cache_share": 0.5},
    "topology_aware": {"price": 0.1},
}


def top_k(k):
    return Config(policy="top_k", parameters={"k": k})


def report(config, step_s, gate_mass):
    return Report(
        name=config.describe(),
        costs="calibrated on a test box",
        fidelity="event",
        steps=1,
        step_s=step_s,
        step_s_by_step=(step_s,),
        tokens_per_s=1.0,
        tokens_per_s_per_rank=1.0,
        stage_s={"gate": 0.25 * step_s, "experts": 0.5 * step_s},
        breakdown_s={"gate": 0.25 * step_s, "experts": 0.5 * step_s},
        waiting_s=0.25 * step_s,
        waits_s={},
        interval_s=None,
        extrapolated={},
        token_imbalance=1.0,
        active_imbalance=1.0,
        critical_rank_by_layer=(),
        experts_per_token=config.parameters["k"],
        gate_mass=gate_mass,
        dropped_share=0.0,
        rerouted_share=0.0,
        padding_share=0.0,
        lost_share=0.0,
        bytes_by_tier={},
        expert_flops_per_token=0.0,
        memory=MemoryUse(
            expert_bytes=1.0, other_weight_bytes=1.0, kv_cache_bytes=0.0, buffer_bytes=0.0, capacity_bytes=None
        ),
    )


def study():
    reports = [(top_k(4), 8e-3, 1.0), (top_k(2), 4e-3, 0.97), (top_k(1), 5e-3, 0.6)]
    trials = tuple(
        Trial(
            number=number,
            config=config,
            step_s=step_s,
            gate_mass=gate_mass,
            report=report(config, step_s, gate_mass).to_json(),
        )
        for number, (config, step_s, gate_mass) in enumerate(reports)
    )
    return StudyResult(trials=trials, front=pareto_front(trials), found_before=0)


def validated(name, role, config, *, predicted_step_s, measured_step_s, loss_delta):
    speedup = 10e-3 / measured_step_s
    return ValidatedRun(
        name=name,
        role=role,
        config=config.describe(),
        predicted_step_s=predicted_step_s,
        measured_step_s=measured_step_s,
        speedup_predicted=8e-3 / predicted_step_s,
        speedup_measured=speedup,
        speedup_ci=(speedup - 0.25, speedup + 0.25),
        gate_mass=0.97,
        experts_per_token=2.0,
        dropped_share=0.0,
        loss=1.5 + loss_delta,
        loss_delta=loss_delta,
        loss_delta_ci=(loss_delta - 0.01, loss_delta + 0.01),
        stages_predicted_s={"gate": 0.001, "experts": predicted_step_s - 0.002},
        stages_measured_s={"gate": 0.001, "experts": measured_step_s - 0.001},
    )


def validation():
    return Validation(
        device="cpu",
        ranks=2,
        rounds=7,
        runs=(
            validated("baseline", "baseline", top_k(4), predicted_step_s=8e-3, measured_step_s=10e-3, loss_delta=0.0),
            validated("keeps 95%", "winner", top_k(2), predicted_step_s=4e-3, measured_step_s=5e-3, loss_delta=0.031),
            validated("random 1", "random", top_k(1), predicted_step_s=5e-3, measured_step_s=12.5e-3, loss_delta=-0.5),
        ),
        mape=0.234,
        spearman=0.5,
        gate_mass_against_loss=float("nan"),
        drift=1.07,
        load_average=0.5,
        best="keeps 95%",
        confirmed=True,
        verdict="confirmed: 1 of 1 winners are faster in reality",
    )


@pytest.fixture
def page():
    return ReportPage(
        title="A study",
        scenario=("Model: 2 layers × 4 experts",),
        trace=TraceStats(
            tokens=1234,
            requests=5,
            top_k=2,
            max_over_mean_L=(1.5, 2.5),
            gini_L=(0.2, 0.4),
            reuse_L=(0.25, 0.75),
            uniform_reuse=0.125,
            uniform=Balance(max_over_mean=1.07, gini=0.03),
            by_domain={"prose": Balance(max_over_mean=2.22, gini=0.33)},
        ),
        study=study(),
        validation=validation(),
        loads_LE=np.array([[1, 2, 3, 2], [4, 0, 2, 2]]),
        rank_rows_LG={"baseline": np.array([[3, 5], [4, 4]]), "keeps 95%": np.array([[2, 2], [3, 1]])},
        profile=Profile(
            device="cpu",
            device_name="a test box",
            ranks=2,
            linear={},
            curves={},
            errors={"Experts": FitError(mape=0.0456, median_ape=0.0321, cases=9, low=0.9, high=1.1)},
            probe_s=(0.002, 0.0022),
            load_average=0.5,
        ),
        baseline=report(top_k(4), 8e-3, 1.0),
    )


def written(page, folder):
    """The page without plotly.js, which is the only part that is not ours."""
    path = folder / "report.html"
    write_html(path, page)
    before, after = path.read_text(encoding="utf-8").split(get_plotlyjs())
    return before + after


def words(html):
    """What a reader sees of the page outside its figures."""
    return " ".join(unescape(re.sub(r"<script.*?</script>|<[^>]*>", " ", html, flags=re.DOTALL)).split())


def test_sections_and_figures_stand_in_order(page, tmp_path):
    html = written(page, tmp_path)
    headings = [unescape(heading) for heading in re.findall(r"<h2>(.*?)</h2>", html)]
    assert headings == list(SECTIONS)
    assert re.findall(r'<div id="plot-([\w-]+)"', html) == list(PLOTS)


def test_nothing_is_loaded_from_elsewhere(page, tmp_path):
    html = written(page, tmp_path)
    assert not re.search(r"<(link|img|iframe|object|embed)\b|\ssrc=|@import|url\(", html)
    assert "default-src 'none'" in html
    assert not re.search(r"https?://", html)


def test_headline_says_what_came_out_before_anything_else(page, tmp_path):
    text = words(written(page, tmp_path))
    assert "A study Confirmed: 1 of 1 winners are faster in reality. Over 3 configs" in text
    assert "23.4% off the measured ones on average and rank them with a Spearman correlation of 0.50" in text
    # 8 ms against 4 ms, the only trial but the baseline that keeps 95%
    assert "predicted at 2.00 times the baseline's speed: top_k(k=2) contiguous" in text


def test_table_has_predictions_beside_measurements(page, tmp_path):
    text = words(written(page, tmp_path))
    assert "1 baseline baseline top_k(k=4) contiguous 8.00 10.00 1.00× 1.00× 97.0% 2.00 –" in text
    # 10 ms / 5 ms, ± 0.25
    assert (
        "2 keeps 95% winner top_k(k=2) contiguous 4.00 5.00 2.00× 2.00× [1.75, 2.25] 97.0% 2.00 +0.031 [+0.021, +0.041]"
        in text
    )
    assert "12.50 1.60× 0.80× [0.55, 1.05] 97.0% 2.00 −0.500 [−0.510, −0.490]" in text


def test_a_speedup_is_bold_only_where_its_interval_says_so(page, tmp_path):
    assert re.findall(r"<strong>(.*?)</strong>", written(page, tmp_path)) == ["2.00×"]


def test_trace_loads_and_calibration_are_told(page, tmp_path):
    text = words(written(page, tmp_path))
    assert (
        "All 2.00 [1.50, 2.50] 0.30 [0.20, 0.40] 50.0% Domain prose 2.22 0.33 Uniform random routing 1.07 0.03" in text
    )
    assert "1,234 tokens of 5 requests" in text
    assert "The busiest is expert 0 of layer 1, with 2.00 times the mean" in text
    # baseline (5/4 + 4/4) / 2, winner (2/2 + 3/2) / 2
    assert "baseline 1.12 (16 rows in all), keeps 95% 1.25 (8 rows in all)" in text
    assert "Experts 4.6% 3.2% 9" in text
    assert "a fixed probe took 1.07 times" in text.lower()


def test_what_is_not_a_number_is_a_dash(page, tmp_path):
    text = words(written(page, tmp_path))
    assert "Spearman correlation of –, where 1 is the same order" in text
    assert "nan" not in text.lower().split()


def test_predicted_stages_and_waiting_make_up_the_step(page, tmp_path):
    html = written(page, tmp_path)
    # the winner's 4 ms less 1 ms gate and 2 ms experts
    assert '"x":[1.0,2.0,1.0]' in html
    assert '"y":["gate","experts","waiting"]' in html


def test_a_study_by_loss_shows_the_loss_in_place_of_the_gate_mass(page, tmp_path):
    trials = tuple(replace(trial, loss=loss) for trial, loss in zip(page.study.trials, (1.5, 1.56, 1.65), strict=True))
    studied = StudyResult(trials=trials, front=pareto_front(trials), found_before=0)
    measured = replace(page.validation, gate_mass_against_loss=None, study_loss_against_loss=0.75)
    html = written(replace(page, study=studied, validation=measured), tmp_path)
    text = words(html)
    assert "on the front of step time against loss. The fastest that loses at most 5% more than the baseline is" in text
    assert "predicted at 2.00 times the baseline's speed: top_k(k=2) contiguous" in text  # 1.56 is 4% above 1.5
    assert "Winners are named by the loss that they add at most to the baseline's" in text
    assert "The study's loss orders these configs as the loss on text that no part was chosen by" in text
    assert '"y":[1.56,1.5]' in html  # the front: trial 1, then the baseline
    assert '"text":"loss, nats a byte"' in html
    unmeasured = words(written(replace(page, study=studied, validation=None), tmp_path))
    assert "trial 1 front top_k(k=2) contiguous 4.00 2.00× 1.560 2.00" in unmeasured
    assert "Loss, nats a byte" in unmeasured


def test_an_unmeasured_study_shows_its_front(page, tmp_path):
    unmeasured = replace(
        page,
        validation=None,
        profile=None,
        rank_rows_LG={"baseline": np.array([[3, 5]]), "top_k(k=2) contiguous": np.array([[2, 2]])},
    )
    html = written(unmeasured, tmp_path)
    text = words(html)
    assert [unescape(heading) for heading in re.findall(r"<h2>(.*?)</h2>", html)] == list(SECTIONS)
    assert "Not measured yet." in text
    assert "trial 1 front top_k(k=2) contiguous 4.00 2.00× 97.0% 2.00" in text
    assert "trial 2" not in text  # beaten on both
    assert "costs are calibrated on a test box, which nothing has checked" in text


def test_the_front_tells_policies_by_what_they_are_made_of(page, tmp_path):
    limits = [None, *({"name": "capacity", "factor": 1 + number / 10} for number in range(2))]
    moves = [None, *({"name": name, **given} for name, given in MOVES.items())]
    configs = [Config(policy="top_k", parameters={"k": 2}, adjustment=a, capacity=c) for a in moves for c in limits]
    trials = tuple(
        replace(page.study.trials[0], number=number, config=config, step_s=1e-3 * (number + 1), gate_mass=0.5)
        for number, config in enumerate(configs)
    )
    studied = StudyResult(trials=trials, front=pareto_front(trials), found_before=0)
    html = written(replace(page, study=studied, validation=None), tmp_path)
    legend = re.findall(r'"name":"([^"]*)","opacity|"mode":"markers","name":"([^"]*)"', html)
    names = [one or other for one, other in legend]
    # Ten kinds, each of the five with a capacity from two trials: the fastest is the front, then the larger ones.
    assert names == [
        "top_k",
        *sorted(f"top_k{move} + capacity" for move in ["", *(f" + {name}" for name in MOVES)]),
        "top_k + batch_set",
        "3 others",
        "baseline",
    ]


def test_text_is_escaped_wherever_it_comes_from(page, tmp_path):
    runs = tuple(
        replace(run, name=HOSTILE if run.role == "winner" else run.name, config=HOSTILE) for run in page.validation.runs
    )
    hostile = replace(
        page,
        title=HOSTILE,
        scenario=(HOSTILE,),
        trace=replace(page.trace, by_domain={HOSTILE: Balance(max_over_mean=1, gini=0)}),
        validation=replace(page.validation, verdict=HOSTILE, device=HOSTILE, runs=runs),
        rank_rows_LG={"baseline": np.array([[3, 5]]), HOSTILE: np.array([[2, 2]])},
        profile=page.profile.model_copy(
            update={
                "device_name": HOSTILE,
                "errors": {HOSTILE: FitError(mape=0.1, median_ape=0.1, cases=1, low=0.9, high=1.1)},
            }
        ),
        baseline=replace(page.baseline, costs=HOSTILE, fidelity=HOSTILE),
    )
    html = written(hostile, tmp_path)
    assert "<script>alert" not in html
    assert r"\u003cscript\u003ealert" not in html  # nor in a figure, where plotly reads tags
    assert words(html).count(HOSTILE) >= 8


def test_the_same_page_is_written_the_same(page, tmp_path):
    assert written(page, tmp_path) == written(page, tmp_path)


def test_a_failed_write_leaves_the_old_page(page, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_html(path, page)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"

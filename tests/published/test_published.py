"""Published figures and our predictions of them: the data file, the conversions, every case, the bars.

Tokens are drawn for two layers here, half as many as by `benchmarks/published.py`, whose figures are in the docs.
"""

import importlib.util
import json
import math
import runpy
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cost_models.kernels.token_traffic import chance_of_a_copy
from router.placement.base import Placement

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "published.py"


sys.path.insert(0, str(SCRIPT.parent))  # the scripts beside it


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("published", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PUBLISHED = load_script()
FILE = {**PUBLISHED.read_cases(), "drawn_layers": 2}
PAGE = Path(__file__).parents[2] / "docs" / "published.md"


def named(case_id: str) -> Any:
    return next(case for case in FILE["cases"] if case["id"] == case_id)


@cache
def row_of(case_id: str) -> Any:
    case = named(case_id)
    (row,) = PUBLISHED.GROUPS[case["group"]](case, FILE)
    return row


def rows_of(group: str) -> Any:
    return [row_of(case["id"]) for case in FILE["cases"] if case["group"] == group]


@pytest.mark.parametrize("case", FILE["cases"], ids=lambda case: case["id"])
def test_a_case_says_where_it_is_from_and_what_it_takes_for_granted(case: Any) -> None:
    assert {"id", "group", "source", "published", "scored", "inputs", "assumptions"} <= case.keys()
    source = FILE["sources"][case["source"]]
    assert source["title"]
    assert source["url"].startswith("https://")
    assert case["published"]["value"] > 0
    assert case["published"]["unit"]
    assert case["assumptions"]
    assert all(isinstance(sentence, str) for sentence in case["assumptions"])
    if case.get("score") == "sign":
        assert (case["published"]["value"] > 1) == (case["sign"] == "gain")


def test_no_case_is_left_out() -> None:
    ids = [case["id"] for case in FILE["cases"]]
    assert len(set(ids)) == len(ids)
    assert Counter(case["group"] for case in FILE["cases"]) == {
        "deepep": 20,
        "end_to_end": 13,
        "ratios": 10,
        "eplb_kernels": 4,
        "signs": 6,
    }
    assert [case["id"] for case in FILE["cases"] if not case["scored"]] == [
        "deepseek-production-prefill",
        "deepseek-production-decode",
    ]
    assert FILE["skew"] == {"distribution": "power_law", "exponent": 1.01}
    assert FILE["skew_range"] == [0.6, 1.2]


def test_copies_of_a_token_by_hand() -> None:
    # 2 of 4 experts on 2 ranks of one node: both on one rank in 2 of 6 cases, 1 · 1/3 + 2 · 2/3.
    assert PUBLISHED.copies_of_a_token(4, 2, 2, 1, 4) == pytest.approx((1, 5 / 3), rel=0.01)


@pytest.mark.parametrize(("ranks", "nodes"), [(8, 1), (16, 2), (32, 4)])
def test_up_to_four_nodes_the_test_of_deepep_chooses_evenly(ranks: int, nodes: int) -> None:
    expected = [groups * float(chance_of_a_copy(256, 8, groups)) for groups in (nodes, ranks)]
    assert PUBLISHED.copies_of_a_token(256, 8, ranks, nodes, 4) == pytest.approx(expected, rel=0.005)


def test_of_eight_nodes_a_token_keeps_four() -> None:
    to_nodes, to_ranks = PUBLISHED.copies_of_a_token(256, 8, 64, 8, 4)
    assert 3.9 < to_nodes <= 4 < 8 * float(chance_of_a_copy(256, 8, 8))  # 5.3 if it chose evenly
    assert to_ranks <= 8


def test_printed_bandwidth_is_converted_to_time() -> None:
    # Combine on 32 ranks: 4096 tokens to 3.6 of 4 nodes, the own one too, 14,336 bytes each, at 57 GB/s: 3.7 ms.
    by_hand_us = 4096 * 3.61 * 14336 / 57e9 * 1e6
    assert PUBLISHED.deepep_published_us(named("deepep-normal-combine-ep32")) == pytest.approx(by_hand_us, rel=0.01)
    # Dispatch on 8 ranks: to 5.29 of 8 ranks, 7,392 bytes each, at 153 GB/s: 1.05 ms.
    by_hand_us = 4096 * 5.29 * 7392 / 153e9 * 1e6
    assert PUBLISHED.deepep_published_us(named("deepep-normal-dispatch-ep8")) == pytest.approx(by_hand_us, rel=0.01)
    assert PUBLISHED.deepep_published_us(named("deepep-ll-dispatch-ep8")) == 77


def test_low_latency_bandwidth_and_time_are_one_number() -> None:
    # 128 tokens, 8 copies, 7168 + 4 · 7168 / 128 + 16 bytes: 98 GB/s is 77 us.
    printed_us = 128 * 8 * (7168 + 224 + 16) / 98e9 * 1e6
    assert printed_us == pytest.approx(77, rel=0.01)


@pytest.mark.parametrize("case", FILE["cases"], ids=lambda case: case["id"])
def test_a_prediction(case: Any) -> None:
    row = row_of(case["id"])
    keys = {"id", "group", "published", "predicted", "ape", "unit", "scored", "score", "sign_right"}
    assert keys <= row.keys() <= keys | {"range", "with_drift"}
    assert math.isfinite(row["predicted"])
    assert row["predicted"] > 0
    assert row["ape"] == pytest.approx(abs(row["predicted"] / row["published"] - 1))
    if row["scored"] and row["score"] == "ape":
        assert row["ape"] < 0.5
    if "sign" in case:
        assert row["sign_right"] is ((row["predicted"] > 1) == (case["sign"] == "gain"))
        assert row["sign_right"]
    else:
        assert row["sign_right"] is None


@pytest.mark.parametrize(
    ("group", "bar"), [("deepep", 0.08), ("end_to_end", 0.2), ("ratios", 0.2), ("eplb_kernels", 0.08)]
)
def test_the_median_of_a_group_meets_its_bar(group: str, bar: float) -> None:
    found = PUBLISHED.summary(rows_of(group))
    by_error = [case for case in FILE["cases"] if case["scored"] and case.get("score", "ape") == "ape"]
    assert found["groups"][group]["n"] == sum(case["group"] == group for case in by_error)
    assert found["median_ape"] == found["groups"][group]["median_ape"] <= bar


@pytest.mark.parametrize(("group", "signs"), [("ratios", "10 of 10"), ("signs", "6 of 6")])
def test_all_signs_are_right(group: str, signs: str) -> None:
    assert PUBLISHED.summary(rows_of(group))["groups"][group]["signs_right"] == signs


def test_the_gain_of_eplb_grows_with_the_skew() -> None:
    for case_id in ("eplb-prefill", "eplb-decode"):
        row = row_of(case_id)
        assert row["range"].keys() == {"0.6", "1.2"}
        assert 1 < row["range"]["0.6"] < row["predicted"] < row["range"]["1.2"]


def test_a_placement_planned_before_a_drift_is_slower() -> None:
    rows = rows_of("end_to_end")
    assert {row["id"] for row in rows if "with_drift" in row} == {
        case["id"] for case in FILE["cases"] if case["group"] == "end_to_end" and case["inputs"]["placement"] == "eplb"
    }
    assert all(row["with_drift"] < row["predicted"] for row in rows if "with_drift" in row)


def test_the_page_has_every_case() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for case in FILE["cases"]:
        assert f"| {case['id']} | " in page


def test_the_tables_of_the_page_have_every_row() -> None:
    rows = [
        {**PUBLISHED.row(named("sglang-h100-decode-2k"), 20_000, 25_000, "tokens/s per node"), "with_drift": 18_000},
        {**PUBLISHED.row(named("eplb-decode"), 2.54, 3, "x"), "range": {"0.6": 1.5, "1.2": 4}},
        PUBLISHED.row(named("two-batch-overlap-decode-32"), 0.73, 1.1, "x"),
        PUBLISHED.row(named("deepseek-production-decode"), 14_800, 14_800, "tokens/s per node"),
    ]
    lines = PUBLISHED.as_markdown(PUBLISHED.summary(rows)).splitlines()
    assert lines[0] == "**end_to_end**: 1 scored by their error, median 25.0%."
    for line in (
        "| sglang-h100-decode-2k | 20,000 tokens/s per node | 25,000 | +25.0% | error | 18,000 (-10.0%) |",
        "| deepseek-production-decode | 14,800 tokens/s per node | 14,800 | +0.0% | no |  |",
        "**ratios**: 1 scored by their error, median 50.7%; signs right 1 of 2.",
        "| eplb-decode | 2.54 x | 3 | +18.1% | sign right | 1.50 to 4.00 |",
        "| two-batch-overlap-decode-32 | 0.73 x | 1.1 | +50.7% | error, sign WRONG |  |",
    ):
        assert line in lines


def test_active_experts_are_spread_before_rows() -> None:
    signs = importlib.import_module("published_signs")
    # Two ranks of three slots; experts 0 and 1 on both. Rank 0: experts 0, 1, 2. Rank 1: experts 0, 1, 3.
    placement = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 0, 1, 3]]), experts=4, ranks=2)
    # Expert 2 has no choice: rank 0 has one active expert. Expert 3 is not active. Expert 0 (3 rows) takes rank 1,
    # then expert 1 (2 rows) finds one active expert on both ranks, and fewer rows on rank 0 (1 against 3).
    ids_TK = np.array([[0, 1], [0, 1], [0, 2]], dtype=np.int32)
    assert signs.one_replica_each(placement, 0, ids_TK)[:3].tolist() == [3, 1, 2]


def test_the_fit_of_expert_kernels_has_seen_no_row_with_eplb() -> None:
    part, fit = PUBLISHED.fit_without_eplb("h200_sxm")
    with_eplb_N = np.char.endswith(part.columns["distribution"].astype(str), "_eplb")
    assert with_eplb_N.sum() == 2484
    held_out_s = fit.predict(part.describe())[0][with_eplb_N]
    assert np.median(np.abs(held_out_s / part.seconds_N[with_eplb_N] - 1)) < 0.08


def test_medians_leave_out_what_is_not_scored() -> None:
    cases = [{"id": str(i), "group": "g", "scored": i < 3} for i in range(4)]
    rows = [PUBLISHED.row(case, 1.0, 1 + error, "x") for case, error in zip(cases, (0.1, 0.2, -0.4, 9.0), strict=True)]
    found = PUBLISHED.summary(rows)
    assert found["groups"] == {"g": {"n": 3, "median_ape": pytest.approx(0.2), "signs_right": "0 of 0"}}
    assert len(found["cases"]) == 4


def test_medians_leave_out_what_is_scored_by_its_sign() -> None:
    case = {"id": "a", "group": "g", "scored": True}
    rows = [
        PUBLISHED.row(case, 1.0, 1.1, "x"),
        PUBLISHED.row({**case, "score": "sign", "sign": "gain"}, 20.0, 1.5, "x"),
        PUBLISHED.row({**case, "score": "sign", "sign": "loss"}, 0.5, 1.5, "x"),
    ]
    found = PUBLISHED.summary(rows)
    assert found["groups"] == {"g": {"n": 1, "median_ape": pytest.approx(0.1), "signs_right": "1 of 2"}}
    assert found["median_ape"] == pytest.approx(0.1)


def test_the_script_prints_one_json_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--json", "--group", "eplb_kernels"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    document = json.loads(capsys.readouterr().out)
    assert document.keys() == {"cases", "groups", "median_ape"}
    assert [row["id"] for row in document["cases"]] == [f"eplb-kernel-ep{ranks}" for ranks in (8, 32, 64, 256)]

"""What a scenario may simulate and still be validated: what the real run does."""

from pathlib import Path
from typing import Any

import pytest

from traces.errors import InputError
from tuner.scenario import parse_scenario
from tuner.validate import check_that_it_runs

RUNS = {
    "version": 1,
    "name": "one that runs",
    "trace": "trace.parquet",
    "cluster": {"device": "h100_sxm", "ranks": 2},
    "batch": {"phase": "prefill", "tokens_per_rank": 8, "steps": 1},
    "config": {"policy": "top_k", "parameters": {"k": 2}},
    "execution": {"extent": "moe"},
}


def test_moe_layers_on_healthy_ranks_can_be_run() -> None:
    check_that_it_runs(parse_scenario(RUNS, source="here"))
    demo = Path(__file__).parents[2] / "moeroute" / "demo.yaml"
    assert "extent: moe" in demo.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"execution": {"extent": "whole"}}, "execution.extent"),
        ({"execution": {"extent": "moe", "overlap": "two_batch"}}, "execution.overlap"),
        ({"layout": {"expert_tensor": 2}}, "layout"),
        ({"disturbance": {"jitter": 0.1}}, "disturbance"),
        ({"cluster": {"device": "h100_sxm", "ranks": 2, "degrade": ["gpu0=0.5"]}}, "cluster.degrade"),
        ({"sampled_layers": 1}, "sampled_layers"),
        (
            {"config": {"policy": "top_k", "parameters": {"k": 2}, "placement": {"resident_share": 0.5}}},
            "config.placement.resident_share",
        ),
    ],
    ids=["whole", "overlap", "layout", "jitter", "slow", "sampled", "resident"],
)
def test_what_a_real_run_has_not_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}: a real run has MoE layers alone"):
        check_that_it_runs(parse_scenario({**RUNS, **changes}, source="here"))

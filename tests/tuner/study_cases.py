"""A study without a simulator: a scenario, and an evaluation that is a deterministic function of the config.

As a script, `study_cases.py JOURNAL LOG TRIALS`, it runs a study slowly, so that a test can kill it on the way. The log
gets a line for every evaluation that ended.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sim.memory import MemoryUse
from sim.report import Report
from tuner.scenario import Config, Scenario, parse_scenario
from tuner.study import tune

# 4 k by 3 placements: 12 configs, the baseline among them.
TWELVE = {
    "policies": ["top_k"],
    "adjustments": ["none"],
    "capacities": ["none"],
    "ranges": {"top_k.k": [1, 4]},
    "placements": ["contiguous", "balanced", "random"],
}


def scenario_document(**changes: Any) -> dict[str, Any]:
    """The least that a scenario needs, as YAML would give it."""
    return {
        "version": 1,
        "name": "small",
        "trace": {"model": "mixtral-8x7b", "tokens": 512, "zipf": 0.5},
        "cluster": {"device": "h100_sxm", "ranks": 4},
        "batch": {"phase": "prefill", "tokens_per_rank": 16, "steps": 1},
        "config": {"policy": "top_k", "parameters": {"k": 2}},
        **changes,
    }


def small_scenario(trials: int, *, name: str = "small", seed: int = 0, config: Any = None, **study: Any) -> Scenario:
    changes: dict[str, Any] = {"name": name, "seed": seed, "study": {"trials": trials, **study}}
    if config is not None:
        changes["config"] = config
    return parse_scenario(scenario_document(**changes), source="a test")


def config_key(config: Config) -> str:
    """Equal for configs that mean the same."""
    return json.dumps(config.model_dump(mode="json"), sort_keys=True)


def fake_report(config: Config) -> Report:
    """Step time and gate mass from a digest of the config: reproducible, and no sampler can guess them."""
    digest = hashlib.sha256(config_key(config).encode()).digest()
    return Report(
        name=config.describe(),
        costs="none",
        fidelity="analytic",
        steps=1,
        step_s=1 + digest[0] / 256,
        step_s_by_step=(1 + digest[0] / 256,),
        tokens_per_s=1.0,
        tokens_per_s_per_rank=1.0,
        stage_s={},
        breakdown_s={},
        waiting_s=0.0,
        waits_s={},
        interval_s=None,
        extrapolated={},
        token_imbalance=1.0,
        active_imbalance=1.0,
        critical_rank_by_layer=(),
        experts_per_token=1.0,
        gate_mass=digest[1] / 256,
        dropped_share=0.0,
        rerouted_share=0.0,
        padding_share=0.0,
        lost_share=0.0,
        bytes_by_tier={},
        expert_flops_per_token=0.0,
        memory=MemoryUse(
            expert_bytes=0.0, other_weight_bytes=0.0, kv_cache_bytes=0.0, buffer_bytes=0.0, capacity_bytes=None
        ),
    )


def logged(log: Path, seconds: float = 0.0) -> Callable[[Config], Report]:
    """`fake_report`, slower, and with a line in `log` for each config evaluated."""

    def evaluate(config: Config) -> Report:
        time.sleep(seconds)
        with log.open("a") as lines:
            lines.write(config_key(config) + "\n")
        return fake_report(config)

    return evaluate


if __name__ == "__main__":
    journal_path, log_path, trials_wanted = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    tune(small_scenario(trials_wanted), logged(log_path, 0.005), journal=journal_path, identity="same")

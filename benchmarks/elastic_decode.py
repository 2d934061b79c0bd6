"""Simulated decode steps with all of a token's experts and with a quarter of them, by deployment and batch."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from elastic_rows import TRACE_TOKENS, Cut, Study, kept, load
from elastic_trainings import CONFIG
from policy_cases import as_model

from router.elastic.extract import in_memory
from router.nn.record import record
from router.nn.store import TrainedModel
from traces.presets import preset
from traces.synthetic import synthetic_trace
from tuner.deployed import DEPLOYED_AS, RANKS, deployed_report
from tuner.replays import Replays
from tuner.scenario import parse_scenario

TOKENS_PER_RANK = (16, 64, 256)
_CONTEXT = 512  # cached tokens a stream, few enough for the largest batch to fit
_ZIPF = 0.6
_SYNTHETIC_LAYERS = 4  # distinct ones, which stand for the others


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A published shape on H100s, with synthetic routing; `redundant_slots` hold replicas."""

    model: str
    ranks: int
    redundant_slots: int = 0
    fields: Mapping[str, Any]

    def step_s(self, top_k: int, tokens_per_rank: int, seed: int) -> float:
        """A simulated decode step with `top_k` experts a token."""
        model = preset(self.model)
        routing = synthetic_trace(
            replace(model, layers=_SYNTHETIC_LAYERS),
            tokens=3 * self.ranks * tokens_per_rank,  # a step to plan placements on, one to replay, one to leave out
            zipf=_ZIPF,
            seed=seed,
            phase="decode",
        )
        scenario = parse_scenario(
            {
                "version": 1,
                "name": self.model,
                "trace": {"model": self.model, "tokens": 1, "zipf": 0},  # stands in for the one that is given
                "cluster": {"device": "h100_sxm", "ranks": self.ranks},
                "batch": {
                    "phase": "decode",
                    "tokens_per_rank": tokens_per_rank,
                    "steps": 1,
                    "kv_tokens_per_rank": _CONTEXT * tokens_per_rank,
                },
                "sampled_layers": _SYNTHETIC_LAYERS,
                "config": {
                    "policy": "top_k",
                    "parameters": {"k": top_k},
                    "placement": {"algorithm": "balanced", "redundant_slots": self.redundant_slots},
                },
                "fidelity": "analytic",
                "windows": {"plan": 1, "tune": 1, "validate": 1},
                **self.fields,
            },
            source=self.model,
        )
        replays = Replays.of(scenario, as_model(routing, model))
        return replays.run(replays.scenario.config)[0].step_s


DEPLOYMENTS = (
    Deployment(
        model="qwen3-235b-a22b", ranks=16, fields={"costs": ["trtllm", "sglang", "nccl"], "protocol": "per_rank"}
    ),
    Deployment(
        model="deepseek-v3",
        ranks=64,
        redundant_slots=64,
        fields={
            "costs": ["sglang", "trtllm"],
            "protocol": "per_expert",
            "dispatch_dtype": "fp8",
            "weights": "fp8_block",
        },
    ),
)


def decode_rows(study: Study, folder: Path) -> list[dict[str, Any]]:
    """A row for each deployment, batch and seed: the step with all experts of a token, and with a quarter of them."""
    rows = []
    for training in study.trainings:
        if training.recipe == "once_for_all":
            trained = load(training, folder)
            settings = [trained.info["key"], TOKENS_PER_RANK, _CONTEXT, TRACE_TOKENS]
            rows += kept(
                folder / "rows" / training.id / "decode.json",
                settings,
                partial(_of_model, trained, training.seed),
            )
    for deployment in DEPLOYMENTS:
        for seed in study.seeds:
            rows += kept(
                folder / "rows" / f"decode-{deployment.model}-{seed}.json",
                [repr(deployment), TOKENS_PER_RANK, _CONTEXT, _ZIPF, _SYNTHETIC_LAYERS],
                partial(_of_deployment, deployment, seed),
            )
        print(f"decode steps of {deployment.model}", file=sys.stderr, flush=True)
    return rows


def _of_model(trained: TrainedModel, seed: int) -> list[dict[str, Any]]:
    """The model's own routing, with either k, at deployed widths."""
    steps_s: dict[int, list[float]] = {}
    for top_k in (CONFIG.top_k, CONFIG.top_k // 4):
        part = Cut(top_k=top_k).leading
        trace = record(in_memory(trained, part), tokens=TRACE_TOKENS, seed=0)
        steps_s[top_k] = [
            deployed_report(
                trace, part, CONFIG.layers, tokens_per_rank=tokens, kv_tokens_per_rank=_CONTEXT * tokens
            ).step_s
            for tokens in TOKENS_PER_RANK
        ]
    return [
        _row(DEPLOYED_AS, RANKS, seed, tokens, CONFIG.top_k, whole_s, quarter_s)
        for tokens, whole_s, quarter_s in zip(TOKENS_PER_RANK, *steps_s.values(), strict=True)
    ]


def _of_deployment(deployment: Deployment, seed: int) -> list[dict[str, Any]]:
    top_k = preset(deployment.model).top_k
    return [
        _row(
            deployment.model,
            deployment.ranks,
            seed,
            tokens,
            top_k,
            deployment.step_s(top_k, tokens, seed),
            deployment.step_s(top_k // 4, tokens, seed),
        )
        for tokens in TOKENS_PER_RANK
    ]


def _row(
    model: str, ranks: int, seed: int, tokens: int, top_k: int, whole_s: float, quarter_s: float
) -> dict[str, Any]:
    return {
        "deployment": model,
        "ranks": ranks,
        "seed": seed,
        "tokens_per_rank": tokens,
        "k": top_k,
        "step_s": whole_s,
        "step_at_quarter_k_s": quarter_s,
    }

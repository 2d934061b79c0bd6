"""Every routing policy beside every other: what it keeps, what it costs in quality, and what a step of it takes.

Three deployments of the reference model's recorded routing, all 16 experts scored: its own MoE layers on two CPU ranks,
predicted and measured; at the widths of DBRX, which has as many experts and as large a top k, on 8 H100s; and beside
them a synthetic trace of DeepSeek-V3's shape on 64 H100s. Recorded traces of other models are simulated on 8 and 32
H100s, their candidates completed by a model that is fitted on earlier requests. Placements and policies stand on
earlier requests than those that are scored; losses are of text that was never recorded.

python benchmarks/policies.py [--json] [--traces FOLDER] [--plot FILE.svg] [--markdown] [--rounds N]
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from policy_cases import OURS, PUBLISHED, Case, Scope, Setting, as_model, large_scale, layers_of
from policy_plot import write_plot
from scipy.stats import spearmanr

from router.history import RoutingHistory
from router.nn.evaluate import HeldOutLoss, held_out_loss, paired_difference
from router.nn.measured_run import Deployment, MeasuredRun, RecordedLayers, measure_deployments
from router.nn.microbench import calibrate
from router.nn.output_error import measured_output_error
from router.nn.record import record
from router.nn.store import TrainedModel, reference_model
from router.prices import RoutePrices
from traces.batching import split_requests
from traces.formats.npz import import_npz
from traces.presets import preset
from traces.trace import RoutingTrace
from tuner.scenario import Windows

TOKENS = 24_576
LOSS_SEQUENCES = 128
CPU_RANKS, CPU_TOKENS = 2, 1024
GPU_RANKS, GPU_TOKENS = 8, 128
ROUNDS = 24
RESAMPLES = 2000
RISES = (0.001, 0.0025, 0.005, 0.01, 0.02)  # of the loss, nats a byte
MASSES = (0.99, 0.97, 0.95, 0.9, 0.8)
SCOPES: tuple[Scope, ...] = ("source_rank", "global")
GPT_OSS = "gptoss20b/gptoss20b_ship.npz"
FLAME = "flame_moe_290m/flame_moe_290m_prefill2048.npz"
COSTS = ["trtllm", "sglang", "nccl"]  # the first that has an operation
ROW = ("loss", "loss_ci", "loss_delta", "loss_delta_ci", "cpu_step_s", "predicted_cpu_step_s", "sim_dsv3_h100x64_s")


def measured_history(reference: TrainedModel, recorded: RoutingTrace) -> RoutingHistory:
    """Of the requests that placements are planned on, with the output errors that the model itself has there."""
    plan = split_requests(recorded, Windows().shares)[0]
    return RoutingHistory.of(plan).with_output_error(measured_output_error(reference, plan))


def settings_of(recorded: RoutingTrace, folder: Path, history: RoutingHistory) -> tuple[Setting, Setting]:
    """The reference model on two CPU ranks, calibrated now, and its routing at DBRX's widths on 8 H100s."""
    profile, _ = calibrate(recorded.model, ranks=CPU_RANKS, device="cpu")
    profile.write(folder / "profile.json")
    cpu = Setting.of(
        "reference model, 2 CPU ranks",
        recorded,
        {
            "cluster": {"device": "cpu", "ranks": CPU_RANKS},
            "costs": str(folder / "profile.json"),
            "execution": {"extent": "moe"},
            "batch": {"phase": "prefill", "tokens_per_rank": CPU_TOKENS, "steps": 4},
        },
        history=history,
    )
    dbrx = preset("dbrx")
    layer_L = layers_of(recorded.model, dbrx)
    h100 = Setting.of(
        "reference routing at DBRX's widths, 8 H100",
        as_model(recorded, dbrx),
        decode(GPU_RANKS, GPU_TOKENS, steps=4) | {"sampled_layers": recorded.model.layers},
        history=replace(
            history,
            together_LEE=history.together_LEE[layer_L],
            ratio_LQ=history.ratio_LQ[layer_L],
            output_error_LK=history.output_error_LK[layer_L],
        ),
    )
    return cpu, h100


def deepseek() -> Setting:
    """DeepSeek-V3's shape on 64 H100s, with 64 redundant experts, on synthetic routing of four layers for 58."""
    model = preset("deepseek-v3")
    ranks, tokens = 64, 128
    trace = large_scale(model, layers=4, tokens=3 * ranks * tokens, zipf=0.6, candidates=model.experts)
    return Setting.of(
        "DeepSeek-V3's shape, synthetic routing, 64 H100",
        trace,
        decode(ranks, tokens, steps=1)
        | {
            "sampled_layers": 4,
            "protocol": "per_expert",
            "dispatch_dtype": "fp8",
            "weights": "fp8_block",
            "costs": ["sglang", "trtllm"],
            "windows": {"plan": 1, "tune": 1, "validate": 1},
        },
        redundant_slots=64,
    )


def decode(ranks: int, tokens_per_rank: int, *, steps: int) -> dict[str, Any]:
    """What scenarios of decode steps on H100s have in common."""
    return {
        "cluster": {"device": "h100_sxm", "ranks": ranks},
        "costs": COSTS,
        "batch": {
            "phase": "decode",
            "tokens_per_rank": tokens_per_rank,
            "steps": steps,
            "kv_tokens_per_rank": 1024 * tokens_per_rank,
        },
        "fidelity": "analytic",
    }


def recorded_settings(folder: Path) -> dict[str, dict[int, Setting]]:
    """Traces of other models, by name and number of ranks."""
    found: dict[str, dict[int, Setting]] = {}
    for name, file, model_name, tokens in (
        ("gpt-oss-20b", GPT_OSS, "gpt-oss-20b", 32),
        ("flame-moe-290m", FLAME, "flame-moe-290m", 16),
    ):
        if not (folder / file).exists():
            print(f"{folder / file}: not there, left out", file=sys.stderr)
            continue
        trace = import_npz(folder / file, model=preset(model_name)).trace
        found[name] = {
            ranks: Setting.of(
                f"{name}, {ranks} H100, candidates completed",
                trace,
                decode(ranks, tokens, steps=4)
                | {"candidates": trace.model.experts, "weights": "bfloat16"}
                | ({} if trace.model.attention else {"execution": {"extent": "moe"}}),
            )
            for ranks in (8, 32)
        }
    return found


def reference_rows(
    reference: TrainedModel, cpu: Setting, h100: Setting, dsv3: Setting, *, rounds: int
) -> tuple[list[dict[str, Any]], MeasuredRun]:
    """Every policy on the reference model, run for real on the CPU, and simulated at scale."""
    placement, history = cpu.placement, cpu.replay.history
    assert history is not None
    layers = RecordedLayers.of(reference, cpu.replay.trace, cpu.replay.steps)
    real = [
        Deployment(
            layers=layers,
            policy=case.policy,
            placement=placement,
            replica_choice="even",
            node_of_G=cpu.replay.shared.node_of_G,
            history=history,
            prices=cpu.prices(case),
        )
        for case in cpu.cases
    ]
    measured = measure_deployments(real, calibrated=cpu.replay.trace.model, rounds=rounds, seed=0, device="cpu")
    at_scale = {case.key: case for case in h100.cases}
    larger = {case.key: case for case in dsv3.cases}
    plain = next(case for case in cpu.cases if case.parameters == {"top_k.k": reference.spec.top_k})
    base = losses_of(reference, plain, cpu, h100)
    rows = []
    for index, case in enumerate(cpu.cases):
        on_cpu, on_gpu = cpu.run(case), h100.run(at_scale[case.key])
        on_dsv3 = dsv3.run(larger[case.key])
        losses = losses_of(reference, case, cpu, h100)
        row: dict[str, Any] = {
            "id": case.id,
            "policy": case.family,
            "parameters": case.parameters,
            "activation": on_cpu.experts_per_token / reference.spec.experts,
            "gate_mass": on_cpu.gate_mass,
            "dropped_share": on_cpu.dropped_share,
            "flops_per_token": on_cpu.expert_flops_per_token,
            "cpu_step_s": measured.typical_step_s(index),
            "predicted_cpu_step_s": on_cpu.step_s,
            "sim_h100x8_s": on_gpu.step_s,
            "gate_mass_h100x8": on_gpu.gate_mass,
            "sim_dsv3_h100x64_s": on_dsv3.step_s,
            "gate_mass_dsv3": on_dsv3.gate_mass,
            "parameters_dsv3": larger[case.key].parameters,
        }
        for name, loss in losses.items():
            delta, *delta_ci = paired_difference(loss, base[name])
            row |= {name: loss.mean, f"{name}_ci": mean_ci(loss.loss_N)}
            row |= {f"{name}_delta": delta, f"{name}_delta_ci": delta_ci}
        rows.append(row)
    return rows, measured


def losses_of(reference: TrainedModel, case: Case, cpu: Setting, h100: Setting) -> dict[str, HeldOutLoss]:
    """Held-out loss in steps of the size of either deployment, at its prices."""
    history = cpu.replay.history
    assert history is not None
    return {
        "loss": loss_of(reference, case, cpu, history, cpu.prices(case)),
        "loss_h100x8": loss_of(reference, case, h100, history, h100.prices_of_simulated(case)),
    }


def loss_of(
    reference: TrainedModel, case: Case, on: Setting, history: RoutingHistory, prices: RoutePrices | None
) -> HeldOutLoss:
    """Held-out loss in steps of the deployment's size."""
    return held_out_loss(
        reference.model,
        reference.corpus,
        case.policy,
        sequences=LOSS_SEQUENCES,
        ranks=on.replays.cluster.ranks,
        tokens_per_rank=on.replays.scenario.batch.tokens_per_rank,
        history=history,
        prices=prices,
    )


def mean_ci(loss_N: NDArray[np.float64]) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean."""
    drawn = np.random.default_rng(0).integers(loss_N.size, size=(RESAMPLES, loss_N.size))
    low, high = np.quantile(loss_N[drawn].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def recorded_rows(name: str, by_ranks: Mapping[int, Setting]) -> list[dict[str, Any]]:
    """Every policy on a recorded trace of a model that is not here: no loss, no run of its own."""
    first = next(iter(by_ranks.values()))
    rows = []
    for case in first.cases:
        reports = {ranks: setting.run(case) for ranks, setting in by_ranks.items()}
        report = reports[min(reports)]
        rows.append(
            dict.fromkeys(ROW)
            | {
                "id": f"{name}/{case.id}",
                "policy": case.family,
                "parameters": case.parameters,
                "activation": report.experts_per_token / first.replay.trace.model.experts,
                "gate_mass": report.gate_mass,
                "dropped_share": report.dropped_share,
                "flops_per_token": report.expert_flops_per_token,
                "completed": first.replay.trace.completed,
            }
            | {f"sim_h100x{ranks}_s": report.step_s for ranks, report in reports.items()}
            | {f"gate_mass_h100x{ranks}": report.gate_mass for ranks, report in reports.items()}
        )
    return rows


def front_of(setting: Setting) -> dict[str, Any]:
    """Step time at equal gate mass: hardware-aware routing against each published policy.

    A deployment can mix two settings of one policy over its steps, so that times are read on the lower hull of its
    points; None where a policy never keeps so much.
    """
    compared = [case for case in setting.cases if case.family in (*PUBLISHED, OURS)]
    points: dict[str, list[tuple[float, float]]] = {}
    for case in compared:
        report = setting.run(case)
        points.setdefault(case.family, []).append((report.gate_mass, report.step_s))
    whole = next(case for case in reversed(compared) if case.family == "top_k")
    full = setting.run(whole)
    for family in points:  # each of them can be switched off
        points[family].append((full.gate_mass, full.step_s))
    at = {family: {mass: time_at(some, mass) for mass in MASSES} for family, some in points.items()}
    return {
        "setting": setting.name,
        "scope": setting.scope,
        "top_k_step_s": full.step_s,
        "points": points,
        "step_s": {family: {str(mass): value for mass, value in times.items()} for family, times in at.items()},
        "speedup_of_ours": {
            family: {str(mass): _ratio(at[family][mass], at[OURS][mass]) for mass in MASSES}
            for family in points
            if family != OURS
        },
    }


def loss_front_of(reference: TrainedModel, h100: Setting, history: RoutingHistory, scope: Scope) -> dict[str, Any]:
    """The same at equal loss, on the reference model at DBRX's widths on 8 H100s."""
    setting = replace(h100, scope=scope)
    families = {family + weights for family in (*PUBLISHED, OURS) for weights in ("", "+trained")}
    plain = next(case for case in setting.cases if case.parameters == {"top_k.k": reference.spec.top_k})
    base = loss_of(reference, plain, setting, history, None)
    full_s = setting.run(plain).step_s
    points: dict[str, list[tuple[float, float]]] = {}
    for case in setting.cases:
        if case.family in families:
            loss = loss_of(reference, case, setting, history, setting.prices_of_simulated(case))
            point = (-paired_difference(loss, base)[0], setting.run(case).step_s)
            points.setdefault(case.family, [(0.0, full_s)]).append(point)
    at = {family: {rise: time_at(some, -rise) for rise in RISES} for family, some in points.items()}
    return {
        "setting": h100.name,
        "scope": scope,
        "top_k_step_s": full_s,
        "loss_rise_and_step_s": {family: [(-less, s) for less, s in some] for family, some in points.items()},
        "step_s": {family: {str(rise): value for rise, value in times.items()} for family, times in at.items()},
    }


def time_at(points: Sequence[tuple[float, float]], mass: float) -> float | None:
    """The least time at which a mix of two settings keeps `mass`, from (gate mass, seconds) of each."""
    times = [seconds for kept, seconds in points if kept >= mass]
    for kept, seconds in points:
        for more, longer in points:
            if kept < mass < more:
                times.append(seconds + (longer - seconds) * (mass - kept) / (more - kept))
    return min(times, default=None)


def _ratio(theirs: float | None, ours: float | None) -> float | None:
    return None if theirs is None or ours is None else theirs / ours


def rank_order(rows: Sequence[Mapping[str, Any]], measured: MeasuredRun) -> dict[str, Any]:
    """Does the simulator order policies as the real run does? Beside it, how far two halves of the real run agree."""
    ours = [row for row in rows if row["cpu_step_s"] is not None]
    predicted_N = np.array([row["predicted_cpu_step_s"] for row in ours])
    measured_N = np.array([row["cpu_step_s"] for row in ours])
    halves = [
        np.array([np.median(measured.step_s_RJ[part::2, index]) for index in range(len(ours))]) for part in (0, 1)
    ]
    random = np.random.default_rng(0)
    drawn = [random.integers(len(ours), size=len(ours)) for _ in range(RESAMPLES)]
    low, high = np.nanquantile([spearmanr(predicted_N[d], measured_N[d]).statistic for d in drawn], (0.025, 0.975))
    loss_N = np.array([row["loss"] for row in ours])
    return {
        "policies": len(ours),
        "spearman": float(spearmanr(predicted_N, measured_N).statistic),
        "spearman_ci": [float(low), float(high)],
        "halves_of_the_real_run": float(spearmanr(*halves).statistic),
        "mape": float(np.abs(predicted_N / measured_N - 1).mean()),
        "gate_mass_against_loss": float(spearmanr([-row["gate_mass"] for row in ours], loss_N).statistic),
    }


def tables(result: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The rows and the comparison at equal gate mass, for reading."""
    head = ["policy", "activation", "gate mass", "loss change", "CPU ms", "predicted", "8 H100 ms", "64 H100 ms"]
    lines = [
        [
            row["id"],
            f"{row['activation']:.3f}",
            f"{row['gate_mass']:.3f}",
            "" if row.get("loss_delta") is None else f"{row['loss_delta']:+.4f}",
            *(_ms(row.get(name)) for name in ("cpu_step_s", "predicted_cpu_step_s", "sim_h100x8_s")),
            _ms(row.get("sim_dsv3_h100x64_s")),
        ]
        for row in result["rows"]
    ]
    text = [_table(head, lines, markdown=markdown)]
    for front in result["fronts"]:
        text.append(f"{front['setting']}, scope {front['scope']}: top-k {_ms(front['top_k_step_s'])} ms")
        rows = [
            [family, *("–" if value is None else f"{value:.2f}" for value in by_mass.values())]
            for family, by_mass in front["speedup_of_ours"].items()
        ]
        text.append(_table(["hardware-aware faster than", *map(str, MASSES)], rows, markdown=markdown))
    for front in result["loss_fronts"]:
        text.append(f"{front['setting']}, scope {front['scope']}: top-k {_ms(front['top_k_step_s'])} ms")
        rows = [[family, *(_ms(value) or "–" for value in by.values())] for family, by in front["step_s"].items()]
        text.append(_table(["ms where the loss rises by", *map(str, RISES)], rows, markdown=markdown))
    order = result["rank_order"]
    text.append(", ".join(f"{name} {value}" for name, value in order.items()))
    return "\n\n".join(text)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool) -> str:
    if markdown:
        lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]
        return "\n".join(lines)
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (head, *rows)
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--markdown", action="store_true", help="tables for a page")
    parser.add_argument("--traces", type=Path, help="folder of recorded traces of other models")
    parser.add_argument("--plot", type=Path, help="an SVG file to draw into")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="times that each policy runs for real")
    return parser.parse_args()


def main() -> None:
    options = _options()
    reference = reference_model()
    recorded = record(reference, tokens=TOKENS, seed=0)
    history = measured_history(reference, recorded)
    with tempfile.TemporaryDirectory() as folder:
        cpu, h100 = settings_of(recorded, Path(folder), history)
        dsv3 = deepseek()
        rows, measured = reference_rows(reference, cpu, h100, dsv3, rounds=options.rounds)
        assert cpu.replay.history is not None
        loss_fronts = [loss_front_of(reference, h100, cpu.replay.history, scope) for scope in SCOPES]
    order = rank_order(rows, measured)
    settings = [h100, dsv3]
    if options.traces is not None:
        for name, by_ranks in recorded_settings(options.traces).items():
            rows += recorded_rows(name, by_ranks)
            settings += by_ranks.values()
    fronts = [front_of(replace(setting, scope=scope)) for setting in settings for scope in SCOPES]
    result = {"rows": rows, "fronts": fronts, "loss_fronts": loss_fronts, "rank_order": order}
    if options.plot is not None:
        write_plot(options.plot, result)
    print(json.dumps(result) if options.json else tables(result, markdown=options.markdown))


if __name__ == "__main__":
    main()

"""Predictions beside what others have published: every case of `published.yaml`, none left out.

A group is a function from a case to its rows. Nothing is fitted to what it is compared with: kernels come from the
measured tables, settings and assumptions from the case.

python benchmarks/published.py [--json | --markdown] [--group NAME]
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from published_signs import SIGNS
from published_steps import Drawing, Step, dispatch_of, step_of

from cost_models.cluster import gpu_cluster
from cost_models.crossval import take
from cost_models.devices import DEVICES
from cost_models.kernel_costs import KernelCosts
from cost_models.kernel_fit import Fit, fit_kernel
from cost_models.kernels.token_traffic import copies_of_a_token, row_bytes
from cost_models.ops import TokenExchange
from cost_models.tables import Part, find_tables, read_parts
from cost_models.traffic import Traffic
from cost_models.units import GB, US

HERE = Path(__file__).parent
CASES = HERE / "published.yaml"
TABLES = HERE.parent / "cost_models" / "data"

Case = dict[str, Any]
Row = dict[str, Any]


def row(case: Case, published: float, predicted: float, unit: str, **more: Any) -> Row:
    """A prediction beside its figure, both in `unit`, and what `more` is shown with it.

    `ape` is their absolute relative error. `score`: whether that counts, or only the side of 1 on which a ratio lies;
    `sign_right`: whether it lies on the published one, None where no ratio is published that has a side.
    """
    gains = case.get("sign")
    return {
        "id": case["id"],
        "group": case["group"],
        "published": float(published),
        "predicted": float(predicted),
        "ape": abs(float(predicted) / float(published) - 1),
        "unit": unit,
        "scored": case["scored"],
        "score": case.get("score", "ape"),
        "sign_right": None if gains is None else bool(predicted > 1 if gains == "gain" else predicted < 1),
        **more,
    }


# DeepEP


def deepep(case: Case, file: Case) -> list[Row]:
    """One exchange, in microseconds; printed bandwidths as the time that they stand for."""
    given = case["inputs"]
    exchange = deepep_exchange(given)
    costs = deepep_costs(given["device"], given["ranks"])
    predicted_us = float(costs.seconds(exchange)) / US
    return [row(case, deepep_published_us(case), predicted_us, "us")]


def deepep_exchange(given: Case) -> TokenExchange:
    """The exchange of DeepEP's own test: even choice, or traffic by hand where tokens keep to some of the nodes."""
    tokens, ranks, nodes = given["tokens_per_rank"], given["ranks"], given["nodes"]
    traffic = None
    if given["mode"] == "normal" and nodes > given["topk_groups"]:
        node_copies, rank_copies = copies_of_a_token(
            given["experts"], given["top_k"], ranks, nodes, given["topk_groups"]
        )
        traffic = Traffic.of(
            np.full((ranks, ranks), tokens * rank_copies / ranks),
            nodes=nodes,
            node_rows_XGN=np.full((ranks, nodes), tokens * node_copies / nodes),
        )
    return TokenExchange(
        tokens_X=np.array(tokens),
        hidden=given["hidden"],
        top_k=given["top_k"],
        experts=given["experts"],
        ranks_X=np.array(ranks),
        nodes_X=np.array(nodes),
        direction=given["direction"],
        mode=given["mode"],
        dtype=given["dtypes"]["dispatch"],
        sms_X=given.get("sms", 0),
        traffic=traffic,
    )


def deepep_published_us(case: Case) -> float:
    """What the case publishes as microseconds.

    GB/s count a token once for each destination node, the own one too (`rdma`), or for each rank (`nvlink`).
    """
    given, published = case["inputs"], case["published"]
    if published["unit"] == "us":
        return float(published["value"])
    copies = copies_of_a_token(given["experts"], given["top_k"], given["ranks"], given["nodes"], given["topk_groups"])
    a_row = float(row_bytes(given["hidden"], given["dtypes"]["dispatch"], given["direction"]))
    counted_bytes = given["tokens_per_rank"] * copies[0 if given["counted"] == "rdma" else 1] * a_row
    return float(counted_bytes / (published["value"] * GB) / US)


@cache
def deepep_costs(device: str, ranks: int) -> KernelCosts:
    return KernelCosts.shipped(gpu_cluster(DEVICES[device], ranks), "sglang")


# EPLB's gain on one expert kernel


def eplb_kernel(case: Case, file: Case) -> list[Row]:
    """Time of the skewed load over time of the load that EPLB placed, by a fit that saw no row with EPLB."""
    given = case["inputs"]
    part, fit = fit_without_eplb(given["device"])
    skewed = f"power_law_{file['skew']['exponent']}"
    shape = {
        "num_tokens": given["tokens"],
        "topk": given["top_k"],
        "num_experts": given["experts"],
        "num_slots": given["experts"] + given["redundant_slots"],
        "moe_ep_size": given["ranks"],
        "moe_tp_size": 1,
        "hidden_size": given["hidden"],
        "inter_size": given["expert_hidden"],
        "kernel_source": "wideep_compute_cutlass",
    }
    columns = {name: np.array([value, value]) for name, value in shape.items()}
    columns["distribution"] = np.array([skewed, f"{skewed}_eplb"])  # how it is drawn, and how EPLB then places it
    description = part.kind.kernel.describe_table(columns, op=part.op, dtype=part.dtype, device=part.device)
    skewed_s, placed_s = fit.predict(description)[0]
    return [row(case, case["published"]["value"], skewed_s / placed_s, "x")]


@cache
def fit_without_eplb(gpu: str) -> tuple[Part, Fit]:
    """TensorRT-LLM's wide-EP experts, fitted to the rows without EPLB."""
    file = next(file for file in find_tables(TABLES) if file.name == f"{gpu}_moe_wideep_trtllm")
    (part,) = read_parts(file)
    kept_N = ~np.char.endswith(part.columns["distribution"].astype(str), "_eplb")
    fit = fit_kernel(take(part.describe(), kept_N), part.seconds_N[kept_N], boosting=part.kind.kernel.boosting)
    return part, fit


# End to end


def end_to_end(case: Case, file: Case) -> list[Row]:
    """Tokens/s of a node of 8 GPUs, or of one, as the case counts them; with EPLB also after a drift of loads."""
    unit = case["published"]["unit"]
    ranks = {"tokens/s per node": 8, "tokens/s per GPU": 1}[unit]
    given, drawing = case["inputs"], Drawing.of(file)
    more = {}
    if given["placement"] == "eplb":
        more["with_drift"] = ranks * step_of(given, replace(drawing, drift=file["drift"])).tokens_per_s
    return [row(case, case["published"]["value"], ranks * step_of(given, drawing).tokens_per_s, unit, **more)]


# Ratios: with over without


def ratio(case: Case, file: Case) -> list[Row]:
    """Throughput with what the case is about over the throughput without it; of EPLB also over the range of skews."""
    drawing = Drawing.of(file)
    predicted = _gain(case["inputs"], drawing)
    more = {}
    if case["id"].startswith("eplb-"):
        more["range"] = {str(at): _gain(case["inputs"], replace(drawing, exponent=at)) for at in file["skew_range"]}
    return [row(case, case["published"]["value"], predicted, "x", **more)]


def _gain(given: Case, drawing: Drawing) -> float:
    without = {**given, **given["without"]}
    if "direction" in given:  # an exchange, not a step
        return _dispatch_s(without, drawing) / _dispatch_s(given, drawing)
    steps: list[Step] = [step_of(one, drawing) for one in (given, without)]
    return steps[0].tokens_per_s / steps[1].tokens_per_s


def _dispatch_s(given: Case, drawing: Drawing) -> float:
    return float(deepep_costs(given["device"], given["ranks"]).seconds(dispatch_of(given, drawing)).mean())


# Signs


def sign(case: Case, file: Case) -> list[Row]:
    """The ratio of a small simulation that tests the claim."""
    predicted = SIGNS[case["id"]](case["inputs"], Drawing.of(file))
    return [row(case, case["published"]["value"], predicted, "x")]


GROUPS: dict[str, Callable[[Case, Case], list[Row]]] = {
    "deepep": deepep,
    "end_to_end": end_to_end,
    "ratios": ratio,
    "eplb_kernels": eplb_kernel,
    "signs": sign,
}


def read_cases(path: Path = CASES) -> Case:
    """The data file as it stands."""
    file: Case = yaml.safe_load(path.read_text(encoding="utf-8"))
    return file


def predict(file: Case, only: str | None = None) -> list[Row]:
    """The rows of every case, or of one group's, in the order of the file."""
    rows = []
    for case in file["cases"]:
        if only in (None, case["group"]):
            rows += GROUPS[case["group"]](case, file)
    return rows


def summary(rows: list[Row]) -> dict[str, Any]:
    """The rows; of each group how many are scored by their error and its median, and how many signs are right."""

    def median_ape(some: list[Row]) -> float | None:
        return float(np.median([r["ape"] for r in some])) if some else None

    scored = [r for r in rows if r["scored"]]
    by_error = [r for r in scored if r["score"] == "ape"]
    groups = {}
    for group in dict.fromkeys(r["group"] for r in rows):
        of_group = [r for r in by_error if r["group"] == group]
        right = [r["sign_right"] for r in scored if r["group"] == group and r["sign_right"] is not None]
        groups[group] = {
            "n": len(of_group),
            "median_ape": median_ape(of_group),
            "signs_right": f"{sum(right)} of {len(right)}",
        }
    return {"cases": rows, "groups": groups, "median_ape": median_ape(by_error)}


def as_text(document: dict[str, Any]) -> str:
    """A line for each row and each group."""
    lines = [
        f"{r['id']:36} {r['published']:10.4g} {r['predicted']:10.4g} {r['unit']:20} {_error(r):+7.1%} {_scored(r)}"
        for r in document["cases"]
    ]
    return "\n".join([*lines, *(f"{group}: {_of_group(found)}" for group, found in document["groups"].items())])


def as_markdown(document: dict[str, Any]) -> str:
    """The tables of `docs/published.md`, one a group, with every row."""
    parts = []
    for group, found in document["groups"].items():
        aside = {"end_to_end": ["with drift"], "ratios": ["skew 0.6 to 1.2"]}.get(group, [])
        lines = [
            ["case", "published", "predicted", "error", "scored", *aside],
            ["---", "---:", "---:", "---:", "---", *["---:" for _ in aside]],
        ]
        for r in document["cases"]:
            if r["group"] == group:
                figures = [f"{_figure(r['published'])} {r['unit']}", _figure(r["predicted"]), f"{_error(r):+.1%}"]
                lines.append([r["id"], *figures, _scored(r), *[_aside(r) for _ in aside]])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"**{group}**: {_of_group(found)}.\n\n{table}")
    return "\n\n".join(parts)


def _aside(r: Row) -> str:
    if "with_drift" in r:
        return f"{_figure(r['with_drift'])} ({r['with_drift'] / r['published'] - 1:+.1%})"
    return " to ".join(f"{x:.2f}" for x in r.get("range", {}).values())


def _error(r: Row) -> float:
    return float(r["predicted"] / r["published"] - 1)


def _scored(r: Row) -> str:
    if not r["scored"]:
        return "no"
    sign = "" if r["sign_right"] is None else "sign right" if r["sign_right"] else "sign WRONG"
    return sign if r["score"] == "sign" else ", ".join(filter(None, ["error", sign]))


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 100 else f"{value:.4g}"


def _of_group(found: dict[str, Any]) -> str:
    error = f"{found['n']} scored by their error, median {found['median_ape']:.1%}" if found["n"] else ""
    signs = f"signs right {found['signs_right']}" if not found["signs_right"].endswith(" 0") else ""
    return "; ".join(filter(None, [error, signs]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="one JSON document on standard output")
    how.add_argument("--markdown", action="store_true", help="the tables of docs/published.md")
    parser.add_argument("--group", choices=list(GROUPS), help="this group alone")
    parser.add_argument("--pace", type=float, help="of kernels and collectives beside one another; 1: undisturbed")
    options = parser.parse_args()
    file = read_cases()
    if options.pace is not None:
        for case in file["cases"]:
            case["inputs"]["pace"] = options.pace
    document = summary(predict(file, options.group))
    if options.json:
        print(json.dumps(document, indent=2))
    else:
        print(as_markdown(document) if options.markdown else as_text(document))


if __name__ == "__main__":
    main()

"""The tables of `elastic.py`, for reading or, in Markdown, for a page."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from elastic_claims import CLOSE, Results, interval, own_top_k
from elastic_rows import CUT_RECIPES, K_CURVE, SHARES, Cut, Row
from elastic_trainings import CONFIG, SHAPES

from router.elastic import RECIPES

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def tables(result: Mapping[str, Any], *, markdown: bool = False) -> str:
    """All of them, each under a line that says what it shows."""
    results = Results(result["rows"], result["decode"])
    found = (
        _k_curve(results),
        _rises(results),
        _parts(results),
        _smallest(results),
        _domains(results),
        _decode(results),
        _claims(result["claims"]),
    )
    return "\n\n".join(f"{title}\n\n{_table(head, lines, markdown=markdown)}" for title, head, lines in found)


def _k_curve(results: Results) -> Table:
    rows = [
        [
            recipe,
            *(f"{_mean([results.loss(recipe, seed, Cut(top_k=k)) for seed in results.seeds]):.4f}" for k in K_CURVE),
        ]
        for recipe in RECIPES
    ]
    return "Loss, nats a byte, by experts a token; the mean over seeds", ["recipe", *map(str, K_CURVE)], rows


def _rises(results: Results) -> Table:
    rows = [
        [recipe, *(_percent(results.rise(recipe, k)) if k != own_top_k(recipe) else "0" for k in K_CURVE)]
        for recipe in RECIPES
    ]
    return "The same, against the recipe's own loss at the k it trains with", ["recipe", *map(str, K_CURVE)], rows


def _parts(results: Results) -> Table:
    rows = []
    for depth, experts, top_k in SHAPES:
        cut = Cut(depth=depth, experts=experts, top_k=top_k)
        row = results.row("once_for_all", results.seeds[0], cut)
        by_reap = Cut(depth=depth, experts=experts, top_k=top_k, by="reap")
        has_reap = experts < CONFIG.experts
        rows.append(
            [
                cut.name,
                f"{row['active_share']:.1%}",
                f"{row['total_share']:.1%}",
                f"{row['flops_per_token'] / 1e6:.2f}",
                _ms(row["cpu_step_s"]),
                _ms(row["sim_h100x8_s"]),
                *(
                    f"{_mean([results.loss(recipe, seed, cut) for seed in results.seeds]):.4f}"
                    for recipe in ("alone", "once_for_all", "plain")
                ),
                _percent(results.change(("once_for_all", cut), ("alone", cut))),
                _percent(results.change(("once_for_all", by_reap), ("alone", cut))) if has_reap else "",
            ]
        )
    head = ["part", "active", "total", "MFLOPs a token", "CPU ms", "8 H100 ms", "loss alone", "once_for_all", "plain"]
    title = "Parts of once_for_all and of plain, and the same shapes trained alone"
    return title, [*head, "once_for_all over alone", "experts by REAP"], rows


def _smallest(results: Results) -> Table:
    rows = []
    for recipe in CUT_RECIPES:
        for share in ("active_share", "total_share"):
            for seed in results.seeds:
                row, whole = results.smallest(recipe, seed, share), results.row(recipe, seed, Cut())
                rows.append(
                    [
                        recipe,
                        share.removesuffix("_share"),
                        str(seed),
                        row["id"].split("/")[1],
                        f"{row['active_share']:.1%}",
                        f"{row['total_share']:.1%}",
                        f"{row['record_loss'] / whole['record_loss'] - 1:+.2%}",
                        f"{row['loss'] / whole['loss'] - 1:+.2%}",
                        f"{whole['sim_h100x8_s'] / row['sim_h100x8_s']:.2f}",
                    ]
                )
    head = [
        "recipe",
        "least of",
        "seed",
        "part",
        "active",
        "total",
        "loss, chosen by",
        "loss, other text",
        "8 H100 faster",
    ]
    return (
        f"The smallest part within {CLOSE:.0%} of the whole model, chosen on other text than it is judged on",
        head,
        rows,
    )


def _domains(results: Results) -> Table:
    rows = []
    for recipe in CUT_RECIPES:
        for share in SHARES:
            experts = round(share * CONFIG.experts)
            pairs = [results.mean_in_and_out(recipe, seed, experts) for seed in results.seeds]
            row, whole = (results.row(recipe, results.seeds[0], cut) for cut in (Cut(experts=experts), Cut()))
            in_whole = [
                _mean(
                    [
                        results.row(recipe, seed, Cut(experts=experts, domain=domain))["loss_by_domain"][domain]
                        / results.row(recipe, seed, Cut())["loss_by_domain"][domain]
                        - 1
                        for domain in results.domains
                    ]
                )
                for seed in results.seeds
            ]
            rows.append(
                [
                    recipe,
                    f"{share:.0%}",
                    _percent([inside for inside, _ in pairs]),
                    _percent([outside for _, outside in pairs]),
                    _percent(in_whole),
                    f"{1 - row['bytes'] / whole['bytes']:.0%}",
                    f"{1 - row['sim_rank_bytes'] / whole['sim_rank_bytes']:.0%}",
                    f"{1 - row['sim_h100x8_s'] / whole['sim_h100x8_s']:.1%}",
                ]
            )
    head = ["recipe", "experts", "loss inside", "outside", "inside, over the whole model"]
    title = "Experts kept for one domain, against as many kept for all text"
    return title, [*head, "bytes saved", "of a GPU's memory", "of a step on 8 H100"], rows


def _decode(results: Results) -> Table:
    rows = []
    for deployment, tokens in dict.fromkeys((row["deployment"], row["tokens_per_rank"]) for row in results.decode):
        of_it = [row for row in results.decode if (row["deployment"], row["tokens_per_rank"]) == (deployment, tokens)]
        k = of_it[0]["k"]
        rows.append(
            [
                deployment,
                str(of_it[0]["ranks"]),
                str(tokens),
                f"{k} to {k // 4}",
                _ms(_mean([row["step_s"] for row in of_it])),
                _ms(_mean([row["step_at_quarter_k_s"] for row in of_it])),
                _percent([row["step_s"] / row["step_at_quarter_k_s"] - 1 for row in of_it]),
            ]
        )
    head = ["deployment", "H100", "streams a GPU", "k", "ms", "ms at a quarter", "faster"]
    return "Simulated decode steps with a quarter of the experts a token", head, rows


def _claims(claims: Sequence[Row]) -> Table:
    rows = [
        [
            claim["id"],
            claim["claim"],
            f"{claim['measured']:.2%}",
            "" if claim["ci"] is None else "{:.2%} to {:.2%}".format(*claim["ci"]),
            claim["bound"],
            claim["verdict"],
        ]
        for claim in claims
    ]
    return "Claims", ["id", "claim", "measured", "95%", "bound", "verdict"], rows


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _percent(values: Sequence[float]) -> str:
    """The mean and half of its interval."""
    ci = interval(values)
    return f"{_mean(values):+.2%}" if ci is None else f"{_mean(values):+.2%} ± {(ci[1] - ci[0]) / 2:.2%}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool) -> str:
    if markdown:
        return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *rows)
    )

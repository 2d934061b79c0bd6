"""What the sources of the recipes say, held against the rows of the elastic study.

A claim bounds a quantity that each seed gives once, from models of one seed. Its interval is Student's, 95%, over those
values. *Reproduced*: the interval is on the claimed side of the bound; *not reproduced*: it is wholly on the other;
else, and always with a single seed, *not resolved*. Nothing corrects for there being many claims. Differences of loss
are shares of the loss that is compared with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from elastic_rows import CUT_RECIPES, K_CURVE, SHARES, Cut, Row
from elastic_trainings import CONFIG, SHAPES
from scipy.stats import t as student

from router.elastic import RECIPES, make_recipe

CLOSE = 0.01  # of the loss: what the study calls close, fixed before any model was trained
SOURCE_ACTIVE, SOURCE_TOTAL, SOURCE_GAIN = 0.537, 0.358, 0.15  # ERNIE 5.0, arXiv 2602.04705
_EMOE, _MATRYOSHKA, _ERNIE = "arXiv 2509.21892", "arXiv 2509.26520", "arXiv 2602.04705"
_CONFIDENCE = 0.95
Side = Literal["at most", "less than", "more than"]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's interval of the mean; None of a single value."""
    if len(values) < 2:
        return None
    half = student.ppf(0.5 + _CONFIDENCE / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values) - half), float(np.mean(values) + half)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """`claim`: a sentence about a quantity, of which `values` were measured; `source`: who says so ('': we ask)."""

    id: str
    claim: str
    source: str
    values: tuple[float, ...]
    bound: float
    side: Side = "at most"
    seeds: int

    @property
    def verdict(self) -> str:
        """By the interval alone."""
        ci = interval(self.values)
        if ci is None or self.seeds < 2:
            return "not resolved"
        low, high = ci
        holds, fails = {
            "at most": (high <= self.bound, low > self.bound),
            "less than": (high < self.bound, low >= self.bound),
            "more than": (low > self.bound, high <= self.bound),
        }[self.side]
        return "reproduced" if holds else "not reproduced" if fails else "not resolved"

    def to_json(self) -> dict[str, Any]:
        """With the mean of the values as `measured`."""
        ci = interval(self.values)
        return {
            "id": self.id,
            "claim": self.claim,
            "source": self.source,
            "measured": float(np.mean(self.values)),
            "ci": None if ci is None else list(ci),
            "bound": f"{self.side} {self.bound:g}",
            "values": list(self.values),
            "verdict": self.verdict,
        }


class Results:
    """The rows of a study by what they are of."""

    def __init__(self, rows: Sequence[Row], decode: Sequence[Row]) -> None:
        self._by_id = {row["id"]: row for row in rows}
        self.rows, self.decode = rows, decode
        self.seeds = sorted({row["seed"] for row in rows})

    def row(self, recipe: str, seed: int, cut: Cut) -> Row:
        """A cut of the model of a recipe and seed, or the model of that shape that was trained alone (`alone`)."""
        model = f"alone-{cut.name}-{seed}" if recipe == "alone" else f"{recipe}-{seed}"
        return self._by_id[f"{model}/{cut.name}"]

    def loss(self, recipe: str, seed: int, cut: Cut) -> float:
        """Its loss, nats a byte."""
        return float(self.row(recipe, seed, cut)["loss"])

    def change(self, of: tuple[str, Cut], to: tuple[str, Cut]) -> list[float]:
        """How much larger the loss of one is than that of another, as a share of the latter, by seed."""
        return [self.loss(of[0], seed, of[1]) / self.loss(to[0], seed, to[1]) - 1 for seed in self.seeds]

    def rise(self, recipe: str, top_k: int) -> list[float]:
        """The change of loss from the k that the recipe trains with to another, by seed."""
        return self.change((recipe, Cut(top_k=top_k)), (recipe, Cut(top_k=own_top_k(recipe))))

    def parts(self, recipe: str, seed: int) -> list[Row]:
        """All parts of a model that are chosen by gate mass on all text."""
        return [
            row
            for row in self.rows
            if (row["recipe"], row["seed"], row["by"], row["domain"]) == (recipe, seed, "gate_mass", None)
        ]

    def smallest(self, recipe: str, seed: int, share: str) -> Row:
        """Of the parts that are close to the whole model on the text parts are chosen by, the one of least `share`."""
        limit = (1 + CLOSE) * self.row(recipe, seed, Cut())["record_loss"]
        close = [row for row in self.parts(recipe, seed) if row["record_loss"] <= limit]
        return min(close, key=lambda row: (row[share], row["record_loss"]))

    def best_within(self, recipe: str, seed: int, active: float, total: float) -> Row:
        """Of the parts of at most these shares of parameters, the best on the text that parts are chosen by."""
        small = [
            row for row in self.parts(recipe, seed) if row["active_share"] <= active and row["total_share"] <= total
        ]
        return min(small, key=lambda row: row["record_loss"])

    def in_and_out(self, recipe: str, seed: int, experts: int, domain: str) -> tuple[float, float]:
        """The changes of loss inside a domain and outside, when its own experts are kept and not the best overall."""
        own, overall = (
            self.row(recipe, seed, Cut(experts=experts, domain=of))["loss_by_domain"] for of in (domain, None)
        )
        out = [name for name in own if name != domain]
        return own[domain] / overall[domain] - 1, sum(own[n] for n in out) / sum(overall[n] for n in out) - 1

    def mean_in_and_out(self, recipe: str, seed: int, experts: int) -> tuple[float, float]:
        """The means of `in_and_out` over domains, which share a model and so are no independent values."""
        inside, outside = zip(*(self.in_and_out(recipe, seed, experts, domain) for domain in self.domains), strict=True)
        return float(np.mean(inside)), float(np.mean(outside))

    @property
    def domains(self) -> list[str]:
        """Of the text."""
        return list(self.row("plain", self.seeds[0], Cut())["loss_by_domain"])


def own_top_k(recipe: str) -> int:
    """The k that a recipe trains with."""
    return make_recipe(recipe).own_top_k(CONFIG)


def claims(results: Results) -> list[Claim]:
    """All of them."""
    found: list[Claim] = []

    def add(id: str, claim: str, source: str, values: Sequence[float], bound: float, side: Side = "at most") -> None:
        seeds = len(results.seeds)
        found.append(
            Claim(id=id, claim=claim, source=source, values=tuple(values), bound=bound, side=side, seeds=seeds)
        )

    for group in (_emoe, _matryoshka, _flatness, _once_for_all, _decode, _domains):
        group(results, add)
    return found


Add = Callable[..., None]


def _emoe(results: Results, add: Add) -> None:
    k, whole = CONFIG.top_k, Cut()
    for times in (2, 3):
        rise, plain = results.rise("emoe", times * k), results.rise("plain", times * k)
        add(f"emoe_{times}k", f"emoe: no more loss at {times}k experts than at the k it trained with", _EMOE, rise, 0)
        less = [ours - theirs for ours, theirs in zip(rise, plain, strict=True)]
        add(
            f"emoe_{times}k_vs_plain",
            f"emoe: loss rises less from k to {times}k than plain's",
            _EMOE,
            less,
            0,
            "less than",
        )
    add("emoe_at_k", "emoe: no more loss at k than plain", _EMOE, results.change(("emoe", whole), ("plain", whole)), 0)
    doubled = Cut(top_k=2 * k)
    add(
        "emoe_vs_larger_k",
        "emoe at 2k: no more loss than training with 2k on as many FLOPs",
        _EMOE,
        results.change(("emoe", doubled), ("larger_k", doubled)),
        0,
    )


def _matryoshka(results: Results, add: Add) -> None:
    specialists = {1: "alone", 2: "alone", CONFIG.top_k: "plain", 2 * CONFIG.top_k: "larger_k"}
    for top_k, specialist in specialists.items():
        cut = Cut(top_k=top_k)
        beyond = ", one more than it ever trained with," if top_k >= 2 * CONFIG.top_k else ""
        add(
            f"matryoshka_k{top_k}",
            f"matryoshka at k {top_k}{beyond} is within {CLOSE:.0%} of a model trained at that k",
            _MATRYOSHKA,
            results.change(("matryoshka", cut), (specialist, cut)),
            CLOSE,
        )


def _flatness(results: Results, add: Add) -> None:
    for recipe in RECIPES:
        for top_k, where, experts in ((3 * own_top_k(recipe), "3k", "3k experts"), (1, "1", "one expert")):
            if top_k not in K_CURVE:
                continue  # larger_k has not three times its k
            add(
                f"flat_{recipe}_{where}",
                f"{recipe}: the loss with {experts} a token is within {CLOSE:.0%} of that with k",
                "",
                results.rise(recipe, top_k),
                CLOSE,
            )


def _once_for_all(results: Results, add: Add) -> None:
    recipe = "once_for_all"
    for shape in SHAPES:
        depth, experts, top_k = shape
        cut = Cut(depth=depth, experts=experts, top_k=top_k)
        add(
            f"{recipe}_{cut.name}",
            f"once_for_all cut to {cut.name} is within {CLOSE:.0%} of that shape trained alone",
            "",
            results.change((recipe, cut), ("alone", cut)),
            CLOSE,
        )
    add(
        f"{recipe}_whole",
        f"once_for_all, whole, is within {CLOSE:.0%} of plain",
        _ERNIE,
        results.change((recipe, Cut()), ("plain", Cut())),
        CLOSE,
    )
    whole = [results.loss(recipe, seed, Cut()) for seed in results.seeds]
    within = [results.best_within(recipe, seed, SOURCE_ACTIVE, SOURCE_TOTAL) for seed in results.seeds]
    add(
        f"{recipe}_source_shares",
        f"once_for_all: with at most {SOURCE_ACTIVE:.1%} of active and {SOURCE_TOTAL:.1%} of all parameters, the loss "
        f"is within {CLOSE:.0%} of the whole model's",
        _ERNIE,
        [row["loss"] / loss - 1 for row, loss in zip(within, whole, strict=True)],
        CLOSE,
    )
    for share, bound in (("active_share", SOURCE_ACTIVE), ("total_share", SOURCE_TOTAL)):
        name = share.removesuffix("_share")
        least = [results.smallest(recipe, seed, share) for seed in results.seeds]
        plain = [results.smallest("plain", seed, share) for seed in results.seeds]
        add(
            f"{recipe}_least_{name}",
            f"once_for_all: {bound:.1%} of {name} parameters are enough for a loss within {CLOSE:.0%} of the whole's",
            _ERNIE,
            [row[share] for row in least],
            bound,
        )
        add(
            f"{recipe}_least_{name}_loss",
            f"once_for_all: the part chosen so is within {CLOSE:.0%} on text that it was not chosen by",
            "",
            [row["loss"] / loss - 1 for row, loss in zip(least, whole, strict=True)],
            CLOSE,
        )
        add(
            f"{recipe}_least_{name}_vs_plain",
            f"once_for_all: fewer {name} parameters than plain needs to stay within {CLOSE:.0%} of itself",
            "",
            [ours[share] - theirs[share] for ours, theirs in zip(least, plain, strict=True)],
            0,
            "less than",
        )


def _decode(results: Results, add: Add) -> None:
    for deployment, tokens in dict.fromkeys((row["deployment"], row["tokens_per_rank"]) for row in results.decode):
        of_it = [row for row in results.decode if (row["deployment"], row["tokens_per_rank"]) == (deployment, tokens)]
        add(
            f"decode_{deployment}_{tokens}",
            f"a quarter of k decodes over {SOURCE_GAIN:.0%} faster: {deployment} on {of_it[0]['ranks']} H100, "
            f"{tokens} streams a GPU, simulated",
            _ERNIE,
            [row["step_s"] / row["step_at_quarter_k_s"] - 1 for row in of_it],
            SOURCE_GAIN,
            "more than",
        )


def _domains(results: Results, add: Add) -> None:
    for recipe in CUT_RECIPES:
        for share in SHARES:
            experts = round(share * CONFIG.experts)
            inside, outside = zip(
                *(results.mean_in_and_out(recipe, seed, experts) for seed in results.seeds), strict=True
            )
            add(
                f"domain_{recipe}_{share:.0%}_in",
                f"{recipe}, {share:.0%} of the experts: a domain's own have less loss in it than the best overall",
                "",
                inside,
                0,
                "less than",
            )
            add(
                f"domain_{recipe}_{share:.0%}_out",
                f"{recipe}, {share:.0%} of the experts: outside their domain they are within {CLOSE:.0%} of the best "
                "overall",
                "",
                outside,
                CLOSE,
            )

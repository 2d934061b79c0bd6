"""What `moeroute place` says to people: the figures before and after, all that was tried, and the verdict."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cost_models.units import human_seconds
from moeroute.cli.console import print_table

if TYPE_CHECKING:
    from tuner.placing.answer import Answer, Balance, Steps
    from tuner.placing.gain import Gain

_TIERS = {"scale_up": "inside nodes", "scale_out": "between nodes"}
_PARTS = ("experts", "dispatch", "combine", "waiting")


def print_answer(answer: "Answer") -> None:
    """The answer as tables, the notes, and last the verdict."""
    after, steps = answer.after, answer.steps
    layers = f"{after.layers} layer{'s' if after.layers > 1 else ''}"
    what = f"{layers} of {after.experts} experts in {after.slots} slots on {after.ranks} ranks"
    rows = [_balance("balancedness, tokens", answer.tokens)]
    if answer.active is not None:
        rows.append(_balance("balancedness, active experts", answer.active))
    if steps is not None:
        rows += _steps(steps)
    columns = ["", "now", "planned", "random", "best possible"]
    print_table(f"{answer.chosen.plan.algorithm}: {what}", columns, rows)
    print("\n".join(answer.facts))
    print_table("what it takes, what it gives", ["", ""], _takes(answer))
    _print_candidates(answer)
    for note in answer.notes:
        print(f"note: {note}")
    print(answer.verdict)


def _balance(name: str, balance: "Balance") -> list[str]:
    figures = (balance.before, balance.after, balance.random, balance.upper_bound)
    return [name, *(f"{figure:.4f}" for figure in figures)]


def _steps(steps: "Steps") -> list[list[str]]:
    before_active, after_active, least_active = (f"{active:.2f}" for active in steps.busiest_active)
    tiers = [tier for tier in _TIERS if any(of.get(tier) for of in steps.bytes_by_tier)]
    return [
        ["active experts of the busiest rank", before_active, after_active, "", least_active],
        ["step", human_seconds(steps.before_s), human_seconds(steps.after_s), human_seconds(steps.random_s), ""],
        *(
            _pair(f"  of it {part}, the mean rank", (human_seconds(of.get(part, 0.0)) for of in steps.parts_s))
            for part in _PARTS
        ),
        *(
            _pair(f"MB {_TIERS[tier]}, a step", (f"{of.get(tier, 0.0) / 1e6:,.1f}" for of in steps.bytes_by_tier))
            for tier in tiers
        ),
    ]


def _pair(name: str, before_and_after: Iterable[str]) -> list[str]:
    return [name, *before_and_after, "", ""]


def _takes(answer: "Answer") -> list[list[str]]:
    from tuner.placing.verdict import steps_in_words

    chosen, steps = answer.chosen, answer.steps
    rows = [["planning alone", human_seconds(chosen.plan.plan_s)], ["slots moved", f"{chosen.plan.moved_share:.1%}"]]
    if steps is not None:
        pays = steps.pays_after_steps
        rows.append(["moving their weights", human_seconds(steps.migration_s)])
        rows.append(["pays for itself after", "never" if pays is None else steps_in_words(pays)])
    if answer.gain is not None:
        rows.append([f"gain in {answer.gain_of} (90% interval)", _gain(answer.gain)])
    if steps is not None:
        rows.append(["gain over a random placement", _gain(steps.gain_over_random)])
    return rows


def _print_candidates(answer: "Answer") -> None:
    """All that was tried, with the columns that are known."""
    by_steps, by_active = answer.steps is not None, answer.active is not None
    columns = ["algorithm", "planning", "balancedness, tokens"]
    columns += ["active experts"] * by_active + ["step"] * by_steps + ["slots moved"]
    rows = []
    for candidate in answer.candidates:
        row = [
            f"{candidate.plan.algorithm}{' (chosen)' if candidate is answer.chosen else ''}",
            human_seconds(candidate.plan.plan_s),
            f"{candidate.tokens:.4f}",
        ]
        row += [f"{candidate.active:.4f}"] if candidate.active is not None else []
        row += [human_seconds(candidate.step_s)] if candidate.step_s is not None else []
        rows.append([*row, f"{candidate.plan.moved_share:.1%}"])
    by = "by the requests that choose between them" if by_steps else "by tokens"
    print_table(f"all that was tried, {by}", columns, rows)


def _gain(gain: "Gain") -> str:
    if gain.interval is None:
        return f"{gain.mean:.1%} (one window: no interval)"
    low, high = gain.interval
    return f"{gain.mean:.1%} ({low:.1%} to {high:.1%})"

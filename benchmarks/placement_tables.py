"""The tables of `placement.py`, for reading."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]


def tables(result: Mapping[str, Any]) -> str:
    """One table a section that has rows, and what the machine was doing."""
    machine = result["machine"]
    load = f"load average {machine['load_before']:.1f} before and {machine['load_after']:.1f} after"
    parts = [f"{machine['cores']} cores, {load}; times are CPU time of one core"]
    for name, (title, columns) in _TABLES.items():
        if result[name]:
            parts.append(f"{title}\n\n{_table(columns, result[name])}")
    if result["recorded"]:
        parts.append(f"Fastest by deployment\n\n{_table(_FASTEST, fastest(result['recorded']))}")
    return "\n\n".join(parts)


def deployment_of(row: Row) -> tuple[Any, ...]:
    """What rows of one deployment have in common."""
    return row["trace"], row["ranks"], row["slots"], row["tokens_per_rank"]


def fastest(rows: Sequence[Row]) -> list[Row]:
    """Of each deployment the row with the shortest step."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["step_s"] < best.setdefault(deployment_of(row), row)["step_s"]:
            best[deployment_of(row)] = row
    return list(best.values())


def _table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    lines = [[head for head, _ in columns], *([show(row) for _, show in columns] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _text(key: str, head: str | None = None) -> Column:
    return head or key.replace("_", " "), lambda row: str(row[key])


def _number(key: str, form: str, head: str | None = None, scale: float = 1.0) -> Column:
    def show(row: Row) -> str:
        return "" if row[key] is None else format(row[key] * scale, form)

    return head or key.replace("_", " "), show


_RECORDED = (
    _text("trace"),
    _text("ranks"),
    _text("slots"),
    _text("tokens_per_rank", "tokens a rank"),
    _text("algorithm"),
    _text("replica_choice"),
    _number("step_s", ".3f", "step ms", 1e3),
    _number("vs_eplb", ".3f"),
    ("95%", lambda row: "{:.3f} to {:.3f}".format(*row["vs_eplb_ci"])),
)
_FASTEST = _RECORDED
_TABLES: Mapping[str, tuple[str, Sequence[Column]]] = {
    "cases": (
        "Balance: mean over largest rank load, averaged over layers",
        (
            _text("load"),
            _text("slots"),
            _text("algorithm"),
            _number("balancedness", ".5f"),
            _number("upper_bound", ".5f"),
            _number("largest_load", ".4g"),
            _number("ms", ".2f"),
            _number("slots_moved_share", ".3f", "moved"),
            _number("slots_moved_share_renumbered", ".3f", "ranks renumbered"),
        ),
    ),
    "hierarchical": (
        "Groups on nodes",
        (
            _text("load"),
            _text("algorithm"),
            _text("away_share"),
            _number("balancedness", ".4f"),
            _number("upper_bound", ".4f"),
            _number("tokens_away_share", ".3f", "tokens away"),
            _number("ms", ".2f"),
        ),
    ),
    "splitter": (
        "Replica choice: rows of a batch over replicas, against the LP",
        (
            _text("load"),
            _text("tokens"),
            _text("splitter"),
            _number("balancedness", ".4f"),
            _number("lp_gap", ".4f"),
            _number("lp_gap_worst", ".4f"),
            _number("whole_rows_gap_worst", ".4f"),
            _number("us_per_layer", ".0f"),
            _number("lp_us_per_layer", ".0f"),
        ),
    ),
    "drift": (
        "Drift: yesterday's plan on today's loads",
        (
            _text("load"),
            _text("sigma"),
            _text("algorithm"),
            _number("budget", ".2f"),
            _number("moved", ".3f"),
            _number("balancedness", ".4f"),
            _number("upper_bound", ".4f"),
            _number("ms", ".2f"),
        ),
    ),
    "recorded": ("Planned on one window, scored on the next: simulated decode step", _RECORDED),
    "rebalancing": (
        "Rebalancing over time",
        (
            _text("loads"),
            _text("rebalancer"),
            _number("step_s", ".3f", "step ms", 1e3),
            _number("stall_s", ".1f", "stall ms", 1e3),
            _number("total_s", ".3f", "total s"),
            _number("vs_eplb", ".3f"),
            _text("times"),
            _number("moved", ".3f"),
        ),
    ),
}

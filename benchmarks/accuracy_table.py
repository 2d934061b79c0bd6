"""The table of docs/accuracy.md: errors on rows that were held out, beside what simple models reach.

moeroute calibrate --tables cost_models/data --cv --json > cv.json && python benchmarks/accuracy_table.py cv.json
"""

import json
import sys
from pathlib import Path
from typing import Any

HEAD = (
    "table",
    "operation, dtype",
    "held out",
    "rows",
    "roofline",
    "physics",
    "with trees",
    "p90",
    "in 90% interval",
    "≤ 8 tokens: physics, with trees",
)


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def cells(row: dict[str, Any]) -> list[str]:
    few = row["mape_le8_tokens"]
    return [
        row["table"],
        f"{row['op']}, {row['dtype']}",
        row["holdout"],
        f"{row['rows']:,}",
        f"{percent(row['roofline_mape'])} / {percent(row['roofline_median_ape'])}",
        f"{percent(row['physics_mape'])} / {percent(row['physics_median_ape'])}",
        f"**{percent(row['mape'])} / {percent(row['median_ape'])}**",
        percent(row["p90_ape"]),
        percent(row["coverage90"]),
        "" if few is None else f"{percent(row['physics_mape_le8_tokens'])}, {percent(few)}",
    ]


def main() -> None:
    rows = json.loads(Path(sys.argv[1]).read_text())["tables"]
    print("| " + " | ".join(HEAD) + " |")
    print("|" + "---|" * len(HEAD))
    for row in rows:
        print("| " + " | ".join(cells(row)) + " |")
    suspects = [row for row in rows if row["suspects"]]
    print("\nWith and without the rows that a rule finds to be wrong (MAPE / median, %):\n")
    print("| table | operation, dtype | held out | such rows | all rows | without them |\n|---|---|---|---|---|---|")
    for row in suspects:
        print(
            f"| {row['table']} | {row['op']}, {row['dtype']} | {row['holdout']} | {row['suspects']} "
            f"| {percent(row['mape'])} / {percent(row['median_ape'])} "
            f"| {percent(row['sound_mape'])} / {percent(row['sound_median_ape'])} |"
        )


if __name__ == "__main__":
    main()

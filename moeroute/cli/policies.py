"""`moeroute policies`: what there is to choose from."""

import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from moeroute.cli.console import Json, print_json, say
from moeroute.cli.policies_words import KINDS, first_sentence, in_words, needs_in_words, range_in_words


def policies(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this one, in full.")] = None,
    json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/policies.md.")] = False,
) -> None:
    """List the routing policies, or describe one: what it does, its parameters, what it needs, its source."""
    from moeroute.cli.policies_page import policies_page
    from router.policies import describe_policies
    from traces.errors import InputError

    if markdown and (json or name):
        raise typer.BadParameter("--markdown prints the whole page; leave out --json and the name")

    described = describe_policies()
    if name is not None:
        described = [policy for policy in described if policy["name"] == name]
        if not described:
            known = ", ".join(sorted(policy["name"] for policy in describe_policies()))
            raise InputError(f"unknown policy {name!r}; known are {known}")
    if markdown:
        print(policies_page(described), end="")
    elif json:
        print_json(described)
    elif name is not None:
        print_policy(described[0])
    else:
        print_policies(described)


def print_policies(described: list[dict[str, Any]]) -> None:
    """A table a kind, short enough for a screen: sources and parameters stand in each one's own description."""
    width = max(len(policy["name"]) for policy in described)
    for kind, title in KINDS.items():
        name, what = title.split(": ")
        print_texts(
            None,
            {name.ljust(width): 0, what: 5, "needs": 2},
            [
                [policy["name"], first_sentence(policy["description"]), ", ".join(policy["needs"])]
                for policy in described
                if policy["kind"] == kind
            ],
        )
        print()
    say("one in full, with its source: moeroute policies NAME; how they go together: docs/policies.md")


def print_policy(policy: dict[str, Any]) -> None:
    """One policy in full."""
    print(f"{policy['name']} ({policy['kind']})\n\n{policy['description']}\n")
    if policy["parameters"]:
        print_texts(
            "parameters",
            {"name": 0, "meaning": 4, "searched": 3, "default": 1},
            [[p["name"], p["meaning"], range_in_words(p), in_words(p["default"])] for p in policy["parameters"]],
        )
    print(f"needs: {needs_in_words(policy) or 'nothing but scores'}\nsource: {policy['source']}")


def print_texts(title: str | None, columns: Mapping[str, int], rows: Sequence[Sequence[str]]) -> None:
    """A table of text, without lines, whose columns share the width by their numbers; those of 0 do not wrap.

    One without a title is dense: it has no line above and below the heads of its columns either.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    box = SIMPLE_HEAD if title else None
    table = Table(title=title, title_justify="left", title_style="bold", box=box, pad_edge=False, expand=True)
    for column, share in columns.items():
        table.add_column(column, no_wrap=not share, ratio=share or None)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False).print(table)

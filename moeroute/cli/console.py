"""What commands say: tables for people or one JSON document on stdout, progress and messages on stderr."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from traces.progress import Progress

if TYPE_CHECKING:
    from sim.report import Report

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for what the command writes.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0)]
ScenarioFile = Annotated[Path, typer.Argument(metavar="SCENARIO", help="A scenario file (YAML).")]
RunDevice = Annotated[str, typer.Option(help="cpu or cuda.")]


ANSWER_IS_NO = 1  # exit code of a command that ran well and has bad news


def say(message: str) -> None:
    """A line on stderr; of ranks that torchrun started, only the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def print_json(document: Any) -> None:
    """The one JSON document of a command."""
    print(json.dumps(document, indent=1, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; the first column is text, the others are figures. Redirected, it is as wide as it needs."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index > 0)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def interval_in_words(report: "Report") -> str:
    """The ends of a step's interval, where its costs have any."""
    from cost_models.units import human_seconds

    if report.interval_s is None or report.interval_s[0] == report.interval_s[1]:
        return ""
    return " to ".join(human_seconds(end) for end in report.interval_s)


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """A bar on stderr: what is running, how far it is and what is left. Plain lines where it is no terminal."""
    with _heeded_interrupts() as check, _shown_progress(what) as show:

        def progress(done: float, message: str) -> None:
            check()
            show(done, message)

        yield progress


@contextmanager
def _heeded_interrupts() -> Iterator[Callable[[], None]]:
    """What is given raises `KeyboardInterrupt` where one was swallowed before.

    Python drops one that comes up while a destructor or a compiler's callback runs: long work would go on as if
    nobody had asked it to stop.
    """
    asked = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        asked.set()
        raise KeyboardInterrupt

    def check() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check  # only the main thread gets signals
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _shown_progress(what: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _PlainProgress(what)
        return
    columns = (TextColumn("{task.fields[what]}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0, what=what)
        yield lambda done, message: bar.update(task, completed=done, description=message)


class _PlainProgress:
    """A line whenever another quarter is done, so that logs stay short."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._next = 0.0

    def __call__(self, done: float, message: str) -> None:
        if done >= self._next:
            say(f"{self._what}: {done:4.0%} {message}")
            self._next = done // 0.25 * 0.25 + 0.25

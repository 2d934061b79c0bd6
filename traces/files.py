"""Writing files so that an interrupted run leaves either the old file or the new one, never half of one."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from traces.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block ends well, else remove it.

    Errors: `OSError` as the system gives it (no space left, no permission); `path` is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    """Write `document` to `path` as indented JSON, whole or not at all; NaN is refused."""
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def read_document(path: Path) -> Any:
    """The JSON document of a profile's file; `InputError` if there is none."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such profile; make one with moeroute calibrate -o {path.parent}") from error
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file ({error}); run moeroute calibrate again") from error

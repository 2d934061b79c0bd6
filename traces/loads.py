"""Load counts: how many rows each expert had, as engines write them for placement."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traces.errors import InputError

KEY = "logical_count"
_AXES = ("step", "layer", "expert")
_FORM = f'{{"{KEY}": [layers][experts]}} or [steps][layers][experts]'
_MOST_EXACT = 2**53  # beyond it float64 does not hold every whole number


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Loads:
    """Rows of each of E experts in L layers, over some time and, where they were written so, in each of W steps.

    `loads_LE` float64, the sum over steps. `steps_WLE` int64, None where the file has one count for all the time or
    counts that are no whole rows. `source`: the file. `skipped`: what the file holds that was left out, a line each.
    """

    loads_LE: NDArray[np.float64]
    steps_WLE: NDArray[np.int64] | None
    source: str
    skipped: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        """L."""
        return int(self.loads_LE.shape[0])

    @property
    def experts(self) -> int:
        """E."""
        return int(self.loads_LE.shape[1])


def read_loads(path: Path) -> Loads:
    """Read JSON of `{"logical_count": [L][E]}` or `[W][L][E]`, which SGLang's `--init-expert-location` takes.

    Left out, and said so: other keys, and steps without a row in any layer. Errors: `InputError` with one line that
    names the file and the place, where it is not such JSON, or a count is missing, negative or not a finite number,
    as is the sum of all.
    """
    document = _document(path)
    skipped = tuple(f"left out: key {key!r}, which is no count of logical experts" for key in document if key != KEY)
    counts = document[KEY]
    axes = _AXES if _depth(counts) >= 3 else _AXES[1:]
    sizes = _sizes(path, counts, axes)
    count_XE = np.stack([_row(path, row, f"{place}, ") for place, row in _rows(counts, axes)])
    with np.errstate(over="ignore"):
        if not np.isfinite(count_XE.sum()):
            raise InputError(f"{path}: {KEY}: the sum of all counts is not a finite number; give smaller counts")
    if len(axes) == 2:
        return Loads(loads_LE=count_XE, steps_WLE=None, source=str(path), skipped=skipped)

    step_WLE = count_XE.reshape(sizes)
    used_W = step_WLE.any(axis=(1, 2))
    if used_W.any() and not used_W.all():  # if no step has a row, all layers are without load, which is a defined case
        skipped += (f"left out: {np.sum(~used_W)} of {used_W.size} steps, which have no row in any layer",)
        step_WLE = step_WLE[used_W]
    whole = bool((step_WLE == np.floor(step_WLE)).all() and step_WLE.max() <= _MOST_EXACT)
    if not whole:
        skipped += ("left out: single steps, whose counts are no whole rows, so that only the sum is used",)
    return Loads(
        loads_LE=step_WLE.sum(axis=0),
        steps_WLE=step_WLE.astype(np.int64) if whole else None,
        source=str(path),
        skipped=skipped,
    )


def _document(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; give one of {_FORM}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a file of {_FORM}") from error
    if content.startswith(b"PK"):  # what torch.save writes is a zip archive
        raise InputError(f"{path}: a torch file, which is not read; write its {KEY} as JSON of {_FORM}")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file ({error}); give {_FORM}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: holds a JSON {type(document).__name__}, not an object; give {_FORM}")
    if KEY not in document:
        keys = ", ".join(map(repr, document)) or "none"
        raise InputError(f"{path}: no key {KEY!r} (its keys: {keys}); give {_FORM}")
    return document


def _depth(counts: Any) -> int:
    """How deep lists are nested, by the first entry of each."""
    depth = 0
    while isinstance(counts, list):
        depth += 1
        counts = counts[0] if counts else None
    return depth


def _sizes(path: Path, counts: Any, axes: tuple[str, ...]) -> tuple[int, ...]:
    """The length along each axis; `InputError` where lists are missing, empty or of different lengths."""
    found: dict[str, int] = {}

    def walk(part: Any, depth: int, place: str) -> None:
        if depth == len(axes):
            return
        if not isinstance(part, list):
            raise InputError(f"{path}: {KEY}{place} is {_shown(part)}, not a list of {axes[depth]}s; give {_FORM}")
        expected = found.setdefault(axes[depth], len(part))
        if not part:
            raise InputError(f"{path}: {KEY}{place} is empty; give {_FORM}")
        if len(part) != expected:
            raise InputError(
                f"{path}: {KEY}{place} has {len(part)} {axes[depth]}s, where the first has {expected}; give all as many"
            )
        if depth + 1 < len(axes):
            for index, inner in enumerate(part):
                walk(inner, depth + 1, f"{place}{',' if place else ':'} {axes[depth]} {index}")

    walk(counts, 0, "")
    return tuple(found.values())


def _rows(counts: Any, axes: tuple[str, ...]) -> Iterator[tuple[str, list[Any]]]:
    """Each list of experts and its place."""
    if len(axes) == 2:
        yield from ((f"layer {layer}", row) for layer, row in enumerate(counts))
    else:
        for step, layers in enumerate(counts):
            yield from ((f"step {step}, layer {layer}", row) for layer, row in enumerate(layers))


def _row(path: Path, row: list[Any], place: str) -> NDArray[np.float64]:
    """The counts of one list of experts; `InputError` for the first that is none."""
    if set(map(type, row)) <= {int, float}:  # so bool is none
        try:
            count_E = np.array(row, dtype=np.float64)
        except OverflowError:  # a whole number beyond float64, which is infinite when read as a float
            count_E = np.array([float(str(count)) for count in row])
        bad_E = ~(np.isfinite(count_E) & (count_E >= 0))
        if not bad_E.any():
            return count_E
        expert = int(bad_E.argmax())
        what = "negative" if np.isfinite(count_E[expert]) else "not a finite number"
    else:
        expert = next(index for index, count in enumerate(row) if type(count) not in (int, float))
        what = "not a number"
    raise InputError(
        f"{path}: {KEY}: {place}expert {expert} is {_shown(row[expert])}, which is {what}; give counts of 0 or more"
    )


def _shown(value: Any) -> str:
    """A value of the file's, not longer than a line can hold."""
    text = json.dumps(value) if not isinstance(value, list | dict) else f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."

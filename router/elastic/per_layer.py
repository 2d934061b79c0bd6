"""Per layer: a JSON file that says which layers of a model stay, and how many experts a token uses in each of them.

Such as `{"layers": [0, 2, 3], "top_k": [4, 2, 1]}`, and, if you like, `"experts": [[0, 1], [0, 3], [2, 5]]`, as
`SubNetwork.to_json` writes it. Without layers all stay, without top_k each has the model's own k, and without experts
those that matter most are chosen.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from traces.errors import InputError

_FIELDS = ("layers", "top_k", "experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class PerLayer:
    """What the file says; None where it leaves it open."""

    layers: tuple[int, ...] | None = None
    top_k: tuple[int, ...] | None = None
    experts: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file. Errors: `InputError` where it is something else; `OSError` where it cannot be read."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f'{path}: no JSON ({error}); write {{"layers": [0, 2], "top_k": [2, 1]}}') from error
        if not isinstance(document, dict) or not document:
            raise InputError(f"{path}: an object of {', '.join(_FIELDS)} is needed; each is a list, a number a layer")
        for field in document:
            if field not in _FIELDS:
                raise InputError(f"{path}: {field}: unknown key; known are {', '.join(_FIELDS)}")
        lists = {field: _ids(path, field, document[field]) for field in ("layers", "top_k") if field in document}
        return cls(**lists, experts=_rows(path, document["experts"]) if "experts" in document else None)


def _rows(path: Path, value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list):
        raise InputError(f"{path}: experts is {value!r}; give a list of ids for each layer")
    return tuple(_ids(path, f"experts.{layer}", row) for layer, row in enumerate(value))


def _ids(path: Path, field: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(one) is int for one in value):
        raise InputError(f"{path}: {field} is {value!r}; give a list of whole numbers")
    return tuple(value)

"""The placement that runs now, as engines and `moeroute place` write it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.placement.base import Placement
from traces.errors import InputError

# Ours, and SGLang's `--init-expert-location`, whose physical experts are our slots.
_KEYS = ("slot_to_expert", "physical_to_logical_map")
_FORM = f'{{"{_KEYS[0]}": [layers][slots]}} or {{"{_KEYS[1]}": [layers][slots]}}'

_MOST = np.iinfo(np.int64).max


def read_current(path: Path, *, ranks: int) -> NDArray[np.int64]:
    """The expert of each slot [L, S]; `InputError`, in one line, for a file that has none, or says other `ranks`."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such placement; give JSON of {_FORM}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file ({error}); give {_FORM}") from error
    found = [key for key in _KEYS if isinstance(document, dict) and key in document]
    if len(found) != 1:
        raise InputError(f"{path}: {'both' if found else 'no'} {' and '.join(_KEYS)}; give {_FORM}")
    if document.get("ranks", ranks) != ranks:
        raise InputError(f"{path}: of {document['ranks']} ranks, not {ranks}; give as many ranks, or another placement")
    return _table(path, found[0], document[found[0]])


def _table(path: Path, key: str, rows: Any) -> NDArray[np.int64]:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        raise InputError(f"{path}: {key} is not a list of layers with slots; give {_FORM}")
    for layer, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise InputError(
                f"{path}: {key}: layer {layer} has {len(row)} slots, layer 0 has {len(rows[0])}; give as many to each"
            )
        for slot, expert in enumerate(row):
            if type(expert) is not int or not 0 <= expert <= _MOST:
                raise InputError(
                    f"{path}: {key}: layer {layer}, slot {slot} is {expert!r}; give an expert's number, from 0"
                )
    return np.array(rows, dtype=np.int64)


def placement_of(current_LS: NDArray[np.int64], *, layers: int, experts: int, ranks: int) -> Placement:
    """The same as a placement of a model on ranks; `InputError` where it is of another."""
    if current_LS.shape[0] != layers:
        raise InputError(
            f"current placement: {current_LS.shape[0]} layers, but the loads have {layers}; give one of the same model"
        )
    try:
        return Placement(slot_to_expert_LS=current_LS, experts=experts, ranks=ranks)
    except InputError as error:
        raise InputError(f"current placement: {error}") from error

"""Routing traces in npz: arrays of expert ids and gates, requests one after another.

Keys: `expert_ids` integer [T, L, K] (null experts behind the `num_experts` others), `gate_weights` floating [T, L, K],
`request_offsets` integer [R + 1], `layer_ids` [L], `num_experts`, `top_k`; optional `token_position` integer [T] and
`request_meta` (UTF-8 JSON as uint8: one object a request, of which `dataset` names the request's domain).
"""

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traces.batching import PHASE_CODES, Phase
from traces.errors import InputError
from traces.formats.base import Imported, check_values
from traces.model import ModelSpec, ScoreKind
from traces.trace import DECODE, PREFILL, RoutingTrace

_PADDING = -1
_KEYS = ("expert_ids", "gate_weights", "request_offsets", "layer_ids", "num_experts", "top_k")
_OPTIONAL_KEYS = ("token_position", "request_meta")

# Gates recorded in bfloat16 and stored in float16 sum to 1 within .003 (measured, gpt-oss-20b).
_SUM_TOLERANCE = 0.01


def import_npz(
    path: Path, *, model: ModelSpec, phase: Phase | None = None, score_kind: ScoreKind | None = None
) -> Imported:
    """Read an npz trace of `model`.

    Where `phase` is None, a request whose recorded positions start above 0 is decode (its prompt came before),
    any other is prefill. Where `score_kind` is None, gates that sum to 1 in every row are `softmax_over_topk`,
    others `softmax`. Candidates are sorted by descending gate, ties as recorded. Tokens with padding (-1) are
    left out and counted. Errors: `InputError` naming the file, the key and the value.
    """
    try:
        return _imported(_load(path), model, phase, score_kind, source=f"npz {path.name}")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error.__cause__


def _imported(
    arrays: Mapping[str, NDArray[Any]],
    model: ModelSpec,
    phase: Phase | None,
    score_kind: ScoreKind | None,
    *,
    source: str,
) -> Imported:
    ids_TLK, gates_TLK = _routing(arrays, model)
    tokens = ids_TLK.shape[0]
    offsets = _offsets(arrays["request_offsets"], tokens)
    request_T = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
    position_T = _positions(arrays, np.arange(tokens) - offsets[request_T])
    meta = _request_meta(arrays, offsets.size - 1)
    domains, domain_T = _domains(meta, request_T)
    phase_T = np.where(position_T[offsets[request_T]] > 0, DECODE, PREFILL)
    if phase is not None:
        phase_T = np.full(tokens, PHASE_CODES[phase])

    kept_T = ~(ids_TLK == _PADDING).any(axis=(1, 2))
    skipped = tokens - int(kept_T.sum())
    if skipped == tokens:
        raise InputError(f"no token without padding (-1) among {tokens}; record the trace again")
    ids_TLK, gates_TLK = ids_TLK[kept_T], gates_TLK[kept_T]
    outside = ids_TLK[(ids_TLK < 0) | (ids_TLK >= model.all_experts)]
    if outside.size:
        raise InputError(
            f"expert_ids holds {outside[0]} in a model of {model.all_experts} experts; "
            "give logical ids (physical slots need the engine's map), or another model"
        )
    order_TLK = np.argsort(-gates_TLK.astype(np.float64), axis=2, stable=True)
    ids_TLK = np.take_along_axis(ids_TLK, order_TLK, axis=2)
    gates_TLK = np.take_along_axis(gates_TLK, order_TLK, axis=2)
    with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, which check_values refuses
        gates_TLC = gates_TLK.astype(np.float16)
    note = f", {skipped} of {tokens} tokens skipped for padding" if skipped else ""
    trace = RoutingTrace(
        model=model,
        expert_ids_TLC=ids_TLK.astype(np.uint16),
        gates_TLC=gates_TLC,
        request_T=request_T[kept_T].astype(np.int32),
        position_T=position_T[kept_T].astype(np.int32),
        phase_T=phase_T[kept_T].astype(np.uint8),
        domain_T=None if domain_T is None else domain_T[kept_T].astype(np.uint8),
        domains=domains,
        score_kind=score_kind or _score_kind(gates_TLK),
        source=f"{source}{note}",
        text={"requests": meta} if meta else {},
    )
    check_values(trace)
    return Imported(trace=trace, skipped_tokens=skipped)


def _load(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as file:  # numpy leaves a file that it opened itself open if the file is damaged
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError("a single array, not an npz archive; save it with numpy.savez")
            missing = [key for key in _KEYS if key not in archive.files]
            if missing:
                raise InputError(
                    f"no {', '.join(missing)} in the npz (it has {', '.join(archive.files) or 'nothing'}); "
                    "add what is missing"
                )
            return {key: archive[key] for key in (*_KEYS, *_OPTIONAL_KEYS) if key in archive.files}
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError("no such file; give the path of an npz trace") from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"not a readable npz file ({reason}); copy or record it again") from error


def _routing(
    arrays: Mapping[str, NDArray[Any]], model: ModelSpec
) -> tuple[NDArray[np.integer[Any]], NDArray[np.floating[Any]]]:
    """Expert ids and gates, both [T, L, K], of the model's L, E and K."""
    ids_TLK, gates_TLK = arrays["expert_ids"], arrays["gate_weights"]
    _expect("expert_ids", ids_TLK, dimensions=3, kinds="iu")
    _expect("gate_weights", gates_TLK, dimensions=3, kinds="f")
    for key in ("num_experts", "top_k"):
        _expect(key, arrays[key], dimensions=0, kinds="iu")
    _expect("layer_ids", arrays["layer_ids"], dimensions=1, kinds="iu")
    if gates_TLK.shape != ids_TLK.shape:
        raise InputError(f"gate_weights has shape {gates_TLK.shape}, expert_ids {ids_TLK.shape}; make them one")
    in_model = {"num_experts": model.experts, "layer_ids": model.layers, "top_k": model.top_k}
    in_file = {
        "num_experts": int(arrays["num_experts"]),
        "layer_ids": arrays["layer_ids"].size,
        "top_k": int(arrays["top_k"]),
    }
    for key, value in in_file.items():
        if value != in_model[key]:
            what = "layers" if key == "layer_ids" else key
            raise InputError(f"{value} {what}, but {model.name} has {in_model[key]}; give the trace's own model")
    if ids_TLK.shape[1:] != (model.layers, model.top_k):
        raise InputError(
            f"expert_ids has shape {ids_TLK.shape}; its layer_ids and top_k say "
            f"[tokens, {model.layers}, {model.top_k}]; correct the one that is wrong"
        )
    return ids_TLK, gates_TLK


def _expect(key: str, values: NDArray[Any], *, dimensions: int, kinds: str) -> None:
    if values.ndim != dimensions or values.dtype.kind not in kinds:
        wanted = "floating" if kinds == "f" else "integer"
        raise InputError(f"{key} is {values.dtype} with {values.ndim} dimensions; expected {wanted} with {dimensions}")


def _offsets(offsets: NDArray[Any], tokens: int) -> NDArray[np.int64]:
    """Where each request starts, and the end: [R + 1]."""
    _expect("request_offsets", offsets, dimensions=1, kinds="iu")
    offsets = offsets.astype(np.int64)
    if offsets.size < 2 or offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) < 0).any():
        raise InputError(
            f"request_offsets must rise from 0 to the {tokens} tokens of expert_ids; "
            f"it has {offsets.size} entries, from {offsets[:1].tolist()} to {offsets[-1:].tolist()}"
        )
    return offsets


def _positions(arrays: Mapping[str, NDArray[Any]], counted_T: NDArray[np.int64]) -> NDArray[Any]:
    """The recorded position of each token in its request, or `counted_T` where none is recorded."""
    position_T = arrays.get("token_position")
    if position_T is None:
        return counted_T
    _expect("token_position", position_T, dimensions=1, kinds="iu")
    if position_T.size != counted_T.size or position_T.min(initial=0) < 0:
        raise InputError(
            f"token_position has {position_T.size} entries for {counted_T.size} tokens, "
            f"the least {position_T.min(initial=0)}; expected one at least 0 a token"
        )
    return position_T


def _request_meta(arrays: Mapping[str, NDArray[Any]], requests: int) -> list[dict[str, Any]]:
    raw = arrays.get("request_meta")
    if raw is None:
        return []
    try:
        meta = json.loads(raw.tobytes())
    except ValueError as error:
        raise InputError(f"request_meta is not UTF-8 JSON ({error}); correct it or leave it out") from error
    if not isinstance(meta, list) or len(meta) != requests or not all(isinstance(entry, dict) for entry in meta):
        raise InputError(f"request_meta must list {requests} objects, one a request; correct it or leave it out")
    return meta


def _domains(
    meta: list[dict[str, Any]], request_T: NDArray[np.int64]
) -> tuple[tuple[str, ...], NDArray[np.int64] | None]:
    """Domain names in order of appearance and each token's; none unless every request names a `dataset`."""
    names = [str(entry["dataset"]) for entry in meta if "dataset" in entry]
    domains = tuple(dict.fromkeys(names))
    if not names or len(names) < len(meta) or len(domains) > np.iinfo(np.uint8).max + 1:
        return (), None
    return domains, np.array([domains.index(name) for name in names])[request_T]


def _score_kind(gates_TLK: NDArray[np.floating[Any]]) -> ScoreKind:
    sums_TL = gates_TLK.astype(np.float64).sum(axis=2)
    if (np.abs(sums_TL - 1) <= _SUM_TOLERANCE).all():
        return "softmax_over_topk"
    if sums_TL.max() > 1 + _SUM_TOLERANCE:
        raise InputError(
            f"gate_weights of a token sum to {sums_TL.max():.3g}, more than a softmax can; say what they are "
            "(sigmoid or logits)"
        )
    return "softmax"

"""What the importers share: their result, and the checks of values that an array's shape does not show."""

from dataclasses import dataclass

import numpy as np

from traces.errors import InputError
from traces.trace import RoutingTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """An imported trace, and how many recorded tokens were left out because they hold padding (-1)."""

    trace: RoutingTrace
    skipped_tokens: int = 0


def check_values(trace: RoutingTrace) -> None:
    """Check that a token's experts are distinct in each layer and that its gates are usable numbers, best first.

    Gates must be finite, and at least 0 unless they are logits. Errors: `InputError` naming the first bad place.
    """
    ids_TLC = np.sort(trace.expert_ids_TLC, axis=2)
    repeated_TL = (ids_TLC[:, :, 1:] == ids_TLC[:, :, :-1]).any(axis=2)
    if repeated_TL.any():
        token, layer = np.argwhere(repeated_TL)[0]
        raise InputError(
            f"trace {trace.source}: token {token}, layer {layer} names one expert twice: "
            f"{trace.expert_ids_TLC[token, layer].tolist()}; record distinct experts"
        )
    if trace.gates_TLC is None:
        return
    good_TLC = np.isfinite(trace.gates_TLC)
    if trace.score_kind != "logits":
        good_TLC &= trace.gates_TLC >= 0
    if not good_TLC.all():
        token, layer, candidate = np.argwhere(~good_TLC)[0]
        raise InputError(
            f"trace {trace.source}: token {token}, layer {layer} has gate {trace.gates_TLC[token, layer, candidate]}; "
            f"gates of kind {trace.score_kind} must be finite"
            + ("" if trace.score_kind == "logits" else " and at least 0 (are these logits?)")
        )
    rising_TL = (np.diff(trace.gates_TLC, axis=2) > 0).any(axis=2)
    if rising_TL.any():
        token, layer = np.argwhere(rising_TL)[0]
        raise InputError(
            f"trace {trace.source}: token {token}, layer {layer} has gates {trace.gates_TLC[token, layer].tolist()}; "
            "candidates must be best first"
        )

"""How often predictions of experts fall as tokens rise, and what it would cost to make sure that they never do.

Held-out predictions at neighbouring token counts of one shape: how often the larger one is predicted, and was measured,
to take less time; as the residual is grown, and with only features that rise with tokens, all of them constrained.

python benchmarks/rising_tokens.py [gpu]
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cost_models.crossval import held_out_predictions, scores
from cost_models.description import Description
from cost_models.tables import Part, find_tables, read_parts

TABLES = Path(__file__).parents[1] / "cost_models" / "data"
NOT_RISING = {"tile fill", "log intensity", "log rows per token", "log local share"}
FIXED = {"log hidden", "log width", "log slots"}


def only_rising(description: Description) -> Description:
    features = {name: values for name, values in description.features.items() if name not in NOT_RISING}
    return replace(description, features=features, increasing=frozenset(features.keys() - FIXED))


def steps(part: Part, seconds_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each time over the one at the next smaller token count of the same shape."""
    names = [name for name in part.kind.keys if name != part.kind.size]
    codes_N = np.stack([np.unique(part.columns[name], return_inverse=True)[1].ravel() for name in names], axis=1)
    shape_N = np.unique(codes_N, axis=0, return_inverse=True)[1].ravel()
    order = np.lexsort((part.columns[part.kind.size], shape_N))
    same = shape_N[order][1:] == shape_N[order][:-1]
    return (seconds_N[order][1:] / seconds_N[order][:-1])[same]


def main() -> None:
    gpu = sys.argv[1] if len(sys.argv) > 1 else "h100_sxm"
    print("share of steps that fall by more than 1%; median error")
    for file in find_tables(TABLES):
        if file.device.name != gpu or file.kind.name not in ("moe_trtllm", "moe_sglang"):
            continue
        for part in read_parts(file):
            kernel, description = part.kind.kernel, part.describe()
            suspect_N = kernel.suspects(part.columns, part.seconds_N, op=part.op)
            fold_N = kernel.holdouts(part.columns, op=part.op)["config"]
            line = f"{part.table} {part.dtype}: measured {np.mean(steps(part, part.seconds_N) < 0.99):.1%}"
            for name, described in (("as grown", description), ("all rising", only_rising(description))):
                predicted_N = held_out_predictions(
                    described, part.seconds_N, fold_N, suspect_N=suspect_N, boosting=kernel.boosting
                ).predicted_N
                falls = np.mean(steps(part, predicted_N) < 0.99)
                line += f"; {name} {falls:.1%}, {scores(predicted_N, part.seconds_N).median_ape:.1%}"
            print(line, flush=True)


if __name__ == "__main__":
    main()

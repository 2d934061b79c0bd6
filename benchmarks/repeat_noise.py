"""How well all-to-all timings repeat: the error that no model of shapes can get below.

Noise: how far a row lies from the line (logarithmic) between its neighbours in tokens, over √1.5, since the neighbours'
own noise is in it too; the median in percent. Twice: TensorRT-LLM's tables hold the combine (BF16 whatever was sent)
of the same work once for each dtype; the median difference of the low-latency runs of bf16 and fp8.

python benchmarks/repeat_noise.py
"""

from pathlib import Path

import numpy as np

from cost_models.tables import Part, find_tables, read_parts

TABLES = Path(__file__).parents[1] / "cost_models" / "data"
SHAPE = ("comm_backend", "hidden_size", "topk", "num_experts", "ep_size")


def times(part: Part) -> dict[tuple[object, ...], dict[int, float]]:
    """Seconds by shape and tokens."""
    by_shape: dict[tuple[object, ...], dict[int, float]] = {}
    for row, seconds in enumerate(part.seconds_N.tolist()):
        shape = tuple(part.columns[name][row] for name in SHAPE)
        by_shape.setdefault(shape, {})[int(part.columns["num_tokens"][row])] = seconds
    return by_shape


def noise(part: Part) -> float:
    departures = []
    for of_shape in times(part).values():
        log_tokens, log_s = np.log(sorted(of_shape)), np.log([of_shape[tokens] for tokens in sorted(of_shape)])
        share = (log_tokens[1:-1] - log_tokens[:-2]) / (log_tokens[2:] - log_tokens[:-2])
        departures.append(log_s[1:-1] - ((1 - share) * log_s[:-2] + share * log_s[2:]))
    return float(np.median(np.abs(np.concatenate(departures))) / np.sqrt(1.5))


def apart(one: Part, other: Part) -> float:
    first, second = times(one), times(other)
    ratios = [
        seconds / second[shape][tokens]
        for shape, of_shape in first.items()
        if shape in second and str(shape[0]).endswith("_ll")
        for tokens, seconds in of_shape.items()
        if tokens in second[shape]
    ]
    return float(np.median(np.abs(np.log(ratios))))


def main() -> None:
    for file in find_tables(TABLES):
        if not file.kind.name.startswith("moe_a2a"):
            continue
        parts = {(part.op, part.dtype): part for part in read_parts(file)}
        print(f"{file.name}: " + ", ".join(f"{op} {dtype} {noise(part):.1%}" for (op, dtype), part in parts.items()))
        if ("combine", "fp8") in parts:
            print(f"  combine twice: {apart(parts['combine', 'bfloat16'], parts['combine', 'fp8']):.1%}")


if __name__ == "__main__":
    main()

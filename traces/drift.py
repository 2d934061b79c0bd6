"""Drift: synthetic loads that change from step to step, for what follows traffic."""

import numpy as np
from numpy.typing import NDArray

from traces.errors import InputError


def drifting_loads(
    popularity_LE: NDArray[np.floating],
    *,
    steps: int,
    rows: int,
    sigma: float = 0.0,
    burst_every: int = 0,
    burst_steps: int = 0,
    burst_share: float = 0.05,
    burst_factor: float = 8.0,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Rows of each expert in each of W steps, `rows` a layer: [W, L, E].

    Expected loads begin as `popularity_LE` and walk at random: each step multiplies them by exp(sigma · N(0, 1)), so
    that after n steps they have drifted by sigma · sqrt(n). Bursts are of another domain's requests: between bursts one
    begins in one of `burst_every` steps (0: never), and some `burst_share` of each layer's experts then has
    `burst_factor` times its load for `burst_steps` steps. Rows are then drawn from the expected loads.

    Errors: `InputError` if counts or `sigma` are negative, or a layer has no load.
    """
    counts = {"steps": steps, "rows": rows, "sigma": sigma, "burst_every": burst_every, "burst_steps": burst_steps}
    for name, value in counts.items():
        if value < 0:
            raise InputError(f"{name} is {value}; it must be at least 0")
    if not (popularity_LE.sum(axis=1) > 0).all():
        raise InputError("popularity: a layer has no load; give every layer some")
    rng = np.random.default_rng(seed)
    layers, experts = popularity_LE.shape
    expected_LE = popularity_LE.astype(np.float64)
    burst_end, factor_LE = 0, np.ones((layers, experts))
    loads_WLE = np.empty((steps, layers, experts), dtype=np.int64)
    for step in range(steps):
        if step >= burst_end:
            factor_LE = np.ones((layers, experts))
            if burst_every and rng.random() < 1 / burst_every:
                factor_LE[rng.random((layers, experts)) < burst_share] = burst_factor
                burst_end = step + burst_steps
        now_LE = expected_LE * factor_LE
        loads_WLE[step] = rng.multinomial(rows, now_LE / now_LE.sum(axis=1, keepdims=True))
        expected_LE *= np.exp(sigma * rng.standard_normal((layers, experts)))
    return loads_WLE

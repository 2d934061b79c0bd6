"""Description: operations as physics and a learner see them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """Operations of any shape X, as physics and a learner see them; every array broadcasts to X.

    `bound_s`: what the datasheet allows, the plain roofline. `stages`: what happens one after another; inside a stage
    the terms overlap, so that the largest counts. Each term is in seconds: what the datasheet allows, or what a launch,
    a turn, a step roughly takes; how many times that is fitted. `features`: what the residual may depend on, on
    logarithmic axes where sizes span decades; the residual never falls along the `increasing` ones. `curve`: a feature
    between whose measured values the residual is interpolated. `source`: the kernel that ran, by the name that its
    table gives it.
    """

    bound_s: NDArray[np.float64]
    stages: Mapping[str, Mapping[str, NDArray[np.float64]]]
    features: Mapping[str, NDArray[np.float64]]
    increasing: frozenset[str] = frozenset()
    curve: str | None = None
    source: NDArray[np.str_] | str = ""

"""Expert skipping: leave out the experts whose gate is small beside the token's best."""

import math
from dataclasses import dataclass
from typing import ClassVar

from router.backends import Array
from router.policies.base import Selection, check_count
from traces.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip(Selection):
    """Of its `k_max` best experts a token skips each whose score is under `threshold` times its best score.

    After NAEE (arXiv 2402.14800), which sets one threshold a layer at the median ratio of calibration text;
    here it is one number, left to the tuner.
    """

    name: ClassVar[str] = "skip"
    threshold: float
    k_max: int

    def __post_init__(self) -> None:
        check_count("skip", "k_max", self.k_max)
        if not 0 <= self.threshold < math.inf:
            raise InputError(f"policy skip: threshold is {self.threshold}; it must be 0 or more")

    @property
    def width(self) -> int:
        """K is k_max."""
        return self.k_max

    def use(self, probs_TK: Array) -> Array:
        """Those not under the threshold."""
        used_TK = probs_TK >= self.threshold * probs_TK[:, :1]
        used_TK[:, 0] = True
        return used_TK

"""A routing policy of your own, simulated beside the built-in ones: the second expert only where it is close.

The same class runs in the real MoE layer, since policies are written once against the array API.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import moeroute as mr


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondIfClose(mr.Selection):
    """The best expert, and the second best where its score is within `margin` of the best."""

    name: ClassVar[str] = "second_if_close"
    margin: float

    @property
    def width(self) -> int:
        """At most two experts a token."""
        return 2

    def use(self, probs_TK: Any) -> Any:
        """The second only where it is close."""
        return probs_TK >= probs_TK[:, :1] - self.margin


trace = mr.synthetic_trace(mr.preset("mixtral-8x7b"), tokens=8_192, zipf=0.3, seed=0)
cluster = mr.gpu_cluster(mr.device("h100_sxm"), ranks=4)
replay = mr.Replay(
    trace=trace,
    steps=mr.make_steps(trace, phase="prefill", tokens_per_rank=1_024, ranks=4, limit=2),
    cluster=cluster,
    costs=mr.Roofline(cluster),
)
placement = mr.place("contiguous", trace.loads_LE(), ranks=4, slots=8)

for selection in (mr.TopK(k=2), SecondIfClose(margin=0.2), mr.TopK(k=1)):
    report, _, _ = replay.run(mr.RoutingPolicy(selection=selection), placement)
    print(
        f"{report.name:30} {report.experts_per_token:.2f} experts a token, "
        f"gate mass {report.gate_mass:.0%}, step {report.step_s * 1e3:.2f} ms"
    )

"""What `moeroute model extract` and `moeroute model eval` print, and the decode step that the latter simulates."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cost_models.units import GB, human_seconds
from moeroute.cli.console import print_table
from router.elastic.evaluation import Comparison, Evaluation, loss_by_domain
from router.elastic.measure import PartSize
from router.nn.record import record
from router.nn.store import TrainedModel
from router.subnetwork import SubNetwork
from traces.errors import InputError
from tuner.deployed import RANKS, deployed_layers, deployed_report, deployed_shape

if TYPE_CHECKING:
    from sim.report import Report

_RECORDED_TOKENS = 20_480
TOKENS_PER_RANK = 64
KV_TOKENS_PER_RANK = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployedStep:
    """A decode step at the widths of the published model `shape`; without a report, `why_not` says why not."""

    shape: str = ""
    layers: int = 0
    report: "Report | None" = None
    why_not: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        if self.report is None:
            return {"why_not": self.why_not}
        return {
            "shape": self.shape,
            "layers": self.layers,
            "ranks": RANKS,
            "device": "h100_sxm",
            "tokens_per_rank": TOKENS_PER_RANK,
            "kv_tokens_per_rank": KV_TOKENS_PER_RANK,
            "step_s": self.report.step_s,
            "breakdown_s": self.report.breakdown_s,
            "memory_bytes": self.report.memory.total_bytes,
            "fits": self.report.memory.fits,
            "extrapolated_share": self.report.extrapolated_share,
        }


def deployed_step(trained: TrainedModel) -> DeployedStep:
    """The decode step of a trained model as if deployed, or why it cannot be."""
    whole = trained.whole_config
    context = trained.model.config.context
    try:
        shape = deployed_shape(whole.experts)
        trace = record(trained, tokens=max(_RECORDED_TOKENS // context, 1) * context, seed=0)
        report = deployed_report(
            trace,
            trained.part,
            whole.layers,
            tokens_per_rank=TOKENS_PER_RANK,
            kv_tokens_per_rank=KV_TOKENS_PER_RANK,
            shape=shape,
        )
    except InputError as error:
        return DeployedStep(why_not=str(error))
    return DeployedStep(shape=shape.name, layers=deployed_layers(trained.part, whole.layers, shape), report=report)


def evaluation_json(trained: TrainedModel, evaluation: Evaluation, step: DeployedStep) -> dict[str, Any]:
    """The evaluation in one document."""
    return {
        "key": trained.key,
        "path": str(trained.path),
        "recipe": trained.info["recipe"],
        **evaluation.to_json(),
        "deployed": step.to_json(),
    }


def print_evaluation(trained: TrainedModel, evaluation: Evaluation, step: DeployedStep) -> None:
    """Loss by domain, the curve, the size, and what a step takes here and deployed."""
    print_table(
        f"{trained.spec.name} model {trained.key}: "
        f"{_of_whole(evaluation.part, evaluation.of_layers, evaluation.of_experts)}",
        ["held-out text", "loss, nats/byte", "standard error"],
        [[domain, f"{mean:.3f}", f"{error:.3f}"] for domain, (mean, error) in loss_by_domain(evaluation.loss).items()],
    )
    print_table(
        f"experts a token in every layer; its own: k {_ks(evaluation.part)}",
        ["k", "loss, nats/byte", "over its own k [95%]"],
        [
            [
                str(point.top_k),
                f"{point.loss:.3f}",
                f"{point.difference:+z.3f} [{point.difference_ci[0]:+z.3f}, {point.difference_ci[1]:+z.3f}]",
            ]
            for point in evaluation.curve
        ],
    )
    print_table("size", ["", "here", "of the whole"], _size_rows(evaluation.size))
    median_s, low_s, high_s = evaluation.step_s
    rounds = evaluation.step_s_R.size
    print(
        f"a step of 16 sequences here: {human_seconds(median_s)} of CPU time, one thread (quartiles of {rounds} rounds "
        f"{human_seconds(low_s)} to {human_seconds(high_s)}; load average {evaluation.load_average:.1f})"
    )
    if step.report is None:
        print(f"no simulated decode step: {step.why_not}")
        return
    memory = step.report.memory
    print(
        f"a decode step as if deployed, simulated: {human_seconds(step.report.step_s)} on {RANKS} H100 at the widths "
        f"of {step.shape} ({step.layers} layers of {evaluation.part.experts} experts), {TOKENS_PER_RANK} tokens a rank "
        f"that look back on {KV_TOKENS_PER_RANK // TOKENS_PER_RANK:,} each; {memory.total_bytes / GB:.1f} GB a rank"
        f"{'' if memory.fits else ', which does not fit'}"
    )


def print_extraction(cut: TrainedModel, comparison: Comparison) -> None:
    """What is kept, and what that loses and saves."""
    part = comparison.part
    print_table(
        f"{cut.spec.name} model {cut.key}: {_of_whole(part, comparison.of_layers, comparison.of_experts)}",
        ["layer", "k", "experts kept"],
        [
            [str(layer), str(top_k), " ".join(map(str, experts_E))]
            for layer, top_k, experts_E in zip(part.layers_L, part.top_k_L, part.experts_LE, strict=True)
        ],
    )
    before, after = loss_by_domain(comparison.loss_before), loss_by_domain(comparison.loss_after)
    print_table(
        "loss on held-out text, nats/byte",
        ["text", "before", "after", "difference [95%]"],
        [
            [
                domain,
                f"{before[domain][0]:.3f}",
                f"{after[domain][0]:.3f}",
                f"{difference:+z.3f} [{low:+z.3f}, {high:+z.3f}]",
            ]
            for domain, (difference, low, high) in comparison.differences.items()
        ],
    )
    rows = zip(_size_rows(comparison.size_before), _size_rows(comparison.size_after), strict=True)
    print_table(
        "size",
        ["", "before", "after", "of the whole"],
        [[name, was, now, share] for (name, was, _), (_, now, share) in rows],
    )


def _of_whole(part: SubNetwork, layers: int, experts: int) -> str:
    return f"{part.describe()}, of {layers} layers of {experts}"


def _ks(part: SubNetwork) -> str:
    return part.describe().rpartition("k ")[2]


def _size_rows(size: PartSize) -> list[list[str]]:
    """[what, how much, share of the whole]."""
    return [
        ["parameters", f"{size.parameters:,}", f"{size.total_share:.1%}"],
        ["bytes", f"{size.weight_bytes:,}", f"{size.total_share:.1%}"],
        ["parameters a token meets", f"{size.active_parameters:,}", f"{size.active_share:.1%}"],
        ["FLOPs a token", f"{size.flops_per_token:,.0f}", f"{size.flops_share:.1%}"],
        ["experts a token, of all layers' experts", "", f"{size.activation:.1%}"],
    ]

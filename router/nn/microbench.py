"""The microbenchmarks of a MoE layer: the router's own (gate, route) and those of cost_models, for one model shape."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cost_models.fit import fit_profile
from cost_models.microbench.all_to_all import AllToAllBenchmark
from cost_models.microbench.benchmark import Benchmark, Measurement, measure
from cost_models.microbench.experts import ExpertsBenchmark
from cost_models.microbench.memory import MemoryBenchmark
from cost_models.microbench.permute import CombineBenchmark, PermuteBenchmark, RegroupBenchmark
from cost_models.microbench.ranks import RankGroup, run_on_ranks
from cost_models.microbench.timer import Clock
from cost_models.ops import Experts, Gate, Operation
from cost_models.profile import Profile
from router.nn.expert_parallel import gate
from router.nn.route_benchmark import RouteBenchmark
from traces.model import ModelSpec

_TOKENS = (64, 128, 256, 512, 1024, 2048)
_CASE_BUDGET_S = 0.06


@dataclass(frozen=True, slots=True, kw_only=True)
class GateBenchmark:
    """Logits, softmax and sorted candidates of one rank's tokens, for all of the model's experts and parts of them."""

    hidden: int
    experts: int
    clock: Clock = "compute"

    def cases(self) -> list[Operation]:
        """Sizes in order, of each number of experts."""
        return [
            Gate(tokens_X=np.array(tokens), hidden=self.hidden, experts=experts)
            for experts in sorted({max(self.experts * quarters // 4, 1) for quarters in (1, 2, 4)})
            for tokens in _TOKENS
        ]

    def prepare(self, case: Operation, group: RankGroup) -> Callable[[], object]:
        """Random tokens and gate."""
        assert isinstance(case, Gate)
        x_TD = torch.randn(int(case.tokens_X), self.hidden, device=group.device)
        gate_ED = torch.randn(case.experts, self.hidden, device=group.device)
        return lambda: gate(x_TD, gate_ED, group.rank)


def benchmarks_of(model: ModelSpec, ranks: int) -> list[Benchmark]:
    """Every operation of one MoE layer of `model` over `ranks` ranks, float32."""
    row_bytes = 4 * model.hidden
    slots_per_rank = -(-model.experts // ranks)
    return [
        ExpertsBenchmark(
            hidden=model.hidden,
            expert_hidden=model.expert_hidden,
            most_slots=2 * slots_per_rank,
            row_bytes=row_bytes,
        ),
        GateBenchmark(hidden=model.hidden, experts=model.experts),
        RouteBenchmark(experts=model.experts, ranks=ranks),
        PermuteBenchmark(hidden=model.hidden, slots=model.experts, row_bytes=row_bytes),
        RegroupBenchmark(hidden=model.hidden, slots_per_rank=slots_per_rank, row_bytes=row_bytes),
        CombineBenchmark(hidden=model.hidden, row_bytes=row_bytes),
        MemoryBenchmark(),
        AllToAllBenchmark(ranks=ranks, row_bytes=row_bytes),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probe:
    """One fixed expert MLP, timed before and after everything else to see the machine drift."""

    benchmark: ExpertsBenchmark
    clock: Clock = "compute"

    def cases(self) -> list[Operation]:
        return [
            case
            for case in self.benchmark.cases()
            if isinstance(case, Experts) and case.rows_XS.tolist() == [128] * self.benchmark.most_slots
        ]

    def prepare(self, case: Operation, group: RankGroup) -> Callable[[], object]:
        return self.benchmark.prepare(case, group)


def probe_of(model: ModelSpec, ranks: int) -> Benchmark:
    """The reference probe for `model`: all experts that a rank may hold, 128 rows each."""
    experts = benchmarks_of(model, ranks)[0]
    assert isinstance(experts, ExpertsBenchmark)
    return _Probe(benchmark=experts)


def calibrate(model: ModelSpec, *, ranks: int, device: str) -> tuple[Profile, list[Measurement]]:
    """Measure every operation on `ranks` ranks of `device`, fit a profile, and give both.

    Errors: `DeviceError` if the device is missing.
    """
    probe = probe_of(model, ranks)
    plan = [probe, *benchmarks_of(model, ranks), probe]
    before, *measurements, after = run_on_ranks(measure, (plan, _CASE_BUDGET_S), ranks=ranks, device=device)
    profile = fit_profile(
        measurements,
        device=device,
        device_name=device_name(device),
        ranks=ranks,
        probe_s=(before.seconds, after.seconds),
        load_average=os.getloadavg()[0],
    )
    return profile, measurements


def device_name(device: str) -> str:
    """The processor's own name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} (CPU)"
    return platform.processor() or platform.machine()

"""A rank's times for placements against the operations that they stand for."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cost_models.cluster import gpu_cluster
from cost_models.devices import device
from cost_models.kernel_costs import KernelCosts
from cost_models.ops import CostModel
from cost_models.roofline import Roofline
from router.rank_seconds import RankSeconds
from sim.layout import Layout
from sim.rank_seconds import rank_seconds_of
from traces.presets import preset

MODEL = replace(preset("gpt-oss-20b"), layers=1, weight_bytes=2.0, weight_dtype="bfloat16")


def seconds_for(costs: CostModel, *, ranks: int = 8, nodes_of: Any = None, **other: Any) -> RankSeconds:
    details: dict[str, Any] = {
        "layout": Layout.one_node(ranks) if nodes_of is None else nodes_of,
        "protocol": "per_expert",
        "dispatch_dtype": "bfloat16",
        "slots_per_rank": 4,
        "tokens_per_rank": 16,
        "width": MODEL.top_k,
        **other,
    }
    return rank_seconds_of(MODEL, costs, **details)


def test_a_decode_rank_pays_for_the_weights_that_it_reads() -> None:
    """48 MB an expert in bfloat16 at 3.35 TB/s; 16 rows of 8.6 GFLOP at 989 TFLOP/s hide behind them."""
    seconds = seconds_for(Roofline(gpu_cluster(device("h100_sxm"), 8)))
    expert_s = 3 * MODEL.hidden * MODEL.expert_hidden * 2 / 3.35e12
    one_s, two_s = seconds.of(np.array([1, 2]), np.array([16, 16]))
    assert two_s - one_s == pytest.approx(expert_s, rel=0.02)


def test_a_row_more_on_the_fullest_rank_takes_both_links_longer() -> None:
    # Seven eighths of a rank's rows come over NVLink, 450 GB/s, and go back: 2 * 2880 bfloat16.
    row_s = seconds_for(Roofline(gpu_cluster(device("h100_sxm"), 8))).row_s
    assert row_s == pytest.approx(7 / 8 * 2 * MODEL.hidden * 2 / 450e9, rel=0.01)


def test_a_rank_alone_exchanges_nothing() -> None:
    assert seconds_for(Roofline(gpu_cluster(device("h100_sxm"), 1)), ranks=1).row_s == 0


@pytest.mark.parametrize("protocol", ["per_expert", "per_rank", "per_node"])
@pytest.mark.parametrize("ranks", [8, 16])
def test_more_work_never_takes_less_time(protocol: str, ranks: int) -> None:
    cluster = gpu_cluster(device("h100_sxm"), ranks)
    seconds = seconds_for(
        KernelCosts.shipped(cluster, "trtllm", "nccl"), nodes_of=Layout.on(cluster), protocol=protocol
    )
    assert seconds.active_A.tolist() == [0, 1, 2, 3, 4]
    assert seconds.rows_R[-1] >= ranks * 16 * MODEL.top_k
    assert (np.diff(seconds.seconds_AR, axis=0) >= 0).all()
    assert (np.diff(seconds.seconds_AR, axis=1) >= 0).all()
    assert seconds.row_s >= 0

"""Ranks that fail, and devices that are not there: one line that names them."""

import os
import signal
import time
from multiprocessing import connection
from typing import Any

import pytest
import torch

from cost_models.microbench.ranks import RankGroup, require_device, run_on_ranks
from traces.errors import DeviceError

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is here, so nothing is missing")


class SlowlyToldError(ValueError):
    """An error whose traceback takes a while to write, as on a busy machine."""

    def __str__(self) -> str:
        time.sleep(0.5)
        return "out of luck"


def rank_1_fails(group: RankGroup, error: type[Exception]) -> None:
    if group.rank == 1:
        raise error("out of luck")
    group.barrier()  # rank 0 waits for one that will never come


def rank_1_is_killed(group: RankGroup, payload: Any) -> None:
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    group.barrier()


def exchange(group: RankGroup, payload: list[int]) -> dict[str, Any]:
    return {
        "gathered": group.gather(payload[group.rank]),
        "rank": group.rank,
        "ranks": group.ranks,
        "device": group.device.type,
        "threads": torch.get_num_threads(),
    }


def ones(group: RankGroup, count: int) -> torch.Tensor:
    return torch.ones(count)


def test_ranks_meet_and_rank_0_answers() -> None:
    assert run_on_ranks(exchange, [10, 11], ranks=2) == {
        "gathered": [10, 11],
        "rank": 0,
        "ranks": 2,
        "device": "cpu",
        "threads": 1,
    }


def test_a_tensor_can_be_the_answer() -> None:
    """torch passes tensors between processes by handles of the sender, who may have ended."""
    assert run_on_ranks(ones, 5, ranks=1).tolist() == [1.0] * 5


def test_a_failing_rank_is_named_with_its_error() -> None:
    """And not one of those that fail a moment later, because it has left them."""
    with pytest.raises(DeviceError) as failed:
        run_on_ranks(rank_1_fails, SlowlyToldError, ranks=2)
    assert str(failed.value) == "rank 1 of 2 failed: SlowlyToldError: out of luck"


def test_a_killed_rank_is_named_and_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if we hear of it only with what it does to the others, as on a busy machine."""

    def late(pipes: Any) -> Any:
        connection.wait(pipes)
        time.sleep(0.5)
        return connection.wait(pipes)

    monkeypatch.setattr("cost_models.microbench.ranks.wait", late)
    start_s = time.monotonic()
    with pytest.raises(DeviceError) as failed:
        run_on_ranks(rank_1_is_killed, None, ranks=2)
    assert str(failed.value) == "rank 1 of 2 failed: it was killed"
    assert time.monotonic() - start_s < 50


def test_a_rank_that_cannot_join_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    with pytest.raises(DeviceError, match=r"rank 0 of 1 failed: RuntimeError: .*nowhere0"):
        run_on_ranks(exchange, [10], ranks=1)


@needs_no_gpu
def test_cuda_without_a_gpu_says_so_in_one_line() -> None:
    for attempt in (
        lambda: require_device("cuda", 1),
        lambda: run_on_ranks(exchange, [10], ranks=1, device="cuda"),
    ):
        with pytest.raises(DeviceError) as missing:
            attempt()
        assert str(missing.value) == "no CUDA GPU was found; use --device cpu"


def test_more_ranks_than_gpus_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    require_device("cuda", 2)
    with pytest.raises(DeviceError, match="4 ranks need as many GPUs, found 2; use fewer ranks"):
        require_device("cuda", 4)


def test_an_unknown_device_names_the_known_ones() -> None:
    with pytest.raises(DeviceError, match="unknown device 'tpu'; use one of cpu, cuda"):
        run_on_ranks(exchange, [10], ranks=1, device="tpu")


def test_under_torchrun_the_world_must_be_the_scenarios(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DeviceError, match="torchrun started 4 ranks, the scenario has 2; start as many"):
        run_on_ranks(exchange, [10, 11], ranks=2)

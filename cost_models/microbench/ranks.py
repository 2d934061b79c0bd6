"""Ranks: run one function on G processes that can talk to each other, on CPU (gloo) or CUDA (NCCL).

Either this starts the processes, or `torchrun` has and each finds itself to be one of them. One torch thread a
rank: more of them fight for the same cores and make every time a multiple of the scheduler's quantum.
"""

import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from traces.errors import DeviceError

Payload = TypeVar("Payload")
Result = TypeVar("Result")

DEVICES = ("cpu", "cuda")
# Keep freed memory, as the caching allocator of a GPU does: buffers of a few MB that come and go every step would
# otherwise be mapped and faulted in each time, which takes longer than to fill them (benchmarks/kept_memory.py).
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGroup:
    """What a process knows of itself and the others: its `rank` of `ranks`, and its torch device."""

    rank: int
    ranks: int
    device: torch.device

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank; values are pickled."""
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def require_device(device: str, ranks: int) -> None:
    """Raise `DeviceError`, with the mend, unless `ranks` ranks can run on `device`."""
    if ranks < 1:
        raise DeviceError(f"{ranks} ranks; use at least 1")
    if device not in DEVICES:
        raise DeviceError(f"unknown device {device!r}; use one of {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("no CUDA GPU was found; use --device cpu")
    if device == "cuda" and torch.cuda.device_count() < ranks:
        raise DeviceError(f"{ranks} ranks need as many GPUs, found {torch.cuda.device_count()}; use fewer ranks")


def run_on_ranks(
    worker: Callable[[RankGroup, Payload], Result], payload: Payload, *, ranks: int, device: str = "cpu"
) -> Result:
    """Run `worker(group, payload)` on every rank and return what rank 0 returned.

    `worker` is a module-level function and `payload` can be pickled. Under torchrun, whose world must have `ranks`
    ranks, the other ranks end here, since only rank 0 has something to say. Errors: `DeviceError` when the device
    is missing, or a rank fails, with that rank's traceback on stderr.
    """
    require_device(device, ranks)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _run_under_torchrun(worker, payload, ranks, device)
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="moeroute-") as folder:
        store = Path(folder, "rendezvous").as_uri()
        processes, pipes = [], []
        os.environ.update(KEEP_MEMORY)  # read by the C library when a process starts
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank, args=(worker, payload, rank, ranks, device, store, theirs), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        try:
            result: Result = _collect(pipes)
            return result
        finally:
            for process in processes:
                process.terminate()
                process.join()


def _collect(pipes: "Sequence[Connection[Any, bytes]]") -> Any:
    """Rank 0's result, once every rank has ended well."""
    result, waiting = None, {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        failures = []
        for pipe in wait(list(waiting)):
            rank = waiting.pop(pipe)  # type: ignore[call-overload]  # wait gives back what it was given
            try:
                failed_at, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                failed_at, value = 0.0, "it was killed"  # which no other rank's failure can bring about
            if failed_at is not None:
                failures.append((failed_at, f"rank {rank} of {len(pipes)} failed: {value}"))
            elif rank == 0:
                result = value
        if failures:  # the others fail because the first has left them
            raise DeviceError(min(failures)[1])
    return result


def _run_rank(
    worker: Callable[[RankGroup, Any], Any],
    payload: Any,
    rank: int,
    ranks: int,
    device: str,
    store: str,
    pipe: "Connection[bytes, Any]",
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends its ranks
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this host, whatever its name resolves to

    told = False

    def tell(failed_at: float | None, value: Any) -> None:
        nonlocal told
        # Pickled by value: what torch would share is gone when this process is.
        pipe.send_bytes(pickle.dumps((failed_at, value)))
        told = True

    def tell_failure(error: Exception) -> None:
        tell(time.monotonic(), f"{type(error).__name__}: {error}".splitlines()[0])

    try:
        with _joined(rank, ranks, device, rank, init_method=store) as group:
            try:
                result = worker(group, payload)
                tell(None, result if rank == 0 else None)
            except Exception as error:
                tell_failure(error)  # before the group is left, which the other ranks fail at
                raise
    except Exception as error:
        traceback.print_exc()
        if not told:  # it could not even join
            tell_failure(error)


def _run_under_torchrun(
    worker: Callable[[RankGroup, Payload], Result], payload: Payload, ranks: int, device: str
) -> Result:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world != ranks:
        raise DeviceError(f"torchrun started {world} ranks, the scenario has {ranks}; start as many")
    with _joined(rank, ranks, device, int(os.environ["LOCAL_RANK"]), init_method="env://") as group:
        result = worker(group, payload)
    if rank != 0:
        sys.exit(0)
    return result


@contextmanager
def _joined(rank: int, ranks: int, device: str, local_rank: int, init_method: str) -> Iterator[RankGroup]:
    torch.set_num_threads(1)
    on = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(on)
    dist.init_process_group(_BACKENDS[device], init_method=init_method, rank=rank, world_size=ranks)
    try:
        yield RankGroup(rank=rank, ranks=ranks, device=on)
    finally:
        dist.destroy_process_group()

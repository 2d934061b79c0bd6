"""The journal of a study: a file that survives `kill -9` at any byte."""

import fcntl
from pathlib import Path
from typing import IO

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend


class _KernelLock:
    """A lock that the kernel lets go of when its holder dies, unlike a lock file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: IO[bytes] | None = None

    def acquire(self) -> bool:
        self._held = self._path.open("ab")
        fcntl.flock(self._held, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        assert self._held is not None
        self._held.close()
        self._held = None


def open_journal(path: Path) -> JournalStorage:
    """Open or start the journal at `path`. A last line that was cut off is taken out: its trial never finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _KernelLock(path.with_name(path.name + ".lock"))
    lock.acquire()
    try:
        _drop_half_line(path)
    finally:
        lock.release()
    backend = JournalFileBackend(str(path), lock_obj=lock)  # type: ignore[arg-type]  # its base class has no public name
    return JournalStorage(backend)


def _drop_half_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as journal:
        content = journal.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            journal.truncate(whole)

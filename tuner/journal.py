"""The journal of a study: a file that survives `kill -9` at any byte, and that one study at a time writes."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from traces.errors import InputError


@contextmanager
def open_journal(path: Path) -> Iterator[JournalStorage]:
    """Open or start the journal at `path` for this process alone.

    A last line that was cut off is taken out: its trial never finished. The lock is the kernel's, which lets go of it
    when its holder dies; the lock files that Optuna offers stay behind. Errors: `InputError` if another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{path}: another moeroute is at work on it; wait, or give another --out") from error
        _drop_half_line(path)
        backend = JournalFileBackend(str(path), lock_obj=_HeldAlready())  # type: ignore[arg-type]  # duck-typed
        try:
            storage = JournalStorage(backend)
        except (ValueError, KeyError) as error:
            raise unreadable(path, error) from error
        yield storage


def unreadable(path: Path, error: Exception) -> InputError:
    """What to say of a file that is no journal."""
    return InputError(f"{path}: not a readable journal ({error}); move it away and start again")


class _HeldAlready:
    """What the backend locks around each line; the whole journal is ours by then."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _drop_half_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as journal:
        content = journal.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            journal.truncate(whole)

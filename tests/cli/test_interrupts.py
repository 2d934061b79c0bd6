import contextlib
import os
import signal

import pytest

from moeroute.cli.console import progress_bar


def work_on(*, swallowing: type[BaseException]) -> None:
    """Work that is interrupted halfway, where `swallowing` comes to nothing, as in a destructor."""
    with progress_bar("work") as progress:
        progress(0.1, "going on")
        with contextlib.suppress(swallowing):
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the interrupt was not raised")
        progress(0.2, "going on all the same")
        raise AssertionError("the interrupt was forgotten")


@pytest.mark.parametrize("swallowing", [KeyError, KeyboardInterrupt])
def test_an_interrupt_stops_the_work_at_once_or_at_its_next_report(swallowing: type[BaseException]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        work_on(swallowing=swallowing)
    assert signal.getsignal(signal.SIGINT) is before

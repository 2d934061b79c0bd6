"""Progress: how long work tells whoever waits how far it is."""

from collections.abc import Callable

Progress = Callable[[float, str], None]
"""Called with the share done, 0 to 1, and what is running."""


def quiet(done: float, message: str) -> None:
    """Progress that nobody watches."""

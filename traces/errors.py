"""The errors that moeroute raises for its users.

Assertions guard our own invariants; whatever a user can cause raises one of these, with a message of
one line that names the thing, the value and the mend. The command line turns them into exit code 2.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class MoerouteError(Exception):
    """Root of every error that moeroute raises on purpose."""


class InputError(MoerouteError, ValueError):
    """A file, field or option that moeroute cannot use as it is."""


class DeviceError(MoerouteError, RuntimeError):
    """The asked-for device is not there, or failed while it was used."""


def first_problem(error: "ValidationError", *, unnamed: Collection[str] = (), whole: Any = None) -> str:
    """The first thing that is wrong with a file of the user's: its field, its value and, where it is plain, the mend.

    `unnamed`: parts of a field's place that the user never wrote; `whole`: the document, whose value is not shown.
    """
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part not in unnamed)
    if first["type"] == "extra_forbidden":
        return f"{field}: unknown key; remove it or correct its name"
    if first["type"] == "missing":
        return f"{field}: missing; add it"
    message = first["msg"].removeprefix("Value error, ")
    value = first["input"]
    shown = "" if isinstance(value, dict | list) or value is whole else f" (it is {value!r})"
    return f"{field}: {message[:1].lower() + message[1:]}{shown}" if field else message

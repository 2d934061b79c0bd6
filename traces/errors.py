"""The errors that moeroute raises for its users.

Assertions guard our own invariants; whatever a user can cause raises one of these, with a message of
one line that names the thing, the value and the mend. The command line turns them into exit code 2.
"""


class MoerouteError(Exception):
    """Root of every error that moeroute raises on purpose."""


class InputError(MoerouteError, ValueError):
    """A file, field or option that moeroute cannot use as it is."""


class DeviceError(MoerouteError, RuntimeError):
    """The asked-for device is not there, or failed while it was used."""

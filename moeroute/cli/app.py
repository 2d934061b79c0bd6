"""The command line: one command a file. Commands import what they need when they run, so that `--help` is quick.

Exit codes: 0 done; 1 it ran but the answer is no; 2 bad input, device or disk, with one line that says what and the
mend; 130 interrupted. What a command answers goes to stdout, everything else to stderr.
"""

from typing import Any

import typer
from typer.core import TyperGroup

from moeroute.cli import calibrate, demo, model, place, policies, simulate, trace, tune, validate, whatif
from moeroute.cli.console import say
from traces.errors import MoerouteError

_BAD_INPUT = 2
_INTERRUPTED = 130


class _Commands(TyperGroup):
    """Turns what a command raises into the contract's exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MoerouteError as error:
            say(f"error: {error}")
            raise typer.Exit(_BAD_INPUT) from error
        except BrokenPipeError:
            raise  # the reader of our output has left: typer ends quietly
        except OSError as error:
            say(
                f"error: {error.filename or 'write'}: {error.strerror}; check the path, its permissions and "
                "the space left (nothing was left half written)"
            )
            raise typer.Exit(_BAD_INPUT) from error
        except KeyboardInterrupt as error:
            say("interrupted; what was finished is kept, start again to go on")
            raise typer.Exit(_INTERRUPTED) from error


app = typer.Typer(
    cls=_Commands,
    help="Hardware-aware routing simulator and autotuner for mixture-of-experts models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(trace.app, name="trace")
app.add_typer(model.app, name="model")
app.add_typer(calibrate.app, name="calibrate")
app.command(name="policies")(policies.policies)
app.command(name="place")(place.place)
app.command(name="simulate")(simulate.simulate)
app.command(name="tune")(tune.tune)
app.command(name="validate")(validate.validate)
app.command(name="whatif")(whatif.whatif)
app.command(name="demo")(demo.demo)

"""`python -m moeroute` and the `moeroute` command."""

from moeroute.cli.app import app


def main() -> None:
    """Run the command line."""
    app(prog_name="moeroute")


if __name__ == "__main__":
    main()

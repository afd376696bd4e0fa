"""The ``attnlens`` command: thin typer commands over the public functions, heavy imports inside them."""

import sys


def main() -> None:
    """Run the command line; nothing is imported before Ctrl-C has somewhere to arrive."""
    try:
        from attnlens.cli.program import run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("attnlens: interrupted: no file was written\n")
        sys.exit(130)

"""The ``attnlens`` command: thin typer commands over the public functions, heavy imports inside them."""

from __future__ import annotations

import sys

from attnlens.cli.console import end_interrupted
from attnlens.errors import AttnlensError, UsageError
from attnlens.printable import one_line


def main() -> None:
    """Run the command line: exit code 0, 1 for a failure told in one line, 2 for wrong usage."""
    from attnlens.cli.app import app

    debug = "--debug" in sys.argv  # every command lists it
    try:
        app()
    except AttnlensError as error:
        if debug:
            raise
        _complain(str(error))
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        end_interrupted()
    except Exception as error:  # the last line of defence: a traceback is for --debug
        if debug:
            raise
        _complain(f"internal error, {type(error).__name__}: {error} (run again with --debug and report the traceback)")
        sys.exit(1)


def _complain(message: str) -> None:
    sys.stderr.write(f"attnlens: {one_line(' '.join(message.split()))}\n")

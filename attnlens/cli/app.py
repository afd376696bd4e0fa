"""The `attnlens` application; its commands are in `looking`, `making` and `signalling`."""

from __future__ import annotations

from typing import Annotated

import typer

from attnlens import __version__

app = typer.Typer(
    name="attnlens",
    help="Look inside pre-trained attention weights: how much of W_Q W_K^T and W_V W_proj is identity plus noise.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing and laying out rich doubles the time of --help
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"attnlens {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Look inside pre-trained attention weights: how much of W_Q W_K^T and W_V W_proj is identity plus noise."""


# The commands register themselves: looking first, so that help lists them first.
from attnlens.cli import looking, making, signalling  # noqa: E402, F401

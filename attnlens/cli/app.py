"""The `attnlens` application: every command with the line that ``attnlens --help`` says of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from attnlens import __version__
from attnlens.cli.compare import compare
from attnlens.cli.compose import compose
from attnlens.cli.doctor import doctor
from attnlens.cli.fit_params import fit_params
from attnlens.cli.init import init
from attnlens.cli.inspect import inspect
from attnlens.cli.list_models import list_models
from attnlens.cli.options import Debug
from attnlens.cli.report import report
from attnlens.cli.scan import scan
from attnlens.cli.signal import signal
from attnlens.cli.train_compare import train_compare
from attnlens.cli.verify_init import verify_init

Command = Callable[..., None]

COMMANDS: dict[Command, str] = {
    inspect: "Fit every head and filter covariance: table, CSV, JSON, figures.",
    list_models: "List timm's architectures and what is read of them.",
    fit_params: "Judge every fit; write a parameter file.",
    compare: "Compare models by depth.",
    compose: "Score how heads compose over layers.",
    scan: "Inspect hundreds of models; go on where stopped.",
    report: "Write one HTML page about a model.",
    doctor: "Say what is installed and what is missing.",
    init: "Write weights that start from an initialiser.",
    verify_init: "Check a network against an initialiser.",
    train_compare: "Train from several starts and compare them.",
    signal: "See how alike tokens become by depth.",
}
"""Command -> what it is for, in the order of the help."""


class _Group(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for flag in self.get_params(ctx):  # typer imports pydantic, 60 ms of help, to convert the None of a flag
            flag.default = False
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="attnlens",
    cls=_Group,
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


def _with_debug(command: Command) -> Command:
    """Return the command with ``--debug`` among its options; `main` does what it says."""

    @wraps(command)
    def run(*, debug: bool, **options: Any) -> None:  # noqa: ARG001  # read by main, where errors arrive
        command(**options)

    plain = signature(command, eval_str=True)
    debug = Parameter("debug", Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    vars(run)["__signature__"] = plain.replace(parameters=[*plain.parameters.values(), debug])
    return run


for _command, _summary in COMMANDS.items():
    app.command(short_help=_summary)(_with_debug(_command))

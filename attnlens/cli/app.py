"""The `attnlens` application: every command's name with the line that ``attnlens --help`` says of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from inspect import Parameter, signature
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from attnlens import __version__
from attnlens.cli.console import Interrupted

COMMANDS = {
    "inspect": "Fit every head and filter covariance: table, CSV, JSON, figures.",
    "list-models": "List timm's architectures and what is read of them.",
    "fit-params": "Judge every fit; write a parameter file.",
    "compare": "Compare models by depth.",
    "compose": "Score how heads compose over layers.",
    "scan": "Inspect hundreds of models; go on where stopped.",
    "report": "Write one HTML page about a model.",
    "doctor": "Say what is installed and what is missing.",
    "init": "Write weights that start from an initialiser.",
    "verify-init": "Check a network against an initialiser.",
    "train-compare": "Train from several starts and compare them.",
    "signal": "See how alike tokens become by depth.",
}
"""Command -> what it is for, in the order of the help; its function has its name, in the module of its name."""

_SETTINGS: dict[str, Any] = {
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,  # importing and laying out rich doubles the time of --help
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


class _Group(TyperGroup):
    """The commands; only the one that is asked for is imported and built, which keeps --help at .1 s."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            **{**settings, "commands": [TyperCommand(name, short_help=COMMANDS[name]) for name in COMMANDS]}
        )

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002  # typer's signature
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stopped:  # typer would make an exit without a word of it
            raise Interrupted from stopped

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002  # typer's signature
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for flag in self.get_params(ctx):  # typer imports pydantic, 60 ms of help, to convert the None of a flag
            flag.default = False
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="attnlens",
    cls=_Group,
    help="Look inside pre-trained attention weights: how much of W_Q W_K^T and W_V W_proj is identity plus noise.",
    no_args_is_help=True,
    **_SETTINGS,
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


def load_command(name: str) -> Any:
    """Import the function of a command and build typer's command of it."""
    attribute = name.replace("-", "_")
    function = getattr(import_module(f"attnlens.cli.{attribute}"), attribute)
    alone = typer.Typer(add_completion=False, **_SETTINGS)
    alone.command(name, short_help=COMMANDS[name])(_with_common(function))
    return typer.main.get_command(alone)


def _with_common(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with ``--quiet`` and ``--debug`` among its options; `program` does what the latter says."""
    from attnlens.cli.console import quietly
    from attnlens.cli.options import Debug, Quiet
    from attnlens.figure_styles import current, use
    from attnlens.threads import keep_memory

    @wraps(command)
    def run(*, quiet: bool, debug: bool, **options: Any) -> None:  # noqa: ARG001  # read where errors arrive
        keep_memory()
        with quietly(quiet), use(current()):  # a command may settle on another style of figures
            command(**options)

    plain = signature(command, eval_str=True)
    common = {"quiet": Quiet, "debug": Debug}
    added = [Parameter(n, Parameter.KEYWORD_ONLY, default=False, annotation=kind) for n, kind in common.items()]
    vars(run)["__signature__"] = plain.replace(parameters=[*plain.parameters.values(), *added])
    return run

"""The command ``init``: build a network, initialise it, write it, say how to load it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from attnlens.cli import options
from attnlens.cli.console import command_line, note, write_stdout
from attnlens.errors import UsageError
from attnlens.strict_json import there


def init(
    model: Annotated[
        str | None,
        typer.Argument(help="timm name or model folder to build; default: the architecture of the shipped ViT."),
    ] = None,
    init: options.InitName = None,
    params: options.ParamsFile = None,
    gains: options.Gains = None,
    pairs: options.InitOptions = None,
    model_args: options.ModelArgs = None,
    seed: Annotated[int, typer.Option(min=0, help="Use this seed for every draw, timm's own included.")] = 0,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", parser=options.as_typed, help="Write this file.")
    ] = Path("model.safetensors"),
    force: options.Force = False,
    list_: Annotated[
        bool, typer.Option("--list", help="Print the initialisers with their options, and write nothing.")
    ] = False,
    json_: options.Json = False,
) -> None:
    """Write the weights of a new network whose attention or filters start from an initialiser, mimetic by default."""
    from attnlens.inits import init_file
    from attnlens.inits.file import READ_FROM, of_transformers

    if list_:
        _print_list(json_)
        return
    name, given = choose_initialiser(init, params, pairs, gains)
    name = name or ("fitted" if params else "mimetic")
    arguments = options.parse_model_args(model_args)
    report = init_file(
        model, output, init=name, seed=seed, model_args=arguments, command=command_line(), force=force, **given
    )
    if json_:
        write_stdout(json.dumps({"init": name, "seed": seed} if report is None else report.to_json(), indent=1))
    else:
        write_stdout(f"default, seed {seed}: timm's own draw" if report is None else str(report))
    if model is not None and there(Path(model).is_dir) and of_transformers(Path(model)):
        note(f"wrote {output} and config.json, to be loaded by: from_pretrained({str(output.parent)!r})")
    else:
        note(f"wrote {output}, to be loaded by: timm.create_model({_call(model, arguments, output)})")
    again = ["--checkpoint", str(output)]
    for option in (option for option in READ_FROM if given.get(option) is not None):
        if option != "params":
            again += ["--option", f"{option}={given[option]}"]
        elif Path(given[option]).absolute().parent != output.absolute().parent:
            again += ["--params", str(given[option])]
    note(f"to check it: attnlens verify-init {shlex.join(again)}")


def choose_initialiser(
    init: str | None, params: Path | None, pairs: list[str] | None, gains: str | None
) -> tuple[str | None, dict[str, Any]]:
    """Return the initialiser's name, None where none is given, and its options."""
    from attnlens.inits import initialisers
    from attnlens.inits.registry import find_initialiser

    given = options.parse_pairs("--option", pairs)
    if gains is not None:
        given["gains"] = gains
    if params is None:
        return init, given
    if not find_initialiser(init or "fitted").takes("params"):
        able = [name for name, one in initialisers().items() if one.takes("params")]
        raise UsageError(f"--params goes with --init {', '.join(able)}, not with {init!r}")
    return init, {**given, "params": str(params)}


def _print_list(as_json: bool) -> None:
    """Print every initialiser: its name, what it does, the options it takes."""
    from attnlens.cli.sheet import Sheet
    from attnlens.cli.tables import escape, print_sheet
    from attnlens.inits import initialisers

    known = initialisers().items()
    takes = {name: [*one.options, *(["those of the other one"] if one.passes_on else [])] for name, one in known}
    if as_json:
        write_stdout(json.dumps({name: {"does": one.summary, "options": takes[name]} for name, one in known}, indent=1))
        return
    sheet = Sheet("[bold]Initialisers[/bold]", "to type: attnlens init MODEL --init NAME --option OPTION=VALUE")
    sheet.label("name", key=True, least=18)
    sheet.label("what it does", "options", least=24)
    for name, one in known:
        sheet.add_row(*map(escape, (name, one.summary.replace("`", ""), ", ".join(takes[name]))))
    print_sheet(sheet)


def _call(model: str | None, arguments: dict[str, Any], output: Path) -> str:
    """Write the arguments of the timm call that loads a file."""
    from attnlens.models.open import EMBEDDED

    name = f"local-dir:{EMBEDDED}" if model is None else f"local-dir:{model}" if there(Path(model).is_dir) else model
    return ", ".join(
        [repr(name), *(f"{key}={value!r}" for key, value in arguments.items()), f"checkpoint_path={str(output)!r}"]
    )

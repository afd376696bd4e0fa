"""The command ``init``: build a network, initialise it, write it, say how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from attnlens.cli import options
from attnlens.cli.console import command_line, note, write_stdout
from attnlens.errors import UsageError


def init(
    model: Annotated[
        str | None,
        typer.Argument(help="timm name or model folder to build; default: the architecture of the shipped ViT."),
    ] = None,
    init: options.InitName = None,
    params: options.ParamsFile = None,
    pairs: options.InitOptions = None,
    model_args: options.ModelArgs = None,
    seed: Annotated[int, typer.Option(min=0, help="Use this seed for every draw, timm's own included.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Write this file.")] = Path("model.safetensors"),
    json_: options.Json = False,
) -> None:
    """Write the weights of a new network whose attention or filters start from an initialiser, mimetic by default."""
    from attnlens.inits import init_file
    from attnlens.inits.file import of_transformers

    name, given = choose_initialiser(init, params, pairs)
    name = name or "mimetic"
    arguments = options.parse_model_args(model_args)
    report = init_file(model, output, init=name, seed=seed, model_args=arguments, command=command_line(), **given)
    if json_:
        write_stdout(json.dumps({"init": name, "seed": seed} if report is None else report.to_json(), indent=1))
    else:
        write_stdout(f"default, seed {seed}: timm's own draw" if report is None else str(report))
    if model is not None and Path(model).is_dir() and of_transformers(Path(model)):
        note(f"wrote {output} and config.json: transformers' from_pretrained({str(output.parent)!r})")
    else:
        note(f"wrote {output}: timm.create_model({_call(model, arguments, output)})")


def choose_initialiser(
    init: str | None, params: Path | None, pairs: list[str] | None
) -> tuple[str | None, dict[str, Any]]:
    """Return the initialiser's name, ``fitted`` where parameters alone are given, None for neither; and its options."""
    from attnlens.inits import initialisers
    from attnlens.inits.registry import find_initialiser

    given = options.parse_pairs("--option", pairs)
    if params is None:
        return init, given
    chosen = find_initialiser(init or "fitted")
    if "params" not in chosen.options and not chosen.passes_on:
        able = [name for name, one in initialisers().items() if "params" in one.options or one.passes_on]
        raise UsageError(f"--params goes with --init {', '.join(able)}, not with {init!r}")
    return init or "fitted", {**given, "params": str(params)}


def _call(model: str | None, arguments: dict[str, Any], output: Path) -> str:
    """Write the arguments of the timm call that loads a file."""
    name = "local-dir:attnlens/embedded" if model is None else model
    return ", ".join(
        [repr(name), *(f"{key}={value!r}" for key, value in arguments.items()), f"checkpoint_path={str(output)!r}"]
    )

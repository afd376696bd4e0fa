"""What a network is compared with: what its caller says, else what `attnlens init` wrote into the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple, cast

from attnlens.errors import UsageError
from attnlens.inits.file import METADATA_KEY, READ_FROM, params_record
from attnlens.inits.registry import find_initialiser
from attnlens.models.opened import OpenedModel
from attnlens.strict_json import parse_json, there, within


class Claim(NamedTuple):
    """What a network is said to have been initialised with."""

    init: str
    seed: int | None
    options: dict[str, Any]


def recorded(opened: OpenedModel, seed: int | None, options: dict[str, Any], folder: Path | None = None) -> Claim:
    """Return what the metadata of a file says; `fitted` where it says nothing of the parameters given, else `mimetic`.

    A parameter file that it names is looked for in ``folder``, which is that of the weights, and nowhere else. Raises
    `UsageError` where an option was an object that the file could not hold, or names another file or a model, which
    are followed only where they are given; and where parameters have changed.
    """
    text = opened.checkpoint.metadata.get(METADATA_KEY)
    if text is None:
        return Claim("fitted" if "params" in options else "mimetic", seed, options)
    data = _record(opened, text)
    if "params" in options and not find_initialiser(data["init"]).takes("params"):
        return Claim("fitted", seed, options)
    options = {**_beside(data["options"].get("params"), folder), **options}
    resolved = {**data["options"], **options}
    objects = [name for name, value in resolved.items() if isinstance(value, str) and value.startswith("<")]
    files = [name for name in READ_FROM if name not in options and data["options"].get(name) is not None]
    for name in (*objects, *files):
        raise UsageError(f"the file was made with {name} = {resolved[name]!s:.300}: pass that option again")
    made_with = data.get("params")
    given = params_record(resolved.get("params")) if made_with else None
    if given and made_with and given["sha256"] != made_with["sha256"]:
        raise UsageError(
            f"{opened.name} was made with a parameter file {made_with['file']} of another content (sha256 "
            f"{made_with['sha256'][:12]}...): pass that file as --params"
        )
    return Claim(data["init"], data["seed"] if seed is None else seed, resolved)


def folder_of(given: Any) -> Path | None:
    """Return the folder that weights are in, as their caller names them; None for what is in memory."""
    path = Path(given) if isinstance(given, str | os.PathLike) else None
    return path if path is None or there(path.is_dir) else path.parent


def _beside(params: Any, folder: Path | None) -> dict[str, Any]:
    """Return where a parameter file lies that a record names, if it is beside the weights by that name."""
    if folder is None or not isinstance(params, str) or not (name := Path(params).name).endswith(".json"):
        return {}
    if not there((folder / name).is_file):
        return {}
    return {"params": str(within(folder, folder / name, UsageError))}


def _record(opened: OpenedModel, text: str) -> dict[str, Any]:
    """Return the record of `init_file`, which anybody may have written. Raises `UsageError` for another."""
    try:
        data = parse_json(text, constant=float)
        seed, params, options = data["seed"], data.get("params"), data["options"]
        held = isinstance(data["init"], str) and isinstance(options, dict) and type(seed) is int
        held = held and (params is None or all(isinstance(params[name], str) for name in ("file", "sha256")))
        reason = "" if held else "a value of another type"
    except (ValueError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    if reason:
        raise UsageError(
            f"what {opened.name} says of its initialisation is no record of attnlens ({reason}): say what it is to be, "
            "as --init mimetic"
        )
    return cast("dict[str, Any]", data)

"""Arguments and options that several commands share, and what is read out of their text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from attnlens.errors import UsageError
from attnlens.figure_styles import chosen, settle
from attnlens.outputs import model_identity, named_folder
from attnlens.strict_json import parse_json
from attnlens.vocabulary import FIGURE_STYLE, FOLD, FOLD_CHOICE, Vocabulary, layer_choice

LONGEST = 4096
"""Characters of a value in ``name=value``."""
SEED = (1 << 31) - 1
"""The largest seed that is taken."""
MOST_BLOCKS = 1000
"""Blocks of a network that is built of sizes on the command line."""


def in_brackets(vocabulary: Vocabulary) -> str:
    """Write the words an option takes as typer writes choices; what is typed is checked where the option is used."""
    return f"[{'|'.join(vocabulary.words)}]"


def as_typed(given: str | Path) -> Any:
    """Return a path; one with a slash at its end as text, since a `Path` forgets that a folder was meant."""
    return given if str(given).endswith(("/", os.sep)) else Path(given)


Folds = Annotated[
    str,
    typer.Option(
        metavar=in_brackets(FOLD_CHOICE),
        help="Measure raw products; effective ones, with norm gain and LayerScale folded in; centred ones: effective, "
        "with LayerNorm's centring too; balanced ones: effective, one gain a row and a column divided out; both: raw "
        "and effective; or all four.",
    ),
]
ProductFold = Annotated[
    str,
    typer.Option(
        metavar=in_brackets(FOLD),
        help="Use raw products, effective ones with norm gain and LayerScale folded in, centred ones: effective, with "
        "LayerNorm's centring too, or balanced ones: effective, one gain a row and a column divided out.",
    ),
]
Model = Annotated[
    str | None,
    typer.Argument(
        help="timm name (with or without tag), hf-hub: or local-dir: name, checkpoint file or folder; "
        "default: the small ViT shipped with attnlens.",
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option("--checkpoint", "-c", help="Take the weights from this file; MODEL then names the architecture."),
]
NumHeads = Annotated[
    int | None,
    typer.Option(
        help="Say how many heads each layer has, to read a file of unknown architecture by its tensors' names."
    ),
]
ModelArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg",
        help="Pass name=value to timm's architecture, as often as needed, e.g. depth=6. Sizes that the weights' shapes "
        "show need not be given.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="NAME",
        help="Read this one of several networks in a file, by its key or prefix, e.g. ema. Default: an average of "
        "weights where the file keeps one, else the first.",
    ),
]
RowOrder = Annotated[
    str | None,
    typer.Option(
        metavar="AXES",
        help="Say how the rows of packed projections are ordered, from the outermost axis, e.g. head,dim,qkv. Goes "
        "with --num-heads. Default: qkv,head,dim, unless the weights contradict it.",
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(help="Read only these layers, of attention and of filters, e.g. 0-3,11. Default: all layers."),
]
Offline = Annotated[bool, typer.Option("--offline", help="Use only what is in the local cache.")]
Remote = Annotated[
    bool, typer.Option("--remote", help="Fetch only the attention tensors of a safetensors file on the hub.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout in place of the table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors alone.")]
TableFile = Annotated[
    Path | None,
    typer.Option(
        "--table", metavar="FILE", parser=as_typed, help="Write the table to this CSV file, too. Default: none."
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace files that attnlens did not write. Inputs are never replaced.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")]

ModelFolder = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Write figures and tables to this folder. Default: figures/<model>."),
]
Figures = Annotated[
    Path | None, typer.Option("--figures", help="Write the figures to this folder. Default: figures/<model>.")
]
FigureFormat = Annotated[Literal["png", "pdf", "svg"], typer.Option("--format", help="Write figures in this format.")]
Dpi = Annotated[
    int | None,
    typer.Option(min=20, max=1200, help="Draw figures with so many dots per inch. Default: 150, for a paper 600."),
]
FigureStyle = Annotated[
    str,
    typer.Option(
        "--style",
        metavar=in_brackets(FIGURE_STYLE),
        help="Draw figures for a screen, or for a paper: without title and prose, in 8-point text, safe in grayscale.",
    ),
]
FigureWidth = Annotated[
    str | None,
    typer.Option(
        metavar="[column|page|INCHES]",
        help="Make a paper's figures as wide as one column, 3.25 inches, as both, 6.75, or as many inches. Default: "
        "column.",
    ),
]

INITIALISERS = (
    *("mimetic", "qk-only", "ov-only", "ov-positive", "fitted", "conv-covariance", "norm-matched", "identity"),
    *("conditioned", "impulse", "transfer-attention", "weight-selection", "transfer-filters"),
    "default",
)
"""Names for the help, which imports no initialiser; a test holds them to the registry."""
InitName = Annotated[
    str | None,
    typer.Option(
        "--init",
        metavar="NAME",
        help=f"Use this initialiser: {', '.join(INITIALISERS)}; `attnlens init --list` says what each does. Default: "
        "fitted with --params, else the one that a file to verify names, else mimetic.",
    ),
]
ParamsFile = Annotated[
    Path | None, typer.Option("--params", "-p", help="Take fitted parameters from this file, written by fit-params.")
]
Gains = Annotated[
    Literal["none", "quantiles", "channels"] | None,
    typer.Option(
        help="Draw balanced products and multiply rows and columns by the gains in --params: by gains of the same "
        "quantiles, for any width, or by those of each channel, for a network of the source's sizes. Default: none.",
    ),
]
InitOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        help="Pass name=value to the initialiser, as often as needed; `attnlens init --list` names the options.",
    ),
]


def draw_in(style: str, width: str | None, format_: str, dpi: int | None) -> None:
    """Draw and write figures in this style until the command ends. Raises `UsageError` for another style or width."""
    settle(chosen(style, width, format_, dpi))


def figure_folder(given: Path | None, models: Sequence[str], *identity: Any) -> Path:
    """Return the folder given, or figures/<models>, which is never that of others of the same names.

    ``identity`` is what was typed of the models: names, files, arguments.
    """
    return given or named_folder(Path("figures"), models, model_identity(*identity))


def parse_layers(text: str | None) -> list[int] | None:
    """Parse ``0-3,11`` into layer indices; None stays None."""
    return layer_choice(text, "--layers")


def parse_model_args(pairs: list[str] | None) -> dict[str, Any]:
    """Parse every ``--model-arg name=value``."""
    return parse_pairs("--model-arg", pairs)


def parse_pairs(option: str, pairs: list[str] | None) -> dict[str, Any]:
    """Parse every ``name=value``: a JSON value (a number, true, [1, 2]) or else text."""
    values: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"{option} {pair!r} is not understood: give name=value, e.g. {option} alpha_qk=0.6")
        if len(text) > LONGEST:
            raise UsageError(f"{option} {name} is given {len(text)} characters: at most {LONGEST} are read")
        try:
            values[name] = parse_json(text, constant=float)
        except ValueError:
            values[name] = text
    return values


def from_json(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Read options by name from a JSON object, or from the part of a ``config.json`` that holds them, as text.

    Lists become words separated by commas, pairs ``a:b``. Raises `UsageError`, for names that are no option too.
    """
    from attnlens.strict_json import read_json

    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {path} cannot be read ({error}): give a JSON file of options") from error
    if isinstance(data, dict) and "sha256" in data:
        if "options" not in data:
            raise UsageError(f"--config {path} is of a version that kept no options: repeat its run's command instead")
        data = data["options"]
    if not isinstance(data, dict):
        raise UsageError(f'--config {path} holds no JSON object: write {{"option": value, ...}}')
    named = {name.replace("-", "_"): value for name, value in data.items()}
    unknown = next((name for name in named if name not in known), None)
    if unknown is not None:
        raise UsageError(f"--config {path} names {unknown}, which is no option: choose from {', '.join(known)}")
    values = {name: value for name, value in named.items() if value is not None}
    for name, value in values.items():
        if not _fits(value, known[name]):
            kind = "true or false" if known[name].is_flag else "text, a number or a list of them"
            raise UsageError(f"--config {path} gives {name} as {json.dumps(value)[:80]}: give {kind}")
    return {name: _as_text(value) for name, value in values.items() if value != []}


def _fits(value: Any, parameter: Any) -> bool:
    """Whether a JSON value can be meant for an option; an empty list is one where nothing is the default."""
    if parameter.is_flag or isinstance(value, bool):
        return bool(parameter.is_flag) and isinstance(value, bool)
    if not isinstance(value, list):
        return isinstance(value, str | int | float)
    parts = [part for item in value for part in (item if isinstance(item, list) else [item])]
    plain = all(isinstance(part, str | int | float) and not isinstance(part, bool) for part in parts)
    return plain and (bool(parts) or (value == [] and parameter.default is None))


def _as_text(value: Any) -> Any:
    if isinstance(value, list):
        return ",".join(":".join(map(str, part)) if isinstance(part, list) else str(part) for part in value)
    return value


def split_words(text: str) -> list[str]:
    """Split what is separated by commas; empty words are dropped."""
    return [word.strip() for word in text.split(",") if word.strip()]

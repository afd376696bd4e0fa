"""Options and arguments that commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class FoldChoice(StrEnum):
    """What is folded into the products."""

    raw = "raw"
    effective = "effective"
    centred = "centred"
    balanced = "balanced"
    both = "both"
    all = "all"


class ComposedFold(StrEnum):
    """One fold."""

    raw = "raw"
    effective = "effective"
    centred = "centred"


class FormatChoice(StrEnum):
    """Formats a figure can be written in."""

    png = "png"
    pdf = "pdf"
    svg = "svg"


Model = Annotated[
    str | None,
    typer.Argument(
        help="timm name (with or without tag), hf-hub: or local-dir: name, checkpoint file or folder; "
        "default: the small ViT shipped with attnlens.",
    ),
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option("--checkpoint", "-c", help="File the weights come from; MODEL then names the architecture."),
]
NumHeads = Annotated[
    int | None,
    typer.Option(help="Heads of each layer, to read a weight file nothing names the architecture of by its names."),
]
Offline = Annotated[bool, typer.Option("--offline", help="Use only what is in the local cache.")]
Remote = Annotated[
    bool, typer.Option("--remote", help="Fetch only the attention tensors of a safetensors file on the hub.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")]


class PerChoice(StrEnum):
    """What an initialiser takes from a parameter file."""

    head = "head"
    layer = "layer"
    model = "model"


class ProductFold(StrEnum):
    """The fold of one set of products."""

    raw = "raw"
    effective = "effective"
    balanced = "balanced"


class ShrinkageChoice(StrEnum):
    """Estimators of a covariance."""

    ledoit_wolf = "ledoit-wolf"
    oas = "oas"
    none = "none"


Figures = Annotated[
    Path | None, typer.Option("--figures", help="Folder for the figures; default: figures/<model>.", show_default=False)
]
FigureFormat = Annotated[FormatChoice, typer.Option("--format", help="Format of the figures.")]
Dpi = Annotated[int, typer.Option(min=20, max=1200, help="Resolution of the figures.")]


InitName = Annotated[str | None, typer.Option("--init", help="Initialiser; fitted where --params is given.")]
ParamsFile = Annotated[Path | None, typer.Option("--params", "-p", help="Parameter file written by fit-params.")]
InitOptions = Annotated[
    list[str] | None,
    typer.Option("--option", help="Option of the initialiser, name=value; several. docs/inits.md lists them."),
]


class DeviceChoice(StrEnum):
    """Where a comparison trains."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class AugmentChoice(StrEnum):
    """Augmentation flavours; a data set's preset names one."""

    none = "none"
    shift = "shift"
    flip_shift = "flip-shift"
    flip_randaugment = "flip-randaugment"

"""The command ``inspect``: measure one model; print its tables, write tables and figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

import attnlens
from attnlens.cli import options
from attnlens.cli.console import command_line, note, tracked, write_stdout
from attnlens.cli.filter_tables import filter_table
from attnlens.cli.tables import in_words, layer_table, print_sheet
from attnlens.outputs import Outputs
from attnlens.words import counted, numbered

if TYPE_CHECKING:
    from attnlens.circuits import Fold
    from attnlens.inspection import Inspection


def inspect(
    model: options.Model = None,
    checkpoint: options.Checkpoint = None,
    output: options.ModelFolder = None,
    num_heads: options.NumHeads = None,
    model_args: options.ModelArgs = None,
    weights: options.Weights = None,
    row_order: options.RowOrder = None,
    fold: options.Folds = "both",
    layers: options.Layers = None,
    layer_spectra: Annotated[
        bool,
        typer.Option("--layer-spectra", help="Measure the eigenvalues of layer sums too, which costs O(d^3) a layer."),
    ] = False,
    include_channel: Annotated[
        bool, typer.Option("--include-channel", help="Read channel attention too, labelled as what it is.")
    ] = False,
    include_linear: Annotated[
        bool, typer.Option("--include-linear", help="Read linear attention too, labelled as what it is.")
    ] = False,
    offline: options.Offline = False,
    remote: options.Remote = False,
    crop: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Show so many dimensions of each product in the heatmaps. Default: 64, fewer where heads are many.",
        ),
    ] = None,
    format_: options.FigureFormat = "png",
    dpi: options.Dpi = None,
    style: options.FigureStyle = "default",
    figure_width: options.FigureWidth = None,
    force: options.Force = False,
    json_: options.Json = False,
) -> None:
    """Fit every head's QK and OV circuit to alpha * noise + beta * identity: table, CSV, JSON and figures.

    Of depthwise convolutions (ConvNeXt, ConvMixer, ...) the covariance of each layer's filters is measured.
    """
    from attnlens.atomic import FileSet
    from attnlens.circuits import parse_folds
    from attnlens.inspection import save_inspection
    from attnlens.statistics.corners import Corners
    from attnlens.threads import import_beside

    options.draw_in(style, figure_width, format_, dpi)
    outputs = Outputs.of(model, checkpoint, force=force)
    if output is not None:
        outputs.folder(output, ("stats.json", "stats.csv", "filters.csv"))
    import_beside(*(f"attnlens.figures.{name}" for name in ("heatmaps", "profiles", "spectra")))
    folds = parse_folds(fold)
    preferred: Fold | None = "effective" if "effective" in folds else None  # not there where norms are not known
    corners = Corners(folds[0], crop or _CROP, bounded=crop is None, preferred=preferred)
    inspection = attnlens.inspect(
        model,
        checkpoint,
        num_heads=num_heads,
        model_args=options.parse_model_args(model_args),
        weights=weights,
        row_order=row_order,
        fold=fold,
        layers=options.parse_layers(layers),
        layer_spectra=layer_spectra,
        include=[kind for kind, wanted in (("channel", include_channel), ("linear", include_linear)) if wanted],
        offline=offline,
        remote=remote,
        progress=tracked("layers"),
        observe=corners.observe,
    )
    if remote:
        note(fetched(inspection.provenance))
    for message in caveats(inspection):
        note(message)
    if corners.size < (crop or _CROP):
        note(f"heatmaps show {corners.size} dimensions of each product, for so many heads: --crop {_CROP} shows more")
    folder = options.figure_folder(output, [inspection.model], model, checkpoint, weights, model_args)
    shown: Fold = "effective" if "effective" in inspection.folds else inspection.folds[0]
    from attnlens.figures import save_figures

    with FileSet(outputs.check) as files:
        save_figures(inspection.figures(shown, corners.size, corners), folder, into=files.write)
        written = save_inspection(inspection, folder, command_line(), files)
        text = files.read(written["stats.json"]).decode()
    if json_:
        write_stdout(text)
    else:
        print_tables(inspection, shown)
    if not model and not checkpoint:
        for line in NEXT:
            note(line)
    drawn = f"{shown}, {format_}" if inspection.specs else format_
    note(f"wrote {', '.join(written)} and figures ({drawn}) to {folder}")


_CROP = 64
"""Dimensions that heatmaps show of each product, by default"""

NEXT = (
    "This is the small ViT that attnlens ships. To go on:",
    "  attnlens fit-params                what of this is more than chance: intervals, p-values, a verdict each",
    "  attnlens inspect --fold balanced   the same without the gain of each channel",
    "  attnlens report                    every head on one HTML page",
    "  attnlens list-models vit_tiny      names to type in place of this model",
)
"""What a first run points to, line by line"""


def print_tables(inspection: Inspection, fold: Fold) -> None:
    """Print the table of attention, where any was read, and that of depthwise filters."""
    if inspection.specs:
        print_sheet(layer_table(inspection, fold))
        write_stdout(in_words(inspection, fold))
    if inspection.filters.specs:
        print_sheet(filter_table(inspection.filters, inspection.model))


def fetched(provenance: dict[str, Any]) -> str:
    """Say how much of a remote file was fetched."""
    if "bytes_fetched" not in provenance:
        return "--remote fetched nothing by range: the file was at hand, or had to be downloaded whole"
    fraction, whole = provenance["bytes_fetched"] / 1e6, provenance["bytes"] / 1e6
    requests = counted(provenance["requests"], "request")
    return f"fetched {fraction:.1f} of {whole:.1f} MB in {requests} from {provenance['url']}"


def caveats(inspection: Inspection) -> list[str]:
    """Say in words what was refused, guessed or left out of the products: one line a reason."""
    filters = inspection.filters
    unread = (*inspection.refused, *filters.refused)
    lines = [f"not read: {r.path} ({r.module_class}) {r.reason}" for r in unread]
    if "sizes" in inspection.provenance:
        lines.append(f"sizes {inspection.provenance['sizes']}")
    stacks = inspection.stacks()
    if len(stacks) > 1:
        lines += [f"{path}: {numbered(layers, 'layer')}" for path, layers in stacks.items()]
    lines += [f"{why}: {numbered(layers, 'layer')}" for why, layers in inspection.left_out().items()]
    return lines + [
        f"{why}: {numbered(own, 'layer of filters', 'layers of filters')}" for why, own in filters.left_out().items()
    ]

"""The commands that look at models: inspect, list-models, fit-params, compare, compose, scan, report, doctor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from attnlens.cli.app import app
from attnlens.cli.options import (
    CheckpointOption,
    ComposedFold,
    Debug,
    Dpi,
    FigureFormat,
    Figures,
    FoldChoice,
    FormatChoice,
    Model,
    NumHeads,
    Offline,
    PerChoice,
    ProductFold,
    Remote,
    ShrinkageChoice,
)


@app.command(short_help="Fit every head and filter covariance: table, CSV, JSON, figures.")
def inspect(
    model: Model = None,
    checkpoint: CheckpointOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for figures and tables; default: figures/<model>.")
    ] = None,
    num_heads: NumHeads = None,
    fold: Annotated[
        FoldChoice,
        typer.Option(
            help="raw products; effective ones with norm gain and LayerScale folded in; centred: effective, with "
            "LayerNorm's centring too; balanced: effective, with one gain a row and a column divided out; "
            "both: raw and effective; all: the four."
        ),
    ] = FoldChoice.both,
    layers: Annotated[
        str | None, typer.Option(help="Layers to read, of attention and of filters, e.g. 0-3,11; default: all.")
    ] = None,
    layer_spectra: Annotated[
        bool, typer.Option("--layer-spectra", help="Also the eigenvalue statistics of layer sums: O(d^3) a layer.")
    ] = False,
    include_channel: Annotated[
        bool, typer.Option("--include-channel", help="Also read channel attention, labelled as what it is.")
    ] = False,
    include_linear: Annotated[
        bool, typer.Option("--include-linear", help="Also read linear attention, labelled as what it is.")
    ] = False,
    offline: Offline = False,
    remote: Remote = False,
    crop: Annotated[int, typer.Option(min=2, help="Dimensions of each product the heatmaps show.")] = 64,
    format_: Annotated[FormatChoice, typer.Option("--format", help="Format of the figures.")] = FormatChoice.png,
    dpi: Annotated[int, typer.Option(min=20, max=1200, help="Resolution of the figures.")] = 150,
    json_: Annotated[bool, typer.Option("--json", help="Print stats.json on stdout in place of the table.")] = False,
    debug: Debug = False,  # noqa: ARG001  # read from sys.argv in main, listed here for --help
) -> None:
    """Fit every head's QK and OV circuit to alpha * noise + beta * identity: table, CSV, JSON and figures.

    Of depthwise convolutions (ConvNeXt, ConvMixer, ...) the covariance of each layer's filters is measured.
    """
    from attnlens.cli.inspecting import run_inspect

    run_inspect(
        model,
        checkpoint,
        output=output,
        num_heads=num_heads,
        fold=fold.value,
        layers=layers,
        layer_spectra=layer_spectra,
        include=[kind for kind, asked in (("channel", include_channel), ("linear", include_linear)) if asked],
        offline=offline,
        remote=remote,
        crop=crop,
        format_=format_.value,
        dpi=dpi,
        as_json=json_,
        command=["attnlens", *sys.argv[1:]],
    )


@app.command(short_help="List timm's architectures and what is read of them.")
def list_models(
    pattern: Annotated[
        str | None,
        typer.Argument(help="Part of a name (tags count), or a shell pattern for all of it: 'vit_*dinov2*'."),
    ] = None,
    family: Annotated[str | None, typer.Option(help="Only architectures with attention of this layout family.")] = None,
    cached: Annotated[bool, typer.Option("--cached", help="Only those with weights in the local cache.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON on stdout in place of the table.")] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build the catalogue of the installed timm anew: takes minutes.")
    ] = False,
    debug: Debug = False,  # noqa: ARG001  # read from sys.argv in main, listed here for --help
) -> None:
    """List timm's architectures with attention or depthwise filters: heads, kernels, what is read, pretrained tags."""
    from attnlens.cli.listing import run_list

    run_list(pattern, family=family, cached=cached, as_json=json_, rebuild=rebuild)


@app.command(short_help="Judge every fit; write a parameter file.")
def fit_params(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="As for inspect; several are pooled.")
    ] = None,
    checkpoint: CheckpointOption = None,
    per: Annotated[
        PerChoice,
        typer.Option(help="What an initialiser takes: QK head by head and OV by layer; layer means; one pair for all."),
    ] = PerChoice.head,
    fold: Annotated[ProductFold, typer.Option(help="Which products are fitted.")] = ProductFold.effective,
    level: Annotated[float, typer.Option(min=0.5, max=0.999, help="Coverage of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the sampled statistics.")] = 0,
    num_heads: NumHeads = None,
    shrinkage: Annotated[
        ShrinkageChoice, typer.Option(help="Of the covariances of depthwise filters towards equal variances.")
    ] = ShrinkageChoice.ledoit_wolf,
    offline: Offline = False,
    remote: Remote = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Parameter file to write.")] = Path("params.json"),
    figures: Figures = None,
    format_: FigureFormat = FormatChoice.png,
    dpi: Dpi = 150,
    json_: Annotated[bool, typer.Option("--json", help="Print the file on stdout in place of the table.")] = False,
    debug: Debug = False,  # noqa: ARG001  # read from sys.argv in main, listed here for --help
) -> None:
    """Fit alpha and beta with intervals and verdicts, and write the parameter file that drives an initialiser."""
    from attnlens.cli.fitting import run_fit

    run_fit(
        models or [],
        checkpoint,
        per=per.value,
        fold=fold.value,
        level=level,
        seed=seed,
        num_heads=num_heads,
        shrinkage=shrinkage.value,
        offline=offline,
        remote=remote,
        output=output,
        figures=figures,
        format_=format_.value,
        dpi=dpi,
        as_json=json_,
        command=["attnlens", *sys.argv[1:]],
    )


@app.command(short_help="Compare models by depth.")
def compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL MODEL...", help="As for inspect.")],
    checkpoints: Annotated[
        list[Path] | None, typer.Option("--checkpoint", "-c", help="A file for each MODEL, in their order.")
    ] = None,
    fold: Annotated[ProductFold, typer.Option(help="Which products are compared.")] = ProductFold.effective,
    offline: Offline = False,
    remote: Remote = False,
    figures: Figures = None,
    format_: FigureFormat = FormatChoice.png,
    dpi: Dpi = 150,
    json_: Annotated[bool, typer.Option("--json", help="Print the distances as JSON.")] = False,
    debug: Debug = False,  # noqa: ARG001  # read from sys.argv in main, listed here for --help
) -> None:
    """Compare models: depth profiles side by side, and a distance between their structures."""
    from attnlens.cli.fitting import run_compare

    run_compare(
        models,
        fold=fold.value,
        checkpoints=checkpoints or [],
        offline=offline,
        remote=remote,
        figures=figures,
        format_=format_.value,
        dpi=dpi,
        as_json=json_,
    )


@app.command(short_help="Score how heads compose over layers.")
def compose(
    model: Model = None,
    checkpoint: CheckpointOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for table and figures; default: figures/<model>.")
    ] = None,
    num_heads: NumHeads = None,
    fold: Annotated[ComposedFold, typer.Option(help="Which products compose.")] = ComposedFold.effective,
    layers: Annotated[str | None, typer.Option(help="Layers to read, e.g. 0-3,11; default: all.")] = None,
    top: Annotated[int, typer.Option(min=0, help="Pairs of each kind in the table.")] = 5,
    offline: Offline = False,
    remote: Remote = False,
    format_: FigureFormat = FormatChoice.png,
    dpi: Dpi = 150,
    json_: Annotated[bool, typer.Option("--json", help="Print composition.json in place of the table.")] = False,
    debug: Debug = False,  # noqa: ARG001  # read from sys.argv in main, listed here for --help
) -> None:
    """Score the Q-, K- and V-composition of every head with every head of an earlier layer."""
    from attnlens.cli.composing import run_compose

    run_compose(
        model,
        checkpoint,
        output=output,
        num_heads=num_heads,
        fold=fold.value,
        layers=layers,
        top=top,
        offline=offline,
        remote=remote,
        format_=format_.value,
        dpi=dpi,
        as_json=json_,
        command=["attnlens", *sys.argv[1:]],
    )


@app.command(short_help="Inspect hundreds of models; go on where stopped.")
def scan(
    patterns: Annotated[
        list[str],
        typer.Argument(
            metavar="PATTERN...",
            help="Names as for inspect; shell patterns over timm's pretrained names: 'vit_*dinov2*'; folders and "
            "files: 'runs/**'; ARCHITECTURE=FILES for files that do not say what they are of; @FILE, a list of these.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results, tables and figure.")],
    fold: Annotated[FoldChoice, typer.Option(help="Which products are measured, as for inspect.")] = FoldChoice.both,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Models at a time; default: one a core, here or of the cluster."),
    ] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="Run on the Ray cluster there; auto: the one here.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Measure again what failed; default: only what is missing.")
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="Only print the models that would be measured.")] = False,
    offline: Offline = False,
    remote: Remote = False,
    format_: FigureFormat = FormatChoice.png,
    dpi: Dpi = 150,
    json_: Annotated[bool, typer.Option("--json", help="Print scan.json on stdout in place of the table.")] = False,
    debug: Debug = False,  # noqa: ARG001  # read from sys.argv in main, listed here for --help
) -> None:
    """Inspect every model the patterns match: a result file each, one table, one figure; stopped, it can go on."""
    from attnlens.cli.scanning import run_scan

    run_scan(
        patterns,
        output,
        fold=fold.value,
        workers=workers,
        ray=ray,
        retry_failed=retry_failed,
        only_list=list_,
        offline=offline,
        remote=remote,
        format_=format_.value,
        dpi=dpi,
        as_json=json_,
        command=["attnlens", *sys.argv[1:]],
    )


@app.command(short_help="Write one HTML page about a model.")
def report(
    model: Model = None,
    checkpoint: CheckpointOption = None,
    compare: Annotated[
        list[str] | None, typer.Option("--compare", metavar="MODEL", help="A model to show beside it; may be repeated.")
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option("--train", metavar="RESULTS_DIR", help="Output folder of train-compare, to show its curves."),
    ] = None,
    fold: Annotated[FoldChoice, typer.Option(help="Which products are shown, as for inspect.")] = FoldChoice.both,
    num_heads: NumHeads = None,
    offline: Offline = False,
    remote: Remote = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    debug: Debug = False,  # noqa: ARG001  # read from sys.argv in main, listed here for --help
) -> None:
    """Write one self-contained HTML page about a model: every head's fit, verdict, heatmaps and spectra, by depth."""
    from attnlens.cli.reporting import run_report

    run_report(
        model,
        checkpoint,
        compare=compare or [],
        train=train,
        fold=fold.value,
        num_heads=num_heads,
        offline=offline,
        remote=remote,
        output=output,
        command=["attnlens", *sys.argv[1:]],
    )


@app.command(short_help="Say what is installed and what is missing.")
def doctor(
    json_: Annotated[bool, typer.Option("--json", help="Print JSON on stdout in place of the table.")] = False,
    debug: Debug = False,  # noqa: ARG001  # read from sys.argv in main, listed here for --help
) -> None:
    """Say which versions, devices and caches attnlens finds here, what is missing, and how to get it."""
    from attnlens.cli.doctor import run_doctor

    run_doctor(as_json=json_)

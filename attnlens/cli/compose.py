"""The command ``compose``: score how heads compose, print the strongest pairs, write table and figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

import attnlens
from attnlens.cli import options
from attnlens.cli.console import command_line, note, tracked, write_stdout
from attnlens.cli.sheet import Sheet
from attnlens.cli.tables import escape, print_sheet
from attnlens.outputs import Outputs
from attnlens.words import counted, numbered

if TYPE_CHECKING:
    import numpy as np

    from attnlens.composition import Composed, Composition


def compose(
    model: options.Model = None,
    checkpoint: options.Checkpoint = None,
    output: options.ModelFolder = None,
    num_heads: options.NumHeads = None,
    model_args: options.ModelArgs = None,
    weights: options.Weights = None,
    row_order: options.RowOrder = None,
    fold: Annotated[
        str,
        typer.Option(
            metavar="[raw|effective|centred]",
            help="Compose raw products, effective ones, or centred ones, as inspect has them.",
        ),
    ] = "effective",
    layers: options.Layers = None,
    all_pairs: Annotated[
        bool,
        typer.Option(
            "--all-pairs",
            help="Write every pair of heads to both tables. Default: the strongest 100,000 of each kind.",
        ),
    ] = False,
    top: Annotated[int, typer.Option(min=0, help="Show so many pairs of each kind in the table.")] = 5,
    offline: options.Offline = False,
    remote: options.Remote = False,
    format_: options.FigureFormat = "png",
    dpi: options.Dpi = None,
    style: options.FigureStyle = "default",
    figure_width: options.FigureWidth = None,
    force: options.Force = False,
    json_: options.Json = False,
) -> None:
    """Score the Q-, K- and V-composition of every head with every head of an earlier layer."""
    from attnlens.composition_files import save_composition
    from attnlens.inspection import UNSAID
    from attnlens.layouts.flags import FLAGS, layers_by_reason
    from attnlens.threads import import_beside

    options.draw_in(style, figure_width, format_, dpi)
    outputs = Outputs.of(model, checkpoint, force=force)
    if output is not None:
        outputs.folder(output, ("composition.csv", "composition.json"))
    import_beside("attnlens.figures.composition")
    composition = attnlens.compose(
        model,
        checkpoint,
        num_heads=num_heads,
        model_args=options.parse_model_args(model_args),
        weights=weights,
        row_order=row_order,
        fold=fold,
        layers=options.parse_layers(layers),
        offline=offline,
        remote=remote,
        progress=tracked("layers"),
    )
    for flag in dict.fromkeys(
        flag for flags in composition.leaves_out.values() for flag in flags if flag not in UNSAID
    ):
        flagged = [layer for layer, flags in composition.leaves_out.items() if flag in flags]
        note(f"{FLAGS[flag]}: {numbered(flagged, 'layer')}")
    for label, labelled in layers_by_reason((layer, [label]) for layer, label in composition.labels.items()).items():
        note(f"{label}: {numbered(labelled, 'layer')}")
    from attnlens.atomic import FileSet
    from attnlens.figures import save_figures

    folder = options.figure_folder(output, [composition.model], model, checkpoint, weights, model_args)
    with FileSet(outputs.check) as files:
        save_figures(composition.figures(), folder, into=files.write)
        pairs = save_composition(composition, folder, command_line(), files, all_pairs=all_pairs)
        text = files.read(folder / "composition.json").decode() if json_ else ""
    if json_:
        write_stdout(text.rstrip())
    else:
        print_sheet(strongest_table(composition, top))
    if pairs.written < pairs.found:
        note(
            f"both tables hold the {pairs.written} strongest of {counted(pairs.found, 'pair')} of heads, by score over "
            "baseline: --all-pairs writes all"
        )
    note(f"wrote composition.csv, composition.json and figures ({composition.fold}, {format_}) to {folder}")


def strongest_table(composition: Composition, top: int) -> Sheet:
    """Build the table: for each kind the pairs of the largest score over baseline, and the median over all pairs."""
    import numpy as np

    from attnlens.composition import KINDS

    table = Sheet(
        title=f"[bold]{escape(composition.model)}[/bold]: composition of heads, {composition.fold}",
        caption="score over the baseline 1/√d of unrelated directions; heads are layer.head\n"
        "deviation: squared score less 1/d, in standard deviations of random rotations",
    )
    table.label("kind", key=True)
    table.number("writes", "reads", key=True)
    table.number("score", "÷ baseline", "deviation")
    for kind in KINDS:
        ratios, pairs, deviations = _pairs(composition, kind)
        for rank in np.argsort(-ratios, kind="stable")[:top]:
            first, i, second, j = pairs[rank]
            score = ratios[rank] * composition.baseline(int(second))
            cells = (
                f"{first}.{i}",
                f"{second}.{j}",
                f"{score:.4f}",
                f"{ratios[rank]:.2f}",
                f"{deviations[rank]:.1f}",
            )
            table.add_row(kind.upper(), *cells)
        if len(ratios):
            table.add_row(
                kind.upper(), "median", f"of {len(ratios)}", "", f"{np.median(ratios):.2f}", "", end_section=True
            )
    return table


def _pairs(composition: Composition, kind: Composed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return score over baseline, (earlier layer, head, later layer, head) and deviation of every defined pair."""
    import numpy as np

    ratios, pairs, deviations = [np.empty(0)], [np.empty((0, 4), np.int32)], [np.empty(0)]
    for (of, first, second), scores in composition.scores.items():
        if of == kind:
            i, j = np.nonzero(np.isfinite(scores))
            ratios.append(scores[i, j] / composition.baseline(second))
            pairs.append(np.stack((np.full_like(i, first), i, np.full_like(i, second), j), axis=1).astype(np.int32))
            deviations.append(composition.deviations[of, first, second][i, j])
    return np.concatenate(ratios), np.concatenate(pairs), np.concatenate(deviations)

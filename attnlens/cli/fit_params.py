"""The command ``fit-params``: fit models, print the fits, write the parameter file and figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import attnlens
from attnlens.cli import options
from attnlens.cli.console import command_line, note, tracked, write_stdout
from attnlens.cli.filter_tables import fit_filter_table
from attnlens.cli.sheet import Sheet
from attnlens.cli.tables import escape, number, print_sheet
from attnlens.outputs import Outputs
from attnlens.vocabulary import FOLD, PER, SHRINKAGE
from attnlens.words import numbered

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from attnlens.fit.entries import Entry, Source
    from attnlens.fit.params import InitParams

_MARKS = {
    "identity": "+",
    "negative identity": "-",
    "identity + low rank": "p",
    "negative identity + low rank": "n",
    "mixed diagonal": "±",
    "none": "·",
    "not described by this model": "?",
}
_LEGEND = "  ".join(f"{mark} {verdict}" for verdict, mark in _MARKS.items())


def fit_params(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Models as for inspect; several are pooled.")
    ] = None,
    checkpoint: options.Checkpoint = None,
    per: Annotated[
        str,
        typer.Option(
            metavar=options.in_brackets(PER),
            help="Give an initialiser QK head by head and OV by layer; layer means; or one pair for all.",
        ),
    ] = "head",
    fold: options.ProductFold = "effective",
    level: Annotated[float, typer.Option(min=0.5, max=0.999, help="Set the coverage of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Use this seed for the statistics that are sampled.")] = 0,
    num_heads: options.NumHeads = None,
    model_args: options.ModelArgs = None,
    weights: options.Weights = None,
    row_order: options.RowOrder = None,
    shrinkage: Annotated[
        str,
        typer.Option(
            metavar=options.in_brackets(SHRINKAGE),
            help="Shrink covariances of depthwise filters towards equal variances by this estimator.",
        ),
    ] = "ledoit-wolf",
    offline: options.Offline = False,
    remote: options.Remote = False,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", parser=options.as_typed, help="Write this parameter file."),
    ] = Path("params.json"),
    figures: options.Figures = None,
    format_: options.FigureFormat = "png",
    dpi: options.Dpi = None,
    style: options.FigureStyle = "default",
    figure_width: options.FigureWidth = None,
    force: options.Force = False,
    json_: options.Json = False,
) -> None:
    """Fit alpha and beta with intervals and verdicts, and write the parameter file that drives an initialiser."""
    from attnlens.atomic import FileSet
    from attnlens.threads import import_beside

    options.draw_in(style, figure_width, format_, dpi)
    outputs = Outputs.of(models, checkpoint, force=force)
    outputs.file(output, ".json")
    if figures is not None:
        outputs.folder(figures)
    import_beside("attnlens.fit.figures")
    params = attnlens.fit_params(
        *(models or []),
        checkpoint=checkpoint,
        per=PER(per),
        fold=FOLD(fold),
        level=level,
        seed=seed,
        num_heads=num_heads,
        model_args=options.parse_model_args(model_args),
        weights=weights,
        row_order=row_order,
        shrinkage=SHRINKAGE(shrinkage),
        offline=offline,
        remote=remote,
        command=command_line(),
        progress=tracked("layers"),
    )
    for source in params.sources:
        for message in caveats(source):
            note(f"{source.model}: {message}")
    from attnlens.figures import save_figures

    names = [source.model for source in params.sources]
    folder = options.figure_folder(figures, names, *(models or ()), checkpoint, weights, model_args)
    with FileSet(outputs.check) as files:
        save_figures(params.figures(), folder, into=files.write)
        files.write(output, lambda file: file.write(params.to_json().encode()))
    if json_:
        write_stdout(params.to_json())
    else:
        for table in fit_tables(params):
            print_sheet(table)
    note(f"wrote {output}, and figures to {folder}")


def fit_tables(params: InitParams) -> Iterator[Sheet]:
    """Yield the tables of a parameter file: by source what was fitted of attention and of filters, then all pooled."""
    for source in range(len(params.sources)):
        if any(entry.source == source for entry in params.entries):
            yield fit_table(params, source)
        if any(entry.source == source for entry in params.filters):
            yield fit_filter_table(params, source)
    if params.pooled:
        yield pooled_table(params)


def caveats(source: Source) -> list[str]:
    """Say in words what is not in the fit of a model: modules not read, and what the products leave out."""
    from attnlens.inspection import UNSAID
    from attnlens.layouts.flags import FLAGS

    unsaid = {FLAGS[flag] for flag in UNSAID}
    unread = [f"not read: {what}" for what in source.not_read]
    left_out = [(why, layers) for why, layers in source.left_out.items() if why not in unsaid]
    return unread + [f"{why}: {numbered(layers, 'layer')}" for why, layers in left_out]


def fit_table(params: InitParams, source: int) -> Sheet:
    """Build the table of one model: per layer QK and OV with verdicts, realised beside requested."""
    from attnlens.fit.entries import by_layer, select

    entries = [entry for entry in params.entries if entry.source == source and entry.fold == params.fold]
    percent = f"{params.level:.0%}"
    table = Sheet(
        title=f"[bold]{escape(params.sources[source].model)}[/bold]: {params.fold} products, M ~ α Z + β I",
        caption=f"QK: mean over heads; OV: sum over heads with its {percent} interval; request: (α, β) to draw with\n"
        f"a mark a head: {_LEGEND}",
    )
    table.number("layer", key=True)
    table.number("QK α", "QK β", "request")
    table.label("QK", least=6)
    table.number("OV α", "OV β", f"β {percent}", group=1)
    table.label("OV verdict", group=1)
    for layer, of_layer in by_layer(entries).items():
        qk = select(of_layer, "qk", "each")
        total = select(of_layer, "ov", "all")
        cells = [
            str(layer),
            *_means(qk, "alpha", "beta"),
            _requested(qk),
            "".join(_MARKS[entry.verdict] for entry in qk),
        ]
        cells += _means(total, "alpha", "beta")
        cells += [f"[{number(e.beta_low)}, {number(e.beta_high)}]" for e in total] or [""]
        cells += [e.verdict for e in total] or [""]
        table.add_row(*(escape(cell) for cell in cells))
    return table


def pooled_table(params: InitParams) -> Sheet:
    """Build the table of what is pooled over layers, heads and models, in requests."""
    from collections import Counter

    names = {("qk", "each"): "QK, per head", ("ov", "each"): "OV, per head", ("ov", "all"): "OV, layer sum"}
    table = Sheet("[bold]Pooled requests[/bold]")
    table.label("circuit", key=True)
    table.number("n", "α ± sd", "β ± sd", "between models α, β")
    table.label("verdicts", least=20)
    for pooled in params.pooled:
        alpha, beta = pooled.alpha, pooled.beta
        spread = "one model"
        if alpha.between_model_sd is not None and beta.between_model_sd is not None:
            spread = f"{number(alpha.between_model_sd)}, {number(beta.between_model_sd)}"
        counts = Counter(entry.verdict for entry in params.select(pooled.circuit, pooled.head))
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
        cells = [names[pooled.circuit, pooled.head], str(alpha.n), f"{number(alpha.mean)} ± {number(alpha.sd)}"]
        table.add_row(*cells, f"{number(beta.mean)} ± {number(beta.sd)}", spread, verdicts)
    return table


def _means(entries: Sequence[Entry], *names: str) -> list[str]:

    if not entries:
        return [""] * len(names)
    return [number(sum(getattr(entry, name) for entry in entries) / len(entries)) for name in names]


def _requested(entries: Sequence[Entry]) -> str:
    return "({}, {})".format(*_means(entries, "request_alpha", "request_beta")) if entries else ""

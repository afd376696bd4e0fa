"""What `attnlens fit-params` and `attnlens compare` do: fit, print, write."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.table import Table

from attnlens.atomic import FileSet
from attnlens.circuits import Fold, Kind
from attnlens.cli.console import note, tracked, write_stdout
from attnlens.cli.filters import filter_distance_table, fit_filter_table
from attnlens.cli.inspecting import figure_folder, format_layers
from attnlens.cli.terminal import escape, number, plain_table, print_wide
from attnlens.filters.entries import Estimator
from attnlens.fit.comparison import Comparison, compare
from attnlens.fit.fit_params import fit_params
from attnlens.fit.params import Entry, InitParams, Per, Source
from attnlens.inspection import UNSAID
from attnlens.layouts.flags import FLAGS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_UNSAID = {FLAGS[flag] for flag in UNSAID}
_MARKS = {"identity": "+", "negative identity": "-", "none": "·", "not described by this model": "?"}
_LEGEND = "  ".join(f"{mark} {verdict}" for verdict, mark in _MARKS.items())


def run_fit(
    models: Sequence[str],
    checkpoint: Path | None,
    *,
    per: Per,
    fold: Fold,
    level: float,
    seed: int,
    num_heads: int | None,
    shrinkage: Estimator,
    offline: bool,
    remote: bool,
    output: Path,
    figures: Path | None,
    format_: str,
    dpi: int,
    as_json: bool,
    command: list[str],
) -> None:
    """Fit one or more models, print the fit by layer (or the file itself), write the parameter file and figures."""
    params = fit_params(
        *models,
        checkpoint=checkpoint,
        per=per,
        fold=fold,
        level=level,
        seed=seed,
        num_heads=num_heads,
        shrinkage=shrinkage,
        offline=offline,
        remote=remote,
        command=shlex.join(command),
        progress=tracked("layers"),
    )
    for source in params.sources:
        for message in caveats(source):
            note(f"{source.model}: {message}")
    from attnlens.figures import save_figures
    from attnlens.fit.figures import draw_fits

    folder = figure_folder(figures, "+".join(source.model for source in params.sources))
    with FileSet() as files:
        save_figures(draw_fits(params), folder, format_, dpi, into=files.write)
        files.write(output, lambda file: file.write(params.to_json().encode()))
    if as_json:
        write_stdout(params.to_json())
    else:
        for table in fit_tables(params):
            print_wide(table)
    note(f"wrote {output}, and figures to {folder}")


def fit_tables(params: InitParams) -> Iterator[Table]:
    """Yield the tables of a parameter file: by source what was fitted of attention and of filters, then all pooled."""
    for place in range(len(params.sources)):
        if any(entry.source == place for entry in params.entries):
            yield fit_table(params, place)
        if any(entry.source == place for entry in params.filters):
            yield fit_filter_table(params, place)
    if params.pooled:
        yield pooled_table(params)


def caveats(source: Source) -> list[str]:
    """Say in words what is not in the fit of a model: modules not read, and what the products leave out."""
    unread = [f"not read: {what}" for what in source.not_read]
    said = [(why, layers) for why, layers in source.left_out.items() if why not in _UNSAID]
    return unread + [f"{why}: layers {format_layers(layers)}" for why, layers in said]


def fit_table(params: InitParams, source: int) -> Table:
    """Build the table of one model: per layer QK and OV with verdicts, realised beside requested."""
    entries = [entry for entry in params.entries if entry.source == source and entry.fold == params.fold]
    percent = f"{params.level:.0%}"
    table = plain_table(
        title=f"[bold]{escape(params.sources[source].model)}[/bold]: {params.fold} products, M ~ α Z + β I",
        caption=f"QK: mean over heads; OV: sum over heads with its {percent} interval; request: (α, β) to draw with\n"
        f"a mark a head: {_LEGEND}",
    )
    for name in ("layer", "QK α", "QK β", "request"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("QK", overflow="fold", min_width=6)
    for name in ("OV α", "OV β", f"β {percent}"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("OV verdict", no_wrap=True)
    for layer in dict.fromkeys(entry.layer for entry in entries):
        qk = _entries(entries, layer, "qk", "each")
        total = _entries(entries, layer, "ov", "all")
        cells = [str(layer), *_means(qk, "alpha", "beta"), _asked(qk), "".join(_MARKS[entry.verdict] for entry in qk)]
        cells += _means(total, "alpha", "beta")
        cells += [f"[{number(e.beta_low)}, {number(e.beta_high)}]" for e in total] or [""]
        cells += [e.verdict for e in total] or [""]
        table.add_row(*(escape(cell) for cell in cells))
    return table


def pooled_table(params: InitParams) -> Table:
    """Build the table of what is pooled over layers, heads and models, in requests."""
    names = {("qk", "each"): "QK, per head", ("ov", "each"): "OV, per head", ("ov", "all"): "OV, layer sum"}
    table = Table(
        title="Pooled requests", title_justify="left", box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False
    )
    for name in ("circuit", "n", "α ± sd", "β ± sd", "between models α, β", "verdicts"):
        table.add_column(name, no_wrap=name != "verdicts")
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


def run_compare(
    models: Sequence[str],
    *,
    fold: Fold,
    checkpoints: Sequence[Path],
    offline: bool,
    remote: bool,
    figures: Path | None,
    format_: str,
    dpi: int,
    as_json: bool,
) -> None:
    """Compare models: print the distances, draw the profiles side by side."""
    comparison = compare(
        *models, fold=fold, checkpoints=checkpoints, offline=offline, remote=remote, progress=tracked("layers")
    )
    if as_json:
        import json

        write_stdout(
            json.dumps(
                {
                    "fold": fold,
                    "models": comparison.models,
                    "distances": comparison.distances,
                    "filter_distances": comparison.filter_distances,
                },
                indent=1,
            )
        )
    else:
        if comparison.distances:
            print_wide(distance_table(comparison))
        if comparison.filter_distances:
            print_wide(filter_distance_table(comparison))
    from attnlens.figures import save_figures
    from attnlens.fit.figures import draw_comparisons

    folder = figure_folder(figures, "+".join(comparison.models))
    drawn = draw_comparisons(comparison)
    save_figures(drawn, folder, format_, dpi)
    note(f"wrote {' and '.join(f'{name}.{format_}' for name in drawn)} to {folder}")


def distance_table(comparison: Comparison) -> Table:
    """Build the table of distances between each pair of models."""
    table = Table(
        title=f"Distance between {comparison.fold} structures",
        caption="identity: rms over depth of the difference in identity cosine / bound, 0 to 2\n"
        "noise: the same of log10 alpha",
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("first", "second", "circuit", "identity", "noise"):
        table.add_column(name, justify="right" if name in ("identity", "noise") else "left")
    for row in comparison.distances:
        noise = "" if row["log_alpha"] is None else f"{row['log_alpha']:.3f}"
        table.add_row(
            escape(row["first"]), escape(row["second"]), row["circuit"].upper(), f"{row['identity_share']:.3f}", noise
        )
    return table


def _entries(entries: Sequence[Entry], layer: int, circuit: Kind, head: Literal["each", "all"]) -> list[Entry]:
    return [e for e in entries if (e.layer, e.circuit) == (layer, circuit) and (e.head == "all") == (head == "all")]


def _means(entries: Sequence[Entry], *names: str) -> list[str]:
    if not entries:
        return [""] * len(names)
    return [number(sum(getattr(entry, name) for entry in entries) / len(entries)) for name in names]


def _asked(entries: Sequence[Entry]) -> str:
    return "({}, {})".format(*_means(entries, "request_alpha", "request_beta")) if entries else ""

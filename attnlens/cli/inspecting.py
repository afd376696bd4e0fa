"""What `attnlens inspect` does: read and fit, print, write."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

from attnlens.atomic import FileSet
from attnlens.circuits import Fold
from attnlens.cli.console import note, tracked, write_stdout
from attnlens.errors import UsageError
from attnlens.inspection import Inspection, inspect, save_inspection


def run_inspect(
    model: str | None,
    checkpoint: Path | None,
    *,
    output: Path | None,
    num_heads: int | None,
    fold: str,
    layers: str | None,
    layer_spectra: bool,
    include: list[str],
    offline: bool,
    remote: bool,
    crop: int,
    format_: str,
    dpi: int,
    as_json: bool,
    command: list[str],
) -> None:
    """Inspect one model, print its table (or JSON) on stdout, write tables and figures, say where on stderr."""
    Thread(target=import_module, args=("attnlens.figures",), daemon=True).start()  # while the layers are measured
    inspection = inspect(
        model,
        checkpoint,
        num_heads=num_heads,
        fold=fold,
        layers=parse_layers(layers),
        layer_spectra=layer_spectra,
        include=include,
        offline=offline,
        remote=remote,
        progress=tracked("layers"),
    )
    if remote:
        note(fetched(inspection.provenance))
    for message in caveats(inspection):
        note(message)
    folder = figure_folder(output, inspection.model)
    shown: Fold = "effective" if "effective" in inspection.folds else inspection.folds[0]
    from attnlens.figures import save_figures

    with FileSet() as files:
        save_figures(inspection.figures(shown, crop), folder, format_, dpi, into=files.write)
        written = save_inspection(inspection, folder, shlex.join(command), files)
        text = files.read(written["stats.json"]).decode()
    if as_json:
        write_stdout(text)
    else:
        print_tables(inspection, shown)
    *tables, last = written
    drawn = f"{shown}, {format_}" if inspection.specs else format_
    note(f"wrote {', '.join([*tables, last])} and figures ({drawn}) to {folder}")


def print_tables(inspection: Inspection, fold: Fold) -> None:
    """Print the table of attention, where any was read, and that of depthwise filters."""
    from attnlens.cli.filters import filter_table
    from attnlens.cli.terminal import print_table, print_wide

    if inspection.specs:
        print_table(inspection, fold)
    if inspection.filters.specs:
        print_wide(filter_table(inspection.filters, inspection.model))


def fetched(provenance: dict[str, Any]) -> str:
    """Say how much of a remote file was fetched."""
    if "bytes_fetched" not in provenance:
        return "--remote fetched nothing by range: the file was at hand, or had to be downloaded whole"
    part, whole = provenance["bytes_fetched"] / 1e6, provenance["bytes"] / 1e6
    return f"fetched {part:.1f} of {whole:.1f} MB in {provenance['requests']} requests from {provenance['url']}"


def figure_folder(given: Path | None, model: str) -> Path:
    """Return the folder given, or figures/<model> with every character that is awkward in a path replaced."""
    return given or Path("figures") / re.sub(r"[^\w.+-]+", "_", model)


def caveats(inspection: Inspection) -> list[str]:
    """Say in words what was refused, guessed or left out of the products: one line a reason."""
    filters = inspection.filters
    unread = (*inspection.refused, *filters.refused)
    said = [f"not read: {r.path} ({r.module_class}) {r.reason}" for r in unread]
    stacks = inspection.stacks()
    if len(stacks) > 1:
        said += [f"{path}: layers {format_layers(layers)}" for path, layers in stacks.items()]
    said += [f"{why}: layers {format_layers(layers)}" for why, layers in inspection.left_out().items()]
    return said + [f"{why}: layers of filters {format_layers(own)}" for why, own in filters.left_out().items()]


def parse_layers(text: str | None) -> list[int] | None:
    """Parse ``0-3,11`` into layer indices; None stays None."""
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise UsageError(f"--layers {text!r} is not understood: give indices and ranges, e.g. 0-3,11")
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return layers


def format_layers(layers: list[int]) -> str:
    """Write layer indices as ranges: ``0-3, 11``."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)

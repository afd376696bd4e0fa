"""The command ``list-models``: select from the catalogue; print a table, tab-separated lines or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnlens.cli import options
from attnlens.cli.console import note, tracked, write_stdout
from attnlens.cli.sheet import Sheet
from attnlens.cli.tables import print_sheet
from attnlens.printable import printable
from attnlens.words import counted

if TYPE_CHECKING:
    from attnlens.models.catalogue import Catalogue, Entry

COLUMNS = ("name", "layers", "read", "labelled", "heads", "width", "families", "filters", "kernels", "tags")


def list_models(
    pattern: Annotated[
        str | None,
        typer.Argument(help="Part of a name (tags count), or a shell pattern for all of it: 'vit_*dinov2*'."),
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="List only architectures with attention of this layout family.")
    ] = None,
    cached: Annotated[bool, typer.Option("--cached", help="List only those with weights in the local cache.")] = False,
    json_: options.Json = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build the catalogue of the installed timm anew: this takes minutes.")
    ] = False,
) -> None:
    """List timm's architectures with attention or depthwise filters: heads, kernels, what is read, pretrained tags."""
    import sys
    from dataclasses import replace

    from attnlens.models.catalogue import load_catalogue

    catalogue = load_catalogue(_announced, rebuild=rebuild)
    entries = catalogue.select(pattern, family)
    if cached:
        from attnlens.checkpoints.hub import cached_tags

        pairs = ((entry, cached_tags(entry.tags)) for entry in entries)
        entries = [replace(entry, tags=tags) for entry, tags in pairs if tags]
    if json_:
        write_stdout(json.dumps(to_json(catalogue, entries), indent=1))
    elif sys.stdout.isatty():
        _print_table(catalogue, entries)
    else:
        lines = (COLUMNS, *(row(entry) for entry in entries))
        write_stdout("\n".join("\t".join(map(printable, line)) for line in lines))
    if not entries:
        note("none of them has weights in the local cache" if cached else "none of them is of that family")
    for name, error in catalogue.failed.items():
        note(f"not built: {name} ({error})")


def _announced(names: Iterable[Any]) -> Iterator[Any]:
    """Say what takes so long, and show how far it is."""
    note("building every architecture of the installed timm once; this takes minutes, and can be stopped and resumed")
    return tracked("architectures")(names)


def to_json(catalogue: Catalogue, entries: list[Entry]) -> dict[str, Any]:
    """Return chosen entries with the catalogue's header as JSON-ready data."""
    header = {"schema": "attnlens.models", "schema_version": 2, "timm": catalogue.timm, "origin": catalogue.origin}
    return {**header, "rules": catalogue.rules, "models": [entry.to_json() for entry in entries]}


def row(entry: Entry) -> tuple[str, ...]:
    """Return an entry's cells in the order of `COLUMNS`."""
    labelled = " ".join(f"{count} {kind}" for kind, count in entry.labelled.items())
    counts = (str(entry.layers), str(entry.readable), labelled)
    return (
        entry.name,
        *counts,
        _span(entry.heads),
        _span(entry.widths),
        " ".join(entry.families),
        str(entry.filters),
        " ".join(entry.kernels),
        " ".join(filter(None, entry.tags)),
    )


def _span(values: tuple[int, ...]) -> str:
    """Write one value as itself, several as the least and the greatest; empty without any."""
    if not values:
        return ""
    return str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"


def _print_table(catalogue: Catalogue, entries: list[Entry]) -> None:
    where = "shipped" if catalogue.origin == "shipped" else "built here"
    title = (
        f"{counted(len(entries), 'architecture')} with attention or depthwise filters in timm {catalogue.timm} "
        f"(catalogue: {where})\nto type: NAME, or NAME.TAG for pretrained weights of a certain kind"
    )
    table = Sheet(title)
    table.label("name", key=True, least=40)
    table.number("read", "heads", "width", "filters")
    table.label("families", "labelled", "tags", least=16)
    for entry in entries:
        cells = dict(zip(COLUMNS, row(entry), strict=True))
        read = f"{cells.pop('read')}/{cells.pop('layers')}"
        shown = (cells[name] for name in ("heads", "width", "filters", "families", "labelled", "tags"))
        table.add_row(cells["name"], read, *shown)
    print_sheet(table)

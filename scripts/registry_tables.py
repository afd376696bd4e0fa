"""Write the tables that follow from the registries into docs: `make tables`.

Nothing in these tables is typed: families, classes, reasons and model types come from the layout rules, counts from the
catalogue of timm that the package ships. ``--check`` writes nothing and exits with 1 where a file is not up to date.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from attnlens.atomic import write_text_atomic
from attnlens.layouts.describe import rules_by_class
from attnlens.layouts.flags import FLAGS
from attnlens.layouts.registry import REFUSED
from attnlens.layouts.spec import OPT_IN
from attnlens.layouts.timm.families import FAMILIES
from attnlens.models.catalogue import Catalogue, load_catalogue
from attnlens.models.transformers.describe import families as foreign_families

ROOT = Path(__file__).parent.parent


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def how(family: str) -> dict[str, str]:
    """Return for each class of a family how it is read: at once, with an option, or why not."""
    found = {}
    for name, rules in rules_by_class().items():
        for rule in rules:
            if rule.family == family:
                read = f"`--include-{rule.kind}`: {OPT_IN[rule.kind][1]}" if rule.kind in OPT_IN else "read"
                found[name] = f"refused: {rule.refusal}" if rule.refusal else read
    return found | {name: f"refused: {known.reason}" for name, known in REFUSED.items() if known.family == family}


def reading(family: str) -> str:
    """Say in short how the classes of a family are read."""
    ways = {way.partition(":")[0] for way in how(family).values()}
    refused = sum(way.startswith("refused") for way in how(family).values())
    return ways.pop() if len(ways) == 1 else f"read; {refused} of {len(how(family))} classes refused"


def families_table() -> str:
    """Return the families with how each is read and how many of timm's architectures and tags hold it."""
    catalogue = load_catalogue()
    rows = []
    for family, words in FAMILIES.items():
        entries = [entry for entry in catalogue.entries if family in entry.families]
        tags = sum(len(entry.tags) for entry in entries)
        rows.append((family, words, reading(family), str(len(entries)), str(tags)))
    return "\n\n".join((table(("family", "layout", "attnlens", "architectures", "tags"), rows), totals(catalogue)))


def totals(catalogue: Catalogue) -> str:
    """Return one sentence with the counts over all of timm."""
    entries = [entry for entry in catalogue.entries if entry.layers]
    whole = sum(entry.readable == entry.layers for entry in entries)
    part = sum(0 < entry.readable < entry.layers for entry in entries)
    tags = sum(len(entry.tags) for entry in entries)
    depthwise = [entry for entry in catalogue.entries if entry.filters]
    alone = sum(not entry.layers for entry in depthwise)
    return (
        f"timm {catalogue.timm} has {len(entries)} architectures ({tags} pretrained tags) with attention: {whole} are "
        f"read whole, {part} in part, {len(entries) - whole - part} hold only what is read on request or refused. "
        f"{len(depthwise)} have depthwise filters that are read, {alone} of them no attention."
    )


def classes_table() -> str:
    """Return every attention class with its family and how it is read."""
    rows = [(family, f"`{name}`", way) for family in FAMILIES for name, way in sorted(how(family).items())]
    return table(("family", "class", "attnlens"), rows)


def foreign_table() -> str:
    """Return the transformers families with their ``model_type`` names."""
    by_name: dict[str, list[str]] = defaultdict(list)
    for model_type, family in foreign_families().items():
        by_name[family.name].append(f"`{model_type}`")
    return table(("family", "model_type"), [(name, ", ".join(types)) for name, types in by_name.items()])


def flags_table() -> str:
    """Return every flag with what it says."""
    return table(("flag", "what the product leaves out"), [(f"`{name}`", text) for name, text in FLAGS.items()])


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "docs/checkpoints.md": {"foreign": foreign_table},
    "docs/families.md": {"families": families_table, "classes": classes_table, "flags": flags_table},
}


def filled(path: Path, makers: dict[str, Callable[[], str]]) -> str:
    """Return a file's text with each table between its two marks made anew."""
    text = path.read_text()
    for name, make in makers.items():
        start, end = f"<!-- made by scripts/registry_tables.py: {name} -->", f"<!-- end: {name} -->"
        head, _, rest = text.partition(start)
        _, closing, tail = rest.partition(end)
        if not closing:
            sys.exit(f"{path} lacks the marks of the table {name!r}: {start} and {end}")
        text = f"{head}{start}\n{make()}\n{end}{tail}"
    return text


def main() -> None:
    """Write every table, or with ``--check`` say which file is not up to date."""
    stale = []
    for name, makers in TABLES.items():
        text = filled(ROOT / name, makers)
        if text != (ROOT / name).read_text():
            stale.append(name)
            if "--check" not in sys.argv:
                write_text_atomic(ROOT / name, text)
    if "--check" in sys.argv and stale:
        sys.exit(f"not up to date: {', '.join(stale)}: run `make tables`")


if __name__ == "__main__":
    main()

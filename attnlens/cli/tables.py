"""Tables on the terminal: how every command shows one, and that of `inspect`, the heads a strip of one mark each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from attnlens.cli.sheet import Sheet
from attnlens.printable import printable

if TYPE_CHECKING:
    from rich.text import Text

    from attnlens.circuits import Fold
    from attnlens.inspection import Inspection
    from attnlens.statistics.table import StatsTable

# Mark and style of one head by its diagonal prominence; the mark alone tells the sign where there is no colour.
_MARKS = ((3.0, "▲", "bold blue"), (1.0, "△", "blue"), (-1.0, "·", "dim"), (-3.0, "▽", "red"))
_LOWEST = ("▼", "bold red")
BALANCED = (
    "\nagree: share of channels with beta's sign; kurt: excess kurtosis off the diagonal, farthest from 0 of the layer"
)
_LONG = 1e9
LEGEND = "▲ > 3, △ > 1, · between, ▽ < -1, ▼ < -3"


def escape(text: str) -> str:
    """Return text out of a file as a table may show it: no markup of rich's, nothing that moves a terminal's cursor."""
    from rich.markup import escape as escape_markup

    return escape_markup(printable(text))


def print_sheet(sheet: Sheet) -> None:
    """Print a table on stdout; where stdout is no terminal the table is as wide as it needs to be."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        wide = max(console.width, sheet.natural_width(console.encoding))
        console = Console(file=console.file, width=wide, highlight=False)
    console.print(sheet)
    console.file.flush()


def layer_table(inspection: Inspection, fold: Fold) -> Sheet:
    """Build the table: per layer the heads' mean QK fit and strip, the summed OV fit and the OV heads' strip."""
    both = fold != "raw" and "raw" in inspection.folds
    table = Sheet(
        title=f"[bold]{escape(inspection.model)}[/bold]: {fold} products, M ~ α Z + β I",
        caption="QK: mean over heads, OV: sum over heads; prom = mean(diag) / sd(off-diag)\n"
        f"heads by prom: {LEGEND}{BALANCED if fold == 'balanced' else ''}",
    )
    balanced = fold == "balanced"
    last = ("QK agree", "kurt", "OV agree", "kurt") if balanced else ("raw β", "prom") if both else ()
    groups = ("QK α", "QK β"), ("OV α", "OV β", "prom"), last
    table.number("layer", key=True)
    for group, names in enumerate(groups):
        table.number(*names, group=group)
        if names is not groups[-1]:
            table.label("heads", group=group, least=6)
    by_layer = inspection.stats.by("layer")
    for layer in inspection.layers:
        table.add_row(*_cells(by_layer[layer], layer, fold, both))
    return table


def in_words(inspection: Inspection, fold: Fold) -> str:
    """Say in a sentence what the table shows: where diagonals stand out of the rest of their product, and their sign.

    Out stands a mean of the diagonal that is more than one standard deviation of the off-diagonal away from 0.
    """
    from attnlens.statistics.table import ALL_HEADS

    stats = inspection.stats.select(fold=fold)
    sums = stats.select(circuit="ov", head=ALL_HEADS).column("diagonal_prominence")
    heads = stats.select(circuit="qk").column("diagonal_prominence")
    return "\n".join(
        f"{what} whose diagonal stands out (|prom| > 1): {int((values < -1).sum())} negative and "
        f"{int((values > 1).sum())} positive of {len(values)}"
        for what, values in (("OV sums", sums), ("QK heads", heads))
        if len(values)
    )


def _cells(stats: StatsTable, layer: int, fold: Fold, both: bool) -> Iterator[str | Text]:
    from attnlens.statistics.table import ALL_HEADS

    yield str(layer)
    qk, ov = stats.select(fold=fold, circuit="qk"), stats.select(fold=fold, circuit="ov")
    total, raw = ov.select(head=ALL_HEADS), stats.select(fold="raw", head=ALL_HEADS)
    yield from (_mean(qk, "alpha"), _mean(qk, "beta"), _strip(qk))
    yield from (_mean(total, "alpha"), _mean(total, "beta"), _mean(total, "diagonal_prominence", 1), _strip(ov))
    if fold == "balanced":
        yield from (_mean(qk, "sign_agreement", 2), _farthest(qk), _mean(total, "sign_agreement", 2), _farthest(ov))
    elif both:
        yield from (_mean(raw, "beta"), _mean(raw, "diagonal_prominence", 1))


def _strip(heads: StatsTable) -> Text:
    from rich.text import Text

    from attnlens.statistics.table import ALL_HEADS

    strip = Text()
    for record in (row for row in heads.records() if row["head"] != ALL_HEADS):
        value = float(record["diagonal_prominence"])
        mark, style = next(((m, s) for limit, m, s in _MARKS if value > limit), _LOWEST)
        strip.append("?" if math.isnan(value) else mark, style=style)
    return strip


def _mean(table: StatsTable, column: str, digits: int | None = None) -> str:
    """Format a column's mean; a power of ten, not a zero, where a parameter would round away; empty for none."""
    values = table.column(column)
    value = float(values.mean()) if len(values) else math.nan
    if math.isnan(value):
        return ""
    return number(value) if digits is None else f"{value:.{digits}f}"


def _farthest(table: StatsTable) -> str:
    """Format the excess kurtosis that lies farthest from 0; empty for none."""
    values = [value for value in table.column("offdiagonal_kurtosis").tolist() if not math.isnan(value)]
    return f"{max(values, key=abs):.2f}" if values else ""


def number(value: float) -> str:
    """Format a parameter with four digits behind the point; with a power of ten where it rounds away or is long."""
    if abs(value) >= _LONG:
        return f"{value:.4e}"
    return f"{value:.0e}" if value and abs(value) < 1e-4 else f"{value:.4f}"

"""What `attnlens report` does: measure, write one HTML file, say where."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from attnlens.atomic import write_text_atomic
from attnlens.cli.console import note, tracked
from attnlens.reports import build_report


def run_report(
    model: str | None,
    checkpoint: Path | None,
    *,
    compare: Sequence[str],
    train: Path | None,
    fold: str,
    num_heads: int | None,
    offline: bool,
    remote: bool,
    output: Path,
    command: list[str],
) -> None:
    """Write the page and say how large it is."""
    page = build_report(
        model,
        checkpoint,
        compare=compare,
        train=train,
        fold=fold,
        num_heads=num_heads,
        offline=offline,
        remote=remote,
        command=shlex.join(command),
        progress=tracked("layers"),
    )
    write_text_atomic(output, page)
    note(f"wrote {output}, {len(page.encode()) / 1e6:.1f} MB: one file, open it in a browser")

"""What `attnlens train-compare` does: settle the options, train, print the report, say how to go on."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from attnlens.cli.console import note, write_stdout
from attnlens.errors import UsageError
from attnlens.training import train_compare

EXIT_CODES = {"": 0, "time budget": 0, "interrupt": 130, "terminate": 143}


def run_train_compare(
    *,
    arms: str | None,
    contrasts: str | None,
    tune_lr: str | None,
    resume: bool,
    command: Sequence[str],
    **options: Any,
) -> None:
    """Run or resume a comparison; the report goes to stdout, everything else to stderr."""
    told = shlex.join(command)
    found = train_compare(
        **options,
        arms=None if arms is None else _words("--arms", arms),
        contrasts=None if contrasts is None else [_pair(text) for text in _words("--contrasts", contrasts)],
        tune_lr=() if tune_lr is None else [_rate(text) for text in _words("--tune-lr", tune_lr)],
        resume=resume,
        command=told,
    )
    if os.environ.get("RANK", "0") == "0":
        write_stdout(found.report)
        note(f"wrote {found.folder}")
        if found.stopped:
            again = told if resume else f"{told} --resume"
            note(f"stopped ({found.stopped}) before all runs were done. To go on: {again}")
    sys.exit(EXIT_CODES[found.stopped])


def _words(option: str, text: str) -> list[str]:
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise UsageError(f"{option} is empty: separate what you name with commas")
    return found


def _pair(text: str) -> tuple[str, str]:
    arm, _, other = text.partition(":")
    if not arm or not other or ":" in other:
        raise UsageError(f"--contrasts {text} is no pair: write ARM:OTHER, as in mimetic:default")
    return arm, other


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise UsageError(f"--tune-lr {text} is no number: write rates like 5e-4,1e-3,2e-3") from error
    if not 0 < value < float("inf"):
        raise UsageError(f"--tune-lr {text} is no learning rate: pass numbers above 0")
    return value

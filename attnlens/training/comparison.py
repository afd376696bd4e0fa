"""`train_compare`: one call from a data set and a model to a report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from attnlens.atomic import write_text_atomic
from attnlens.errors import AttnlensError, UsageError
from attnlens.provenance import run_provenance
from attnlens.training.config import Config, Run
from attnlens.training.data.images import Images
from attnlens.training.data.on_device import resident
from attnlens.training.data.text import Text
from attnlens.training.display import Display
from attnlens.training.distributed import Spread, spread
from attnlens.training.metrics import ACCURACY, Metric
from attnlens.training.options import Options, find_source, load_data, settle
from attnlens.training.report import LrTable, render_report
from attnlens.training.results import Summary, results_lines, summarise
from attnlens.training.source import Scratch, Source
from attnlens.training.stop import Control, Reason
from attnlens.training.store import Record, Store, stored_config
from attnlens.training.structure import source_structure
from attnlens.training.trainer import Session, run_units, unit_name

if TYPE_CHECKING:
    import torch

Records = dict[str, list[Record]]


@dataclass(frozen=True)
class Comparison:
    """What `train_compare` did: the summary of the runs that have ended, and why it stopped, if it did."""

    folder: Path
    summary: Summary
    report: str
    stopped: Reason


def train_compare(
    options: Options,
    output: Path,
    *,
    resume: bool = False,
    time_budget: float | None = None,
    workers: int | None = None,
    save_weights: bool = False,
    command: str = "",
    cache: Path | None = None,
    quiet: bool = False,
    checkpoint_seconds: float = 60.0,
) -> Comparison:
    """Train every arm with every seed under the same conditions, and write what the runs allow to say to ``output``.

    Writes ``config.json``, ``params.json``, ``runs/``, ``results.jsonl``, ``summary.json``, ``summary.csv``,
    ``report.md``, ``curves.png``, ``structure.png`` and, with ``save_weights``, ``weights/``; no ``params.json`` where
    nothing was fitted, and no ``structure.png`` for networks without attention. Stops cleanly after
    ``time_budget`` seconds, at Ctrl-C and at SIGTERM; the same call with ``resume`` goes on. Under torchrun the runs
    are spread over its processes; on a CPU ``workers`` threads train a run each. Neither changes a number.

    Raises `UsageError`, `DatasetError`, `ResumeError`, `OutOfMemoryError`, `OutputError`, `PairingError` and what
    opening the model raises.
    """
    control = Control(time_budget)
    with spread() as place, ExitStack() as held:
        device = _device(options.device, place)
        data = load_data(options, cache)
        source = find_source(options)
        config, data = settle(options, data, source, device, output, resume=resume)
        config = _agreed(config, place)
        store = _store(output, config, place, held, resume=resume)
        if place.leads and source.params is not None:
            source.params.save(output / "params.json")
        provenance = {
            "versions": run_provenance()["versions"],
            "device": describe_device(device),
            "command": command,
        }

        def session(data: Images | Text) -> Session:
            return Session(
                config,
                source,
                resident(data, config, device),
                device,
                store,
                control,
                provenance,
                checkpoint_seconds=checkpoint_seconds,
                save_weights=save_weights,
            )

        done = _shared(store, place)
        lrs = dict.fromkeys(config.arms, config.recipe.lr)
        tuning: LrTable = {}
        if config.lr_grid:
            runs = [
                Run(arm, seed, lr, tuning=True)
                for seed in range(config.tune_seeds)
                for arm in config.arms
                for lr in config.lr_grid
            ]
            done = _phase(session(data.tuning()), runs, place, workers, done, "tuning", quiet)
            tuning = lr_table(config, runs, done)
            lrs |= best_lrs(tuning, config.metric)
        runs = [Run(arm, seed, lrs[arm]) for seed in range(config.seeds) for arm in config.arms]
        if not control.stopping():
            done = _phase(session(data), runs, place, workers, done, config.dataset, quiet)
        summary = summarise(config, {run.name: done[run.name] for run in runs if run.name in done})
        report = render_report(summary, tuning)
        if place.leads:
            _write(output, config, summary, report, done, source)
        return Comparison(output, summary, report, control.reason)


def _phase(
    session: Session, runs: Sequence[Run], place: Spread, workers: int | None, done: Records, title: str, quiet: bool
) -> Records:
    """Train what is not done of some runs, and return the records of all."""
    import torch

    display = Display(session.config, len(runs), sum(run.name in done for run in runs), title=title)
    for run in runs:
        if run.name in done:
            display.already(run.arm, run.seed, session.config.metric.of(done[run.name][-1]))
    session.listen = display.listen
    units = place.share(session.units(runs))
    waiting = [unit for unit in units if not all(run.name in done for run in unit)]
    for unit in units:
        if unit not in waiting:
            session.store.drop_checkpoint(unit_name(unit))  # of a process killed after its last run was written
    threads = workers or (torch.get_num_threads() if session.device.type == "cpu" else 1)
    with display.shown() if place.leads and not quiet else nullcontext():
        if quiet or not place.leads:
            session.listen = lambda _unit, _what: None
        if waiting:
            run_units(session, waiting, threads)
    return _shared(session.store, place)


def _shared(store: Store, place: Spread) -> Records:
    """Return the runs that have ended anywhere; hosts without a shared folder get each other's records."""
    mine = store.load_runs()
    merged = dict(mine)
    for theirs in place.gather(mine):
        merged.update(theirs)
    if place.leads:
        for name, records in merged.items():
            if name not in mine:
                store.save_records(name, records)
    return merged


def _store(output: Path, config: Config, place: Spread, held: ExitStack, *, resume: bool) -> Store:
    """Open the folder, the leading process first; a host that does not share it gets a configuration of its own.

    ``held`` keeps other comparisons out of the leading process's folder.
    """
    failure: AttnlensError | None = None
    if place.leads:
        try:
            held.enter_context(Store.claim(output, config, resume=resume))
        except AttnlensError as error:
            failure = error
    failure = place.gather(failure)[0]
    if failure is not None:
        raise failure
    return Store.open(output, config, resume=stored_config(output) is not None)


def _agreed(config: Config, place: Spread) -> Config:
    """Take the stack size the leading process measured: a timing must not set processes apart."""
    return config.model_copy(update={"stack": place.gather(config.stack)[0]})


def lr_table(config: Config, runs: Sequence[Run], done: Mapping[str, Sequence[Record]]) -> LrTable:
    """Return the metric's mean on the tuning split by arm and rate, of rates whose every seed finished."""
    table: dict[str, dict[float, float]] = {arm: {} for arm in config.arms}
    for arm in config.arms:
        for lr in config.lr_grid:
            ends = [done[run.name][-1] for run in runs if (run.arm, run.lr) == (arm, lr) and run.name in done]
            if len(ends) == config.tune_seeds and all(end["status"] == "finished" for end in ends):
                table[arm][lr] = fmean(end[config.metric.field] for end in ends)
    return table


def best_lrs(table: LrTable, metric: Metric = ACCURACY) -> dict[str, float]:
    """Return each arm's best rate; the smaller one of equals. An arm whose every rate diverged keeps the recipe's."""
    return {arm: max(sorted(row), key=lambda lr: metric.worst_first(row[lr])) for arm, row in table.items() if row}


def _write(
    output: Path,
    config: Config,
    summary: Summary,
    report: str,
    done: Mapping[str, Sequence[Record]],
    source: Source | Scratch,
) -> None:
    """Write every result file, each whole or not at all."""
    import json

    from attnlens.figures import save_figures
    from attnlens.training.figures import draw_curves, draw_structure, has_structure

    write_text_atomic(output / "results.jsonl", results_lines(config, done))
    write_text_atomic(output / "summary.json", json.dumps(summary.to_json(), indent=1) + "\n")
    write_text_atomic(output / "summary.csv", summary.to_csv())
    write_text_atomic(output / "report.md", report)
    figures = {"curves": draw_curves(summary)}
    if has_structure(summary):
        figures["structure"] = draw_structure(summary, source_structure(source), source.name)
    save_figures(figures, output)


def _device(name: str, place: Spread) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UsageError(f"--device {name} is not known: choose cpu, cuda or auto")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device. Use --device cpu")
    return torch.device(name, place.local_rank) if name == "cuda" else torch.device(name)


def describe_device(device: torch.device) -> str:
    """Name the GPU, or the processor and its cores."""
    import os
    import platform

    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"

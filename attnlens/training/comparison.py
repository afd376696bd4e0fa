"""`train_compare`: one call from a data set and a model to a report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, fields
from operator import methodcaller
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from attnlens.atomic import FileSet
from attnlens.errors import AttnlensError, UsageError
from attnlens.outputs import Outputs
from attnlens.provenance import run_provenance
from attnlens.state import sealed
from attnlens.training.config import Augmentation, Config, Run
from attnlens.training.data.on_device import Dataset
from attnlens.training.data.sources import image_files
from attnlens.training.data.text import PREFIX as TEXT
from attnlens.training.data.text import text_files
from attnlens.training.display import Display, Notes
from attnlens.training.distributed import Spread, spread
from attnlens.training.drawings import comparison_drawings
from attnlens.training.found import TrainComparison
from attnlens.training.hardware import describe_device, device_named, fixed_attention
from attnlens.training.ladder import ladder_of
from attnlens.training.live import Journal, Write
from attnlens.training.loggers import LOG_FILE, check_loggers, logging_to
from attnlens.training.metrics import ACCURACY, Metric
from attnlens.training.options import Options, find_source, load_data, resolve, stored_options
from attnlens.training.record_schema import MANIFEST, PARTS, check_links
from attnlens.training.report import LrTable, render_report
from attnlens.training.results import Summary, finite, results_lines, summarise
from attnlens.training.seen import Seen
from attnlens.training.source import Source
from attnlens.training.stop import Control
from attnlens.training.store import Record, Store, stored_config
from attnlens.training.structure import structure_lines
from attnlens.training.trainer import Listener, Session, Unit, resident_on, run_units, unit_name

if TYPE_CHECKING:
    pass

Records = dict[str, list[Record]]


_FIGURES = tuple(
    f"{name}.{suffix}" for name in ("curves", "structure", "waterfall") for suffix in ("png", "pdf", "svg")
)
RESULTS = ("params.json", "results.jsonl", "structure.jsonl", "summary.csv", "report.md", MANIFEST, *_FIGURES)
"""Files of a comparison's folder."""
STATE = ("config.json", ".lock", ".runs")
"""What it has beside these, and beside its folders, to go on from."""


def train_compare(
    *,
    dataset: str = "digits",
    data_dir: str | Path | None = None,
    classes: str | Sequence[str] | None = None,
    model: str | None = None,
    checkpoint: str | Path | None = None,
    params: str | Path | None = None,
    arms: str | Sequence[str] | None = None,
    contrasts: Sequence[tuple[str, str]] | None = None,
    seeds: int = 6,
    data_seed: int = 0,
    init_seed: int = 0,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    weight_decay: float = 0.05,
    augment: Augmentation | None = None,
    patch_size: int | None = None,
    image_size: int | None = None,
    context: int | None = None,
    train_images: int | None = None,
    test_images: int | None = None,
    target: float | None = None,
    eval_every: int | None = None,
    tune_lr: float | Sequence[float] = (),
    tune_seeds: int = 2,
    tune_epochs: int | None = None,
    warmup: float = 0.1,
    optimizer: str = "adamw",
    label_smoothing: float = 0.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    drop_path: float = 0.0,
    ema: float = 0.0,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    freeze_filters: bool = False,
    device: str = "auto",
    stack: int | None = None,
    compiled: bool | None = None,
    precision: str = "auto",
    workers: int | None = None,
    time_budget: float | None = None,
    resume: bool = False,
    save_weights: bool = False,
    log: Sequence[str] | None = None,
    output: str | Path | None = None,
    table: str | Path | None = None,
    force: bool = False,
    quiet: bool = False,
    command: str = "",
    cache: Path | None = None,
    checkpoint_seconds: float = 60.0,
) -> TrainComparison:
    """Return what training every arm with every seed under the same conditions allows to say, as tables and a report.

    Arguments are the options of ``attnlens train-compare``; None takes the data set's preset or what the model gives.
    Of a text, ``train_images`` are the windows an epoch draws and ``test_images`` those it is tested on.

    Writes ``config.json``, ``params.json``, ``runs/``, ``results.jsonl``, ``summary.json``, ``summary.csv``,
    ``report.md``, ``curves.png``, ``structure.png`` and, with ``save_weights``, ``weights/`` to ``output``, by default
    ``comparisons/<dataset>``; no ``params.json`` where nothing was fitted, and no ``structure.png`` for networks
    without attention. Files but the figures are written anew after every evaluation, figures when they took less than a
    twentieth of the time. Stops cleanly after ``time_budget`` seconds, at Ctrl-C and at SIGTERM; the same call with
    ``resume`` goes on. Under torchrun the runs are spread over its processes; on a CPU ``workers`` threads train a run
    each. Neither changes a number. ``log`` names csv, tensorboard or wandb, or several; ``force`` writes over files
    that attnlens did not write. ``table`` is a file that takes ``summary.csv``, too. ``command`` is noted in every
    record; ``cache`` holds decoded images.

    Raises `UsageError`, `DatasetError`, `ResumeError`, `OutOfMemoryError`, `OutputError`, `PairingError` and what
    opening the model raises.
    """
    told = dict(locals())  # what decides the numbers is declared once more, in Options
    for name in ("data_dir", "checkpoint", "params"):
        told[name] = None if told[name] is None else Path(told[name])
    told["arms"] = arms.split(",") if isinstance(arms, str) else arms
    told["tune_lr"] = [tune_lr] if isinstance(tune_lr, int | float) else tune_lr
    options = Options(**{field.name: told[field.name] for field in fields(Options)})
    output = default_folder(dataset) if output is None else Path(output)
    check_links(output)
    find_files = text_files if dataset.startswith(TEXT) else image_files
    read = find_files(dataset, data_dir=options.data_dir)
    outputs = Outputs.of(params, model, checkpoint, files=read, force=force)
    loggers = log or ()
    check_loggers(loggers)
    table = named_outputs(outputs, output, loggers, table)
    control = Control(time_budget)
    with control.setting_up(), spread() as process, ExitStack() as claims:
        notes = Notes(shown=process.leads and not quiet)

        def say(text: str) -> None:
            control.check()
            notes(text)

        say(f"reading {dataset}")
        on = device_named(device, process)
        data = load_data(options, cache, say)
        if data.told:
            say(f"{data.name}: {data.told}")
        say("opening the model and what its arms start from")
        source = find_source(options, data)
        say("building every arm once")
        config, data = resolve(options, data, source, on, output, resume=resume)
        config = _agreed(config, process)
        if save_weights:
            ended = [Run(arm, seed, config.recipe.lr) for arm in config.arms for seed in range(seeds)]
            outputs.folder(output, [f"weights/{run.name}.safetensors" for run in ended])
        claims.enter_context(fixed_attention(config))
        control.check()
        store = _store(output, config, stored_options(options, config), process, claims, resume=resume)
        if process.leads and source.params is not None:
            source.params.save(output / "params.json")
        here = Seen.of(data)
        provenance = {
            "versions": run_provenance()["versions"],
            "device": describe_device(on),
            "command": command,
        }

        def session(data: Dataset, config: Config = config) -> Session:
            return Session(
                config,
                source,
                resident_on(data, config, on),
                on,
                store,
                control,
                provenance,
                checkpoint_seconds=checkpoint_seconds,
                save_weights=save_weights,
                automatic=stack is None,
                here=here,
            )

        done = _shared(store, process)
        if save_weights:
            _name_weightless(output, ended, done, notes)
        lrs = dict.fromkeys(config.arms, config.recipe.lr)
        tuning: LrTable = {}

        def found(records: Mapping[str, Sequence[Record]]) -> _Findings:
            summary = summarise(config, {run.name: records[run.name] for run in runs if run.name in records})
            return _Findings(output, config, summary, render_report(summary, tuning), records, source)

        runs = [Run(arm, seed, config.recipe.lr) for seed in range(config.seeds) for arm in config.arms]
        listeners = claims.enter_context(logging_to(loggers if process.leads else (), output, config))
        phase = _Phase(process, workers, quiet, listeners, lambda done, figures: found(done).write(figures=figures))
        if config.lr_grid:
            tried = [
                Run(arm, seed, lr, tuning=True)
                for seed in range(config.tune_seeds)
                for arm in config.arms
                for lr in config.lr_grid
            ]
            done = phase.train(session(data.tuning(), config.for_tuning()), tried, done, "tuning")
            tuning = lr_table(config, tried, done)
            lrs |= best_lrs(tuning, config.metric)
        if not control.stopping():
            done = phase.train(session(data), [run._replace(lr=lrs[run.arm]) for run in runs], done, config.dataset)
        results = found(done)
        if process.leads:
            results.write(figures=True, ended=True, table=table and outputs.check(table))
        return TrainComparison(output, results.summary, results.report, control.reason, source)


def named_outputs(outputs: Outputs, folder: Path, loggers: Sequence[str], table: str | Path | None) -> Path | None:
    """Check where results go, as far as it is known beforehand; return where the table does.

    A table in the place of one of the folder's own files, under whatever name, is refused. Raises `UsageError` and
    `OutputError`.
    """
    outputs.folder(folder, (*RESULTS, *([LOG_FILE] if "csv" in loggers else [])))
    if table is None:
        return None
    place = Path(os.path.realpath(table))
    own = [Path(os.path.realpath(folder / name)) for name in (*RESULTS, LOG_FILE, *STATE, *PARTS)]
    if not {place, *place.parents}.isdisjoint(own):
        raise UsageError(f"--table {table} is a place of the comparison's own files in {folder}: name another file")
    return outputs.file(table, ".csv")


def default_folder(dataset: str) -> Path:
    """Return ``comparisons/<dataset>``, by the name of a file or folder without its ending."""
    name = Path(dataset.removeprefix("text:")).name.split(".")[0].replace("*", "")
    return Path("comparisons") / (name or "comparison")


def _name_weightless(output: Path, runs: Sequence[Run], done: Records, say: Notes) -> None:
    """Say of which runs that have finished no weights are kept: they ended before somebody asked for them."""
    names = [
        run.name
        for run in runs
        if run.name in done
        and done[run.name][-1]["status"] == "finished"
        and not (output / "weights" / f"{run.name}.safetensors").is_file()
    ]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        say(
            f"no weights are kept of {', '.join(names[:3])}{more}, which ended without --save-weights: to train such a "
            f"run again, delete its file in {output / 'runs'}"
        )


@dataclass(frozen=True)
class _Phase:
    """How runs are trained, watched and written: tuning runs first, then those that are compared."""

    process: Spread
    workers: int | None
    quiet: bool
    log: Listener
    write: Write

    def train(self, session: Session, runs: Sequence[Run], done: Records, title: str) -> Records:
        """Train what is not done of some runs, and return the records of all."""
        import torch

        process = self.process
        display = Display(session.config, len(runs), sum(run.name in done for run in runs), title=title)
        for run in runs:
            if run.name in done:
                display.already(run.arm, run.seed, session.config.metric.of(done[run.name][-1]))
        units = process.share(session.units(runs))
        waiting = [unit for unit in units if not all(run.name in done for run in unit)]
        for unit in units:
            if unit not in waiting:
                session.store.drop_checkpoint(unit_name(unit))  # of a process killed after its last run was written
        threads = self.workers or (torch.get_num_threads() if session.device.type == "cpu" else 1)
        journal = Journal(self.write, done, session.control)
        shown = process.leads and not self.quiet
        listeners = [self.log, *([display.listen] if shown else []), *([journal.listen] if process.leads else [])]

        def listen(unit: Unit, what: dict[str, Any]) -> None:
            for one in listeners:
                one(unit, what)

        session.listen = listen
        if waiting:
            with display.shown() if shown else nullcontext(), journal if process.leads else nullcontext():
                run_units(session, waiting, threads)
        return _shared(session.store, process)


def _shared(store: Store, process: Spread) -> Records:
    """Return the runs that have ended anywhere; hosts without a shared folder get each other's records."""
    mine = store.load_runs()
    merged = dict(mine)
    for theirs in process.gather(mine):
        merged.update(theirs)
    if process.leads:
        for name, records in merged.items():
            if name not in mine:
                store.save_records(name, records)
    return merged


def _store(
    output: Path, config: Config, told: Mapping[str, Any], process: Spread, claims: ExitStack, *, resume: bool
) -> Store:
    """Open the folder, the leading process first; a host that does not share it gets a configuration of its own.

    ``claims`` keep other comparisons out of the leading process's folder.
    """
    failure: AttnlensError | None = None
    if process.leads:
        try:
            claims.enter_context(Store.claim(output, config, resume=resume, told=told))
        except AttnlensError as error:
            failure = error
    failure = process.gather(failure)[0]
    if failure is not None:
        raise failure
    return Store.open(output, config, resume=stored_config(output) is not None, told=told)


def _agreed(config: Config, process: Spread) -> Config:
    """Take the stack size the leading process measured: a timing must not set processes apart."""
    return config.model_copy(update={"stack": process.gather(config.stack)[0]})


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


@dataclass(frozen=True)
class _Findings:
    """What is written of the runs so far."""

    output: Path
    config: Config
    summary: Summary
    report: str
    done: Mapping[str, Sequence[Record]]
    source: Source

    def write(self, *, figures: bool, ended: bool = False, table: Path | None = None) -> None:
        """Write every result file as one set; ``summary.json`` names the others and itself with their sha256.

        It says ``complete`` only where all has ``ended``: what is written before that is under way. The ``table`` is
        ``summary.csv`` once more.
        """
        import json

        config, summary = self.config, self.summary
        ladder = ladder_of(config.network.ladder, summary.finished, summary.contrasts)
        drawn = comparison_drawings(summary, self.source) if figures else {}
        texts = {
            "results.jsonl": results_lines(config, self.done),
            "structure.jsonl": structure_lines(self.done),
            "summary.csv": summary.to_csv(),
            "report.md": self.report,
        }
        with FileSet() as files:
            for name, text in texts.items():
                files.write(self.output / name, methodcaller("write", text.encode()))
            if drawn:
                from attnlens.figures import save_figures
                from attnlens.figures.drawings import draw_all

                save_figures(draw_all(drawn), self.output, into=files.write)
            found = {**summary.to_json(), "complete": ended and summary.complete, "files": files.hashes()}
            if ladder:
                found["ladder"] = finite([asdict(step) for step in ladder])
            data = json.dumps(sealed(found), indent=1) + "\n"
            files.write(self.output / MANIFEST, methodcaller("write", data.encode()))
            if table is not None:
                files.write(table, methodcaller("write", summary.to_csv().encode()))

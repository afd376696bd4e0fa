"""Handing out jobs, keeping results, trying again where a worker is lost."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnlens.arguments import told
from attnlens.atomic import FileSet, sweep
from attnlens.circuits import FOLDS, Fold
from attnlens.errors import UsageError
from attnlens.outputs import Outputs
from attnlens.printable import utf8_text
from attnlens.provenance import run_provenance
from attnlens.scans.executors import Executor, WorkerLostError
from attnlens.scans.local import LocalExecutor
from attnlens.scans.plan import Job, plan_scan
from attnlens.scans.store import Store
from attnlens.scans.tables import MODEL_COLUMNS, Result, model_rows
from attnlens.scans.worker import Settings, failed
from attnlens.statistics.preview import shown_rows
from attnlens.statistics.table import StatsTable, Tabular
from attnlens.vocabulary import FOLD, FOLD_CHOICE
from attnlens.words import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from attnlens.figures.panels import Given

ATTEMPTS = 3
"""Times a job is begun before a model that takes its worker down is given up."""

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True, repr=False)
class Scan(Tabular):
    """What `scan` found: a result for every model, in the order of the patterns.

    Its rows are those of ``scan.csv``: one a model and fold, and one for a model that failed.
    """

    results: Mapping[str, Result]
    notes: tuple[str, ...]
    measured: int
    """Models measured by this call, failed ones included; the others were done before."""
    lost: int
    """Times a worker was lost and its job begun again."""
    text: str = ""
    """What this scan wrote into ``scan.json``, whoever writes there after it."""

    @property
    def failed(self) -> dict[str, str]:
        """Return the models that could not be measured, with their errors."""
        return {name: told(result["error"]) for name, result in self.results.items() if result["status"] != "ok"}

    @property
    def folds(self) -> tuple[Fold, ...]:
        """Return the folds that at least one model was measured under."""
        return tuple(fold for fold in FOLDS if any(fold in result.get("folds", ()) for result in self.results.values()))

    def _table(self) -> StatsTable:
        return StatsTable.of(self.rows(), MODEL_COLUMNS)

    def _headline(self) -> str:
        return f"Scan of {counted(len(self.results), 'model')}, {len(self.failed) or 'none'} failed"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the first and last rows, and the landscape."""
        from attnlens.figures.notebook import fragment

        table = self._table()
        return fragment(
            self.figure,
            title=self._headline(),
            note="medians over layers; QK: of the means over heads, OV: of the heads' sums",
            head=table.columns,
            rows=shown_rows(table.rows),
            about=("notes", {"notes": list(self.notes), "failed": self.failed}),
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of ``scan.csv``."""
        return [row for name, result in self.results.items() for row in model_rows(name, result)]

    def figure(
        self,
        fold: Fold | None = None,
        *,
        ax: Given | None = None,
        style: str | None = None,
        width: str | float | None = None,
    ) -> Figure:
        """Draw the landscape: every model's beta / alpha by relative depth, QK and OV, and each model as a point.

        Panels ``qk``, ``ov`` and ``models`` go into ``ax`` where it is given: see `Inspection.figure`.
        """
        from functools import partial

        from attnlens.figures.drawings import draw_one
        from attnlens.scans.landscape import draw_landscape

        usual: Fold = "effective" if "effective" in self.folds else (self.folds or FOLDS)[0]
        chosen: Fold = usual if fold is None else FOLD(fold)
        if self.folds and chosen not in self.folds:
            raise UsageError(f"fold {chosen!r} was not measured: choose from {', '.join(self.folds)}")
        return draw_one({"landscape": partial(draw_landscape, self.results, chosen)}, "landscape", ax, style, width)


def scan(
    patterns: str | Sequence[str],
    output: str | os.PathLike[str],
    *,
    fold: str = "both",
    workers: int | None = None,
    ray: str | None = None,
    retry_failed: bool = False,
    num_heads: int | None = None,
    row_order: str | None = None,
    offline: bool = False,
    remote: bool = False,
    force: bool = False,
    figure: str | None = None,
    command: str | None = None,
    progress: Progress = iter,
) -> Scan:
    """Return what `inspect` finds in every model that ``patterns`` name, with a result file each below ``output``.

    Patterns are those of `plan_scan`: names, shell patterns over timm's pretrained names, folders and files, ``@FILE``.
    A model whose result is there already, of the same files and fold, is not measured again; a failed one is with
    ``retry_failed``. A model that fails is recorded with its error and stops nothing. Models are measured in
    ``workers`` processes (default: one a core), or on the Ray cluster at the address ``ray``, at most ``workers`` at a
    time; this process alone writes. ``num_heads`` and ``row_order`` read files of unknown architectures by their
    tensors' names, as `inspect` does. Where a worker or node is lost its job is begun again, up to three times.

    ``figure`` is png, pdf or svg and has ``landscape`` written with the tables, in the current `figure_style`;
    ``force`` writes over files that attnlens did not write.

    Writes ``models/<key>.json`` and ``.csv``, and at the end, as one set, ``scan.csv``, ``layers.csv`` and
    ``scan.json``, which names the sha256 of the others. Stopped in whatever way, the same call goes on where it was.
    Raises `UsageError` or `ModelNotFoundError` for patterns that match nothing, `OutputError` for others' files in the
    place of results, before anything is measured.
    """
    fold = FOLD_CHOICE(fold)
    if offline and remote:
        raise UsageError("--offline and --remote exclude each other: choose one")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers} is not a number of workers: give 1 or more")
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    plan = plan_scan(patterns)
    settings = Settings(fold, offline, remote, num_heads, row_order)
    store = Store(Path(output), settings)
    lists = [pattern for pattern in patterns if pattern.startswith("@")]
    outputs = Outputs.of(lists, *((job.model, job.checkpoint) for job in plan.jobs), force=force)
    drawn = [] if figure is None else [f"landscape.{figure}"]
    outputs.folder(output, ("scan.csv", "layers.csv", "scan.json", *drawn))
    sweep(store.folder / "models")  # a scan whose models are all done writes nothing there
    results = {job.name: store.load(job) for job in plan.jobs}
    missing = [job for job in plan.jobs if _wanted(results[job.name], retry_failed)]
    for job in missing:
        for suffix in (".json", ".csv"):
            outputs.check(store.result_file(job).with_suffix(suffix))
    lost = 0
    if missing:
        with closing(_executor(ray, workers)) as executor:
            run = Run(executor, settings)
            for _, (job, result) in zip(progress(missing), run.results(missing), strict=True):
                results[job.name] = store.save(job, result)
            lost = run.lost
    whole = {name: result for name, result in results.items() if result is not None}
    assert len(whole) == len(plan.jobs)
    about = {
        **run_provenance(),
        "patterns": list(map(utf8_text, patterns)),
        **({"command": command} if command else {}),
    }
    scanned = Scan(whole, plan.notes, len(missing), lost)
    with FileSet(outputs.check) as files:
        if figure is not None:
            _save_figure(scanned, store.folder, figure, files)
        text = store.save_tables(whole, about, files)
    return replace(scanned, text=text)


def _save_figure(scanned: Scan, folder: Path, format_: str, files: FileSet) -> None:
    from attnlens.figures import save_figures

    save_figures({"landscape": scanned.figure()}, folder, format_, into=files.write)


def _wanted(result: Result | None, retry_failed: bool) -> bool:
    return result is None or (retry_failed and result["status"] != "ok")


def _executor(ray: str | None, workers: int | None) -> Executor:
    if ray is None:
        return LocalExecutor(workers)
    from attnlens.scans.cluster import RayExecutor

    return RayExecutor(ray, workers)


class Run:
    """Jobs on their way through an executor."""

    def __init__(self, executor: Executor, settings: Settings) -> None:
        self._executor, self._settings = executor, settings
        self.lost = 0

    def results(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
        """Yield every job once with its result, as they come."""
        waiting = deque((job, 1) for job in jobs)
        running: dict[Future[Result], tuple[Job, int]] = {}
        while waiting or running:
            while waiting and len(running) < self._executor.capacity():
                job, attempt = waiting.popleft()
                running[self._executor.submit(job, self._settings)] = (job, attempt)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, attempt = running.pop(future)
                try:
                    result = future.result()
                except WorkerLostError as error:
                    self.lost += 1
                    if attempt < ATTEMPTS:
                        waiting.append((job, attempt + 1))
                        continue
                    result = failed(f"given up after {ATTEMPTS} attempts: {error}")
                yield job, result

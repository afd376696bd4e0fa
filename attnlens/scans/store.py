"""The folder of a scan: two files a model, each written whole, the one that says "done" last."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnlens.atomic import write_text_atomic
from attnlens.scans.plan import Job
from attnlens.scans.tables import LAYER_COLUMNS, MODEL_COLUMNS, Result, model_rows
from attnlens.scans.worker import Settings

SCHEMA = {"schema": "attnlens.scan", "schema_version": 1}


class Store:
    """Results below ``folder``: ``models/<key>.csv``, every head's statistics, and ``models/<key>.json``, all else."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self._settings = folder, settings

    def result_file(self, job: Job) -> Path:
        """Return where a model's result is kept."""
        return self.folder / "models" / f"{job.key}.json"

    def save(self, job: Job, result: Result) -> Result:
        """Keep a result, the table of every head apart, and return what `load` will."""
        about = {"name": job.name, **self._identity(job)}
        kept = {**about, **{name: value for name, value in result.items() if name != "csv"}}
        if "csv" in result:
            write_text_atomic(self.result_file(job).with_suffix(".csv"), result["csv"])
        write_text_atomic(self.result_file(job), json.dumps(kept, indent=1) + "\n")
        return kept

    def load(self, job: Job) -> Result | None:
        """Return a model's result if it is of the same files, measured in the same way; None otherwise."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found = json.loads(self.result_file(job).read_text())
            wanted = self._identity(job)
            if {name: found.get(name) for name in wanted} == wanted and "status" in found:
                return {**found, "name": job.name}
        return None

    def _identity(self, job: Job) -> dict[str, Any]:
        """Return what a result must be of to be believed; the name is only what this scan calls the model."""
        same = {name: value for name, value in asdict(job).items() if name != "name"}
        return {**SCHEMA, **same, "fold": self._settings.fold}

    def save_tables(self, results: Mapping[str, Result], provenance: dict[str, Any]) -> None:
        """Write ``scan.csv``, a row a model and fold, ``layers.csv``, a row a layer, and ``scan.json``, all of it."""
        models = [row for name, result in results.items() for row in model_rows(name, result)]
        cells = ([row.get(name) for name in MODEL_COLUMNS] for row in models)
        write_text_atomic(self.folder / "scan.csv", _csv(MODEL_COLUMNS, cells))
        layers = ([name, *row] for name, result in results.items() for row in result.get("table", ()))
        write_text_atomic(self.folder / "layers.csv", _csv(("model", *LAYER_COLUMNS), layers))
        data = {**SCHEMA, "provenance": provenance, "layer_columns": LAYER_COLUMNS, "models": list(results.values())}
        write_text_atomic(self.folder / "scan.json", json.dumps(data, indent=1) + "\n")


def _csv(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    return buffer.getvalue()

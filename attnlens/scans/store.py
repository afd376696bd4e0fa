"""The folder of a scan: two files a model, each written whole, the one that says "done" last."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from operator import methodcaller
from pathlib import Path
from typing import Any

from attnlens.atomic import FileSet
from attnlens.csv_text import csv_text
from attnlens.errors import AttnlensError
from attnlens.printable import utf8_text
from attnlens.scans.plan import Job
from attnlens.scans.result_schema import check_result
from attnlens.scans.tables import LAYER_COLUMNS, MODEL_COLUMNS, Result, model_rows
from attnlens.scans.worker import Settings
from attnlens.state import check_folder, read_state, sealed, unsealed
from attnlens.strict_json import parse_json

SCHEMA = {"schema": "attnlens.scan", "schema_version": 1}


class ScanFolderError(AttnlensError):
    """The folder of a scan cannot be read or written as it is."""


class Store:
    """Results below ``folder``: ``models/<key>.csv``, every head's statistics, and ``models/<key>.json``, all else."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self._settings = folder, settings
        check_folder(folder, ScanFolderError, ("models",))

    def result_file(self, job: Job) -> Path:
        """Return where a model's result is kept."""
        return self.folder / "models" / f"{job.key}.json"

    def save(self, job: Job, result: Result) -> Result:
        """Keep a result, the table of every head apart, and return what `load` will."""
        kept = {"name": job.name, **self._identity(job), **{k: value for k, value in result.items() if k != "csv"}}
        with FileSet() as files:
            if "csv" in result:
                table = result["csv"].encode()
                kept["csv_sha256"] = hashlib.sha256(table).hexdigest()
                files.write(self.result_file(job).with_suffix(".csv"), methodcaller("write", table))
            text = json.dumps(sealed(kept), indent=1) + "\n"
            files.write(self.result_file(job), methodcaller("write", text.encode()))
        return kept

    def load(self, job: Job) -> Result | None:
        """Return a model's result if it is whole, of the same files, and measured in the same way; None otherwise."""
        path = self.result_file(job)
        with contextlib.suppress(OSError, ValueError):
            found = unsealed(parse_json(read_state(path)))
            wanted = self._identity(job)
            if {name: found.get(name) for name in wanted} != wanted:
                return None
            result = {**check_result(found), "name": job.name}
            if result["status"] == "ok":
                table = hashlib.sha256(read_state(path.with_suffix(".csv"))).hexdigest()
                return result if table == result["csv_sha256"] else None
            return result
        return None

    def _identity(self, job: Job) -> dict[str, Any]:
        """Return what a result must be of to be believed; the name is only what this scan calls the model."""
        same = {name: value and utf8_text(value) for name, value in asdict(job).items() if name != "name"}
        asked = {name: getattr(self._settings, name) for name in ("fold", "num_heads", "row_order")}
        return {**SCHEMA, **same, **asked}

    def save_tables(
        self, results: Mapping[str, Result], provenance: dict[str, Any], files: FileSet | None = None
    ) -> str:
        """Write ``scan.csv``, a row a model and fold, ``layers.csv``, a row a layer, and ``scan.json``, all of it.

        They join ``files`` or make a set of their own; ``scan.json`` names the other files with their sha256. What it
        holds is returned.
        """
        models = [row for name, result in results.items() for row in model_rows(name, result)]
        cells = ([row.get(name) for name in MODEL_COLUMNS] for row in models)
        layers = ([name, *row] for name, result in results.items() for row in result.get("table", ()))
        tables = {
            "scan.csv": csv_text(MODEL_COLUMNS, cells),
            "layers.csv": csv_text(("model", *LAYER_COLUMNS), layers),
        }
        with contextlib.ExitStack() as stack:
            files = files or stack.enter_context(FileSet())
            for name, text in tables.items():
                files.write(self.folder / name, methodcaller("write", text.encode()))
            data = {**SCHEMA, "provenance": provenance, "files": files.hashes(), "layer_columns": LAYER_COLUMNS}
            text = json.dumps({**data, "models": list(results.values())}, indent=1) + "\n"
            files.write(self.folder / "scan.json", methodcaller("write", text.encode()))
        return text

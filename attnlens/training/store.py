"""The output folder: configuration, finished runs, checkpoints, each file written whole or not at all."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnlens.errors import AttnlensError, UsageError
from attnlens.files import write_atomic, write_text_atomic
from attnlens.training.config import Config, Run

if TYPE_CHECKING:
    from torch import Tensor

Record = dict[str, Any]


class ResumeError(AttnlensError):
    """A checkpoint or record cannot be gone on from."""


class Store:
    """Files of one comparison below ``folder``."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config

    @classmethod
    def open(cls, folder: Path, config: Config, *, resume: bool) -> Store:
        """Start a folder, or go on in one that holds the same configuration. Raises `UsageError`."""
        stored = stored_config(folder)
        if stored is None:
            if resume:
                raise UsageError(f"--resume: {folder} holds no comparison. Leave --resume out to start one")
            text = json.dumps({"sha256": config.sha256(), **json.loads(config.model_dump_json())}, indent=1)
            write_text_atomic(folder / "config.json", text + "\n")
            return cls(folder, config)
        if not resume:
            raise UsageError(f"{folder} holds a comparison already: add --resume to go on, or choose another --output")
        sha256 = stored.pop("sha256", None)
        if sha256 != config.sha256():
            changed = config.differences(stored) or ["the file was edited"]
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UsageError(
                f"{folder} holds another comparison: {'; '.join(changed[:3])}{more}. Repeat the first command with "
                "--resume, or choose another --output"
            )
        return cls(folder, config)

    def save_run(self, run: Run, records: Sequence[Record]) -> None:
        """Keep the records of a run that has ended."""
        self.save_records(run.name, records)

    def save_records(self, name: str, records: Sequence[Record]) -> None:
        """Keep the records of a run by name."""
        text = json.dumps({"config": self.config.sha256(), "records": list(records)}) + "\n"
        write_text_atomic(self.folder / "runs" / f"{name}.json", text)

    def load_runs(self) -> dict[str, list[Record]]:
        """Return the records of every run that has ended, by name. Raises `ResumeError` for those of another config."""
        found = {}
        for path in sorted((self.folder / "runs").glob("*.json")):
            try:
                data = json.loads(path.read_text())
                records = data["records"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ResumeError(f"{path} cannot be read ({error}): delete it to train that run again") from error
            if data.get("config") != self.config.sha256():
                raise ResumeError(f"{path} belongs to another configuration: move it away, or choose another --output")
            found[path.stem] = records
        return found

    def save_checkpoint(self, unit: str, state: Mapping[str, Any]) -> None:
        """Keep where a unit of work has got to."""
        import torch

        buffer = io.BytesIO()
        torch.save({"config": self.config.sha256(), **state}, buffer)
        write_atomic(self._checkpoint(unit), lambda file: file.write(buffer.getbuffer()))

    def load_checkpoint(self, unit: str) -> dict[str, Any] | None:
        """Return where a unit of work had got to, on the CPU; None where it had not begun."""
        import torch

        path = self._checkpoint(unit)
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # torch raises half a dozen kinds for a damaged file
            raise ResumeError(f"{path} cannot be read ({error}): delete it to train that run again") from error
        if state.get("config") != self.config.sha256():
            raise ResumeError(f"{path} belongs to another configuration: move it away, or choose another --output")
        return state

    def drop_checkpoint(self, unit: str) -> None:
        """Remove the checkpoint of a unit that has ended."""
        self._checkpoint(unit).unlink(missing_ok=True)

    def save_weights(self, run: Run, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Keep a run's final weights in a file `attnlens inspect` reads."""
        from safetensors.torch import save

        tensors = {name: value.contiguous() for name, value in state.items()}
        write_atomic(
            self.folder / "weights" / f"{run.name}.safetensors", lambda file: file.write(save(tensors, dict(metadata)))
        )

    def _checkpoint(self, unit: str) -> Path:
        return self.folder / "checkpoints" / f"{unit}.pt"


def stored_config(folder: Path) -> dict[str, Any] | None:
    """Return the configuration a folder holds, None where it holds none. Raises `ResumeError`."""
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResumeError(f"{path} cannot be read ({error}): choose another --output") from error
    if not isinstance(data, dict):
        raise ResumeError(f"{path} is no configuration: choose another --output")
    return data

"""What weights have been trained on, as files of weights say it, and whether a data set is part of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from attnlens.training.data.on_device import Dataset

METADATA_KEY = "trained_on"
"""Entry of a safetensors file's metadata, and of a timm model folder's config.json, that lists `Seen`."""


class Seen(BaseModel):
    """A data set that weights were trained on: its name, its hash before anything was left out, the classes kept."""

    model_config = ConfigDict(frozen=True)

    dataset: str
    sha256: str
    classes: tuple[str, ...] = ()

    @classmethod
    def of(cls, data: Dataset) -> Seen:
        """Describe a data set, cut or whole."""
        return cls(dataset=data.name, sha256=data.whole(), classes=tuple(data.class_names()))


_Many = TypeAdapter(tuple[Seen, ...])


def written(seen: Sequence[Seen]) -> str:
    """Write what `read` reads."""
    return json.dumps([one.model_dump() for one in seen])


def read(stated: Any) -> tuple[Seen, ...] | None:
    """Return what a file states, as JSON or already parsed; None where it states nothing that can be understood."""
    try:
        return _Many.validate_json(stated) if isinstance(stated, str) else _Many.validate_python(stated)
    except ValidationError:
        return None

"""What weights have been trained on, as files of weights say it, and whether a data set is part of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

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


class Met(NamedTuple):
    """Whether a source has seen the data; ``shared`` is None where that is not known."""

    shared: bool | None
    words: str


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


def meet(source: str, seen: Sequence[Seen] | None, here: Seen) -> Met | None:
    """Say whether a source has been trained on a data set; None where nothing suggests it.

    Data sets are the same where their decoded images and labels are, before anything was left out, and meet in the
    classes both keep. Where they are not, classes of the same names are named: the same images decoded or resized
    otherwise have another hash.
    """
    if seen is None:
        return Met(None, f"what {source} was trained on is not stated with its weights: it may have seen this data set")
    same = [one for one in seen if one.sha256 == here.sha256]
    for one in same:
        shared = [name for name in one.classes if name in here.classes]
        if shared or not here.classes:
            part = f", in the classes {', '.join(shared)}" if set(shared) != set(here.classes) else ""
            return Met(
                True,
                f"{source} was trained on the training images of this data set{part}: an arm that holds its weights "
                "goes on with what it has seen, and its lead is no transfer"
                if here.classes
                else f"{source} was trained on this text: an arm that holds its weights goes on with what it has seen, "
                "and its lead is no transfer",
            )
    for one in seen:
        shared = sorted({name.lower() for name in one.classes} & {name.lower() for name in here.classes})
        if one not in same and shared:
            return Met(
                None,
                f"{source} was trained on {one.dataset}, which has classes of the same names ({', '.join(shared)}) "
                "and other bytes: it may have seen these images",
            )
    if same:
        return Met(False, f"{source} was trained on other classes of this data set, {', '.join(same[0].classes)}")
    return None

"""Every timm architecture with attention or depthwise filters in one row: how much of it is read, its weights' tags.

Finding this out builds each architecture once on the meta device, which takes minutes. The result for one timm
version is shipped with the package, beside the descriptions of every architecture; for any other it is built on first
use and kept in the user's cache. A build that is killed goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import lzma
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

from attnlens.atomic import write_atomic, write_text_atomic
from attnlens.errors import ModelNotFoundError, OutputError, UsageError, first_line
from attnlens.layouts.depthwise.spec import FilterSpec
from attnlens.layouts.spec import AttentionSpec, Slot
from attnlens.models.architecture import pretrained_tags, suggest
from attnlens.models.described import SHIPPED, cache_folder, rules_digest

Progress = Callable[[Iterable[Any]], Iterable[Any]]
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Entry:
    """One architecture: its layers counted, the distinct head counts, input widths and kernels of those described."""

    name: str
    layers: int
    """Attention modules, read or refused."""
    read: dict[str, int]
    """Layers that are described, by what their product acts on: token, channel or linear."""
    heads: tuple[int, ...]
    widths: tuple[int, ...]
    families: tuple[str, ...]
    tags: dict[str, dict[str, str | None]]
    """Pretrained tags and where timm says each is, the default one first."""
    filters: int
    """Layers of depthwise filters that are described."""
    kernels: tuple[str, ...]
    """Sizes of these filters, height x width."""

    @property
    def readable(self) -> int:
        """Layers with a product between tokens: what `inspect` reads without an option."""
        return self.read.get("token", 0)

    @property
    def labelled(self) -> dict[str, int]:
        """Layers that are read on request only, by kind."""
        return {kind: count for kind, count in self.read.items() if kind != "token"}

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Entry:
        """Rebuild from `to_json`."""
        return cls(**{**data, **{name: tuple(data[name]) for name in ("heads", "widths", "families", "kernels")}})


@dataclass(frozen=True)
class Catalogue:
    """The entries for one timm version; ``rules`` is the digest of the layout rules that described them."""

    timm: str
    rules: str
    entries: tuple[Entry, ...]
    failed: dict[str, str]
    """Architectures that could not be built, with the error."""
    origin: str = "built"
    """``shipped`` with the package, or ``built`` on this machine."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {"schema": "attnlens.catalogue", "schema_version": 2, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any], origin: str) -> Catalogue:
        """Rebuild from `to_json`."""
        entries = tuple(Entry.from_json(entry) for entry in data["entries"])
        return cls(data["timm"], data["rules"], entries, data["failed"], origin)

    def families(self) -> list[str]:
        """Name every layout family that occurs."""
        return sorted({family for entry in self.entries for family in entry.families})

    def select(self, pattern: str | None = None, family: str | None = None) -> list[Entry]:
        """Return the entries whose name, with or without a tag, matches ``pattern``, and that hold ``family``.

        A pattern with ``*``, ``?`` or ``[`` must match the whole name; any other text is looked for inside it.
        Raises `ModelNotFoundError` with the nearest names when no name matches, `UsageError` for an unknown family.
        """
        found = [entry for entry in self.entries if pattern is None or _matches(entry, pattern.lower())]
        if not found:
            names = [entry.name for entry in self.entries]
            parts = sorted({part for name in names for part in name.split("_")})
            near = suggest((pattern or "").strip("*").lower(), names + parts)
            raise ModelNotFoundError(f"no architecture with attention or depthwise filters is named {pattern!r}{near}")
        if family is None:
            return found
        known = {name.lower(): name for name in self.families()}
        if family.lower() not in known:
            raise UsageError(f"--family {family!r} is no layout family: choose from {', '.join(known.values())}")
        return [entry for entry in found if known[family.lower()] in entry.families]


def _matches(entry: Entry, pattern: str) -> bool:
    wanted = pattern if any(mark in pattern for mark in "*?[") else f"*{pattern}*"
    names = (entry.name, *(f"{entry.name}.{tag}" for tag in entry.tags))
    return any(fnmatchcase(name.lower(), wanted) for name in names)


def load_catalogue(progress: Progress = iter, *, rebuild: bool = False) -> Catalogue:
    """Return the catalogue for the installed timm: built here before, else shipped, else built now.

    ``progress`` wraps the iteration over architectures while building; ``rebuild`` builds in any case.
    """
    if not rebuild:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return Catalogue.from_json(json.loads(_built_file().read_text()), "built")
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, lzma.LZMAError):
            return Catalogue.from_json(json.loads(lzma.decompress(shipped_file().read_bytes())), "shipped")
    return build_catalogue(progress)


def shipped_file() -> Path:
    """Return where the package ships the catalogue for the installed timm version, if it does."""
    return SHIPPED / f"timm-{version('timm')}.json.xz"


def _built_file() -> Path:
    return cache_folder() / "catalogue.json"


def ship_catalogue(catalogue: Catalogue) -> Path:
    """Write a catalogue to where the package ships it from."""
    text = json.dumps(replace(catalogue, origin="shipped").to_json(), separators=(",", ":"))
    packed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
    return write_atomic(shipped_file(), lambda file: file.write(packed))


def build_catalogue(progress: Progress = iter) -> Catalogue:
    """Build every architecture of the installed timm on the meta device and keep the result in the user's cache.

    Each architecture is written down as it is done, so that a build that was killed goes on from there.
    """
    import timm

    names = timm.list_models()
    journal = cache_folder() / "catalogue.jsonl"
    done = _read_journal(journal)
    for name in progress([name for name in names if name not in done]):
        done[name] = _examine(name)
        with contextlib.suppress(OSError):  # a read-only cache costs time, nothing else
            journal.parent.mkdir(parents=True, exist_ok=True)
            with journal.open("a") as file:
                file.write("\n" + json.dumps({"name": name, **done[name]}))
    entries = tuple(Entry.from_json(done[name]["entry"]) for name in names if done[name].get("entry"))
    failed = {name: done[name]["error"] for name in names if "error" in done[name]}
    catalogue = Catalogue(version("timm"), rules_digest(), entries, failed)
    with contextlib.suppress(OutputError, OSError):
        write_text_atomic(_built_file(), json.dumps(catalogue.to_json()))
        journal.unlink(missing_ok=True)
    return catalogue


def _read_journal(journal: Path) -> dict[str, dict[str, Any]]:
    """Read what an earlier build left; a line it was killed in is skipped."""
    done = {}
    with contextlib.suppress(OSError):
        for line in journal.read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError):
                found = json.loads(line)
                done[found.pop("name")] = found
    return done


def _examine(name: str) -> dict[str, Any]:
    """Return ``{"entry": ...}`` for one architecture, its entry None without layers, or ``{"error": ...}``."""
    try:
        entry = summarise(name)
    except Exception as error:  # noqa: BLE001  # one architecture that cannot be built must not hide the others
        return {"error": f"{type(error).__name__}: {first_line(error)}"}
    return {"entry": entry.to_json() if entry else None}


def summarise(name: str) -> Entry | None:
    """Build one architecture on the meta device and count its layers of attention and filters; None without any."""
    import timm
    import torch

    from attnlens.layouts.depthwise.find import filter_modules
    from attnlens.layouts.describe import attention_modules

    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    found, filters = list(attention_modules(model)), list(filter_modules(model))
    if not found and not filters:
        return None
    described = [item for item in filters if isinstance(item, FilterSpec)]
    specs = [item for item in found if isinstance(item, AttentionSpec)]
    stored = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    shapes = {tensor: tuple(stored[tensor].shape) for spec in specs for tensor in spec.q.tensors()}
    return Entry(
        name=name,
        layers=len(found),
        read=dict(sorted(Counter(spec.kind for spec in specs).items())),
        heads=tuple(sorted({spec.q.heads for spec in specs})),
        widths=tuple(sorted({_input_width(spec.q, shapes) for spec in specs})),
        families=tuple(sorted({item.family for item in found})),
        tags=pretrained_tags(name),
        filters=len(described),
        kernels=tuple(f"{height}x{width}" for height, width in sorted({item.kernel for item in described})),
    )


def _input_width(slot: Slot, shapes: Shapes) -> int:
    """Return the width of what a projection reads: the other axis of its tensor, flattened to two dimensions."""
    first, *rest = shapes[slot.named(slot.tensor)[0]]
    return math.prod(rest) if slot.axis == 0 else first

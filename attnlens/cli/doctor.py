"""The command ``doctor``: look at versions, devices and caches, without importing torch unless a GPU is there."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from attnlens import __version__
from attnlens.cli import options
from attnlens.cli.console import write_stdout
from attnlens.cli.sheet import Sheet
from attnlens.cli.tables import escape, print_sheet
from attnlens.words import counted

if TYPE_CHECKING:
    from packaging.requirements import Requirement

USES = {
    "pandas": "StatsTable.to_pandas",
    "ray": "scan --ray",
    "tensorboard": "train-compare --log tensorboard",
    "text": "train-compare --dataset hfds/... and text:wikitext-103",
    "wandb": "train-compare --log wandb",
}
"""Extra of the package -> what needs it."""


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, whether that is well, and what to do if not."""

    part: str
    name: str
    found: str
    ok: bool
    needed: bool = True
    remedy: str = ""


def doctor(json_: options.Json = False) -> None:
    """Say which versions, devices and caches attnlens finds here, what is missing, and how to get it."""
    findings = list(look())
    if json_:
        data = {"schema": "attnlens.doctor", "schema_version": 1, "findings": [asdict(f) for f in findings]}
        write_stdout(json.dumps(data, indent=1))
    else:
        _print(findings)
    if any(finding.needed and not finding.ok for finding in findings):
        sys.exit(1)


def look() -> Iterator[Finding]:
    """Yield every finding."""
    yield Finding("attnlens", "attnlens", __version__, ok=True)
    yield Finding("attnlens", "Python", f"{platform.python_version()} on {platform.platform()}", ok=True)
    yield from _packages()
    yield from _devices()
    yield from _shipped()
    yield from _caches()


def _packages() -> Iterator[Finding]:
    """Compare what is installed with what the package's metadata ask for: first what is required, then its extras."""
    from packaging.requirements import Requirement

    requirements = sorted(map(Requirement, requires("attnlens") or ()), key=lambda requirement: requirement.name)
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement, f"pip install '{requirement.name}{requirement.specifier}'", None)
    for requirement, (extra, use) in product(requirements, USES.items()):
        marker = requirement.marker
        if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            yield _package(requirement, f"pip install 'attnlens[{extra}]'", use)


def _package(requirement: Requirement, remedy: str, use: str | None) -> Finding:
    """Judge one package; one with a ``use`` is optional."""
    version = _version(requirement.name)
    ok = version is not None and requirement.specifier.contains(version, prereleases=True)
    needs = "" if ok else f" (needs {requirement.specifier})"
    said = f"missing: only for {use}" if use and not version else f"{version or 'missing'}{needs}"
    part = "optional" if use else "required"
    return Finding(part, requirement.name, said, ok=ok, needed=use is None, remedy="" if ok else remedy)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    """Ask the driver which GPUs there are, and only then, torch whether it can use them."""
    yield Finding("device", "cpu", f"{counted(_cores() or 1, 'core')}{_half_products()}", ok=True)
    gpus = _gpus()
    if not gpus:
        remedy = "inspect, fit-params, init and report do not need one; train-compare runs on the CPU"
        yield Finding("device", "cuda", "no NVIDIA GPU found", ok=False, needed=False, remedy=remedy)
        return
    import torch

    usable = torch.cuda.is_available()
    said = f"{'; '.join(gpus)}; torch {torch.__version__} {'uses it' if usable else 'cannot use it'}"
    remedy = "" if usable else "install a torch built for the driver's CUDA version"
    yield Finding("device", "cuda", said, ok=usable, needed=False, remedy=remedy)


def _half_products(listing: Path = Path("/proc/cpuinfo")) -> str:
    """Say which instructions of this processor multiply in bfloat16, where the system lists them."""
    try:
        flags = set(listing.read_text().split())
    except OSError:
        return ""
    found = [name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512")) if flag in flags]
    return f", bfloat16 products by {' and '.join(found)} (train-compare --precision bfloat16)" if found else ""


def _cores() -> int | None:
    """Return the cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _gpus() -> list[str]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603  # fixed words
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _shipped() -> Iterator[Finding]:
    from attnlens.models.catalogue import shipped_file
    from attnlens.models.open import EMBEDDED

    weights = EMBEDDED / "model.safetensors"
    whole = weights.is_file()
    remedy = "" if whole else "install attnlens again: its own model is missing"
    yield Finding("data", "shipped model", str(weights) if whole else "missing", ok=whole, remedy=remedy)
    if _version("timm") is None:
        return
    known = shipped_file().is_file()
    said = "shipped for this timm" if known else "none for this timm"
    remedy = "" if known else "attnlens list-models builds it once, in some minutes"
    yield Finding("data", "catalogue", said, ok=known, needed=False, remedy=remedy)


def _caches() -> Iterator[Finding]:
    from platformdirs import user_cache_path

    hub = Path(os.environ.get("HF_HUB_CACHE") or _hub_home() / "hub").expanduser()
    for name, folder, change in (
        ("attnlens cache", user_cache_path("attnlens"), "XDG_CACHE_HOME"),
        ("Hugging Face hub cache", hub, "HF_HOME or HF_HUB_CACHE"),
    ):
        writable = _writable(folder)
        said = f"{folder}, {_held(folder)}" if writable else f"{folder} cannot be written"
        remedy = "" if writable else f"set {change} to a folder you can write to"
        yield Finding("cache", name, said, ok=writable, needed=False, remedy=remedy)
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    said = "HF_HUB_OFFLINE is set: only the cache is used" if offline else "used for names that are not in the cache"
    yield Finding("cache", "network", said, ok=True, needed=False)


def _hub_home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("HF_HOME") or f"{cache}/huggingface")


def _writable(folder: Path) -> bool:
    """Whether the folder, or the nearest one above it that exists, can be written."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)


def _held(folder: Path) -> str:
    if not folder.is_dir():
        return "empty"
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return f"{sum(sizes) / 1e6:.1f} MB in {counted(len(sizes), 'file')}"


def _print(findings: list[Finding]) -> None:
    table = Sheet("")
    table.label("", "part", "name", key=True)
    table.label("found", "what to do", least=16)
    for finding in findings:
        mark = "[green]✓[/green]" if finding.ok else "[red]✗[/red]" if finding.needed else "[dim]–[/dim]"
        table.add_row(mark, finding.part, *map(escape, (finding.name, finding.found, finding.remedy)))
    print_sheet(table)
    missing = [finding for finding in findings if finding.needed and not finding.ok]
    write_stdout(
        f"{counted(len(missing), 'needed part is', 'needed parts are')} missing: see “what to do”"
        if missing
        else "everything attnlens needs is here; `attnlens --install-completion` adds completion to your shell"
    )

"""Weight files at plain URLs, kept where torch.hub and timm keep theirs."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, cast
from urllib.parse import unquote, urlparse

from attnlens.atomic import write_atomic
from attnlens.errors import CheckpointError, ModelNotFoundError, OutputError, first_line

# torch.hub's convention, `name-<first digits of the sha256>.pth`: eight digits at least, in front of the suffix.
# Its own pattern takes any number, and so the "-300e" of `IN1K-vit.h.14-300e.pth.tar` for a hash.
_HASH = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|bin|npz|safetensors)$")


def fetch_url(url: str, *, offline: bool = False) -> Path:
    """Return the file at a URL from torch.hub's folder of checkpoints, downloading it first if need be.

    The download goes to a temporary name beside it, and takes its place when it is whole and, where its name carries
    the first digits of its sha256, has that hash. Raises `ModelNotFoundError` when it cannot be had, `CheckpointError`
    when it has another hash.
    """
    path = cached_path(url)
    if is_whole(path):
        return path
    from attnlens.checkpoints.transport import is_offline

    if is_offline(offline):
        state = "is damaged" if path.is_file() else "is not there"
        raise ModelNotFoundError(
            f"{path} {state}, and --offline or HF_HUB_OFFLINE forbids downloading {url}: run once while online, or "
            "download the file elsewhere and pass --checkpoint FILE"
        )
    try:
        return write_atomic(path, lambda file: _download(url, path.name, file))
    except OutputError as error:
        raise CheckpointError(
            f"cannot write {path} ({error.__cause__}): free some space, or set TORCH_HOME to another folder"
        ) from error


def cached_path(url: str) -> Path:
    """Return where torch.hub and timm keep the file of a URL."""
    from torch.hub import get_dir

    return Path(get_dir()) / "checkpoints" / PurePosixPath(unquote(urlparse(url).path)).name


def is_whole(path: Path) -> bool:
    """Whether a file is there and, where its name carries the beginning of its sha256, has that hash."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _has_its_hash(file, path.name)


def _download(url: str, name: str, file: IO[bytes]) -> None:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get

    from attnlens.checkpoints.transport import patiently, transport_errors

    def attempt() -> None:
        try:
            # checks the length, and itself takes up a connection that breaks
            http_get(url, cast("BinaryIO", file), displayed_filename=name)
        except HfHubHTTPError:
            raise
        except transport_errors() as error:
            raise unreachable(error) from error

    def unreachable(error: Exception) -> ModelNotFoundError:
        advice = "Download it elsewhere and pass --checkpoint FILE"
        return ModelNotFoundError(f"cannot download {url}: {first_line(error)}. {advice}")

    try:
        patiently(attempt)
    except HfHubHTTPError as error:
        raise unreachable(error) from error
    file.seek(0)
    if not _has_its_hash(file, name):
        raise CheckpointError(f"what {url} sends has not the sha256 its name begins with: it is damaged, try again")


def _has_its_hash(file: IO[bytes], name: str) -> bool:
    declared = _HASH.search(name)
    if declared is None:
        return True
    return hashlib.file_digest(file, "sha256").hexdigest().startswith(declared[1])  # type: ignore[arg-type]

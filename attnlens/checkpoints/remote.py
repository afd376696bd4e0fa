"""A safetensors file on the hub, of which only the tensors that are asked for are fetched, by HTTP range requests."""

from __future__ import annotations

import re
import struct
import weakref
from collections.abc import ItemsView, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from attnlens.atomic import open_scratch
from attnlens.checkpoints.base import Checkpoint
from attnlens.checkpoints.files import SafetensorsFile
from attnlens.checkpoints.transport import ask, explained, patiently
from attnlens.errors import CheckpointError

HEADER_LIMIT = 100_000_000
"""Bytes a safetensors header may have, the limit of the safetensors library."""
FIRST_REQUEST = 1 << 17
"""Bytes asked for at first: the header of nearly every model is shorter."""
GAP, RUN = 1 << 16, 1 << 24
"""Wanted tensors at most ``GAP`` bytes apart are fetched together, up to ``RUN`` bytes a request."""


class RangesIgnoredError(CheckpointError):
    """The server sends whole files only: to be read, the file must be downloaded."""


class RemoteFile:
    """The bytes of a file on the hub, fetched by range into a sparse temporary file."""

    def __init__(self, repo: str, filename: str, url: str, size: int) -> None:
        self.repo, self.filename, self.url, self.size = repo, filename, url, size
        self.bytes_fetched = 0
        self.requests = 0
        self.path, self._file = open_scratch("remote")
        weakref.finalize(self, _discard, self._file, self.path)
        self._file.truncate(size)
        self._leading = 0

    def lead(self, end: int) -> None:
        """Fetch the file up to ``end``."""
        self.fetch(self._leading, end)
        self._leading = max(self._leading, end)

    def fetch(self, begin: int, end: int) -> None:
        """Fetch bytes ``begin`` to ``end`` into the temporary file, save what `lead` has fetched."""
        position = max(begin, self._leading)

        def attempt() -> None:
            nonlocal position
            for chunk in self._stream(position, end):  # a broken connection is taken up where it broke
                self._file.seek(position)
                self._file.write(chunk)
                position += len(chunk)
                self.bytes_fetched += len(chunk)
            self._file.flush()
            if position < end:
                raise ConnectionError(f"the connection ended {end - position} bytes early")

        if position < end:
            with explained(self.repo, self.filename):
                patiently(attempt)

    def _stream(self, begin: int, end: int) -> Iterator[bytes]:
        """Ask for bytes ``begin`` to ``end`` and yield them as they come, having checked that these are sent."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        asked = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        headers = build_hf_headers(headers=asked)
        self.requests += 1
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", self.url, headers=headers, timeout=timeout, follow_redirects=True) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            if response.status_code != 206 and (begin, end) != (0, self.size):
                raise RangesIgnoredError(f"{self.url} ignores range requests: leave out --remote")
            sent = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
            if response.status_code == 206 and (sent is None or (int(sent[1]), int(sent[2])) != (begin, end - 1)):
                raise CheckpointError(f"{self.url} sends {sent and sent[0]} when asked for bytes {begin}-{end - 1}")
            left = end - begin
            for chunk in response.iter_bytes():
                left -= len(chunk)
                if left < 0:
                    raise CheckpointError(f"{self.url} sends more than the bytes {begin}-{end - 1} it was asked for")
                yield chunk


class RemoteSafetensors(Checkpoint):
    """A safetensors file on the hub; a tensor is fetched when it is first asked for, with its wanted neighbours."""

    def __init__(self, remote: RemoteFile, about: dict[str, Any]) -> None:
        self._remote = remote
        self._about = about
        remote.lead(min(FIRST_REQUEST, remote.size))
        remote.lead(_header_end(remote))
        try:
            self._local = SafetensorsFile(remote.path)  # the library checks the header, on the right length of file
        except CheckpointError as error:
            raise CheckpointError(
                f"{remote.url} is no safetensors file ({error.__cause__ or error}): it is corrupt"
            ) from error
        self.metadata, self.behind = self._local.metadata, (self._local,)
        self._runs: dict[str, tuple[int, int]] = {}
        self._done: set[tuple[int, int]] = set()

    def provenance(self) -> dict[str, Any]:
        """Return where the file is, what the hub declares of it, and how much of it was fetched."""
        fetched = {"bytes_fetched": self._remote.bytes_fetched, "requests": self._remote.requests}
        return {"file": self._remote.filename, "bytes": self._remote.size, **self._about, **fetched}

    def size(self) -> int:
        """Return the file's length on the hub."""
        return self._remote.size

    def expect(self, names: Iterable[str]) -> None:
        """Fetch those of ``names`` that lie close together in one request, when the first of them is asked for."""
        runs: list[tuple[int, int]] = []
        members: list[list[str]] = []
        for (begin, end), name in sorted((self._local.span(name), name) for name in {*names} & {*self._local}):
            if runs and begin - runs[-1][1] <= GAP and end - runs[-1][0] <= RUN:
                runs[-1] = (runs[-1][0], end)
                members[-1].append(name)
            else:
                runs.append((begin, end))
                members.append([name])
        self._runs = {name: run for run, together in zip(runs, members, strict=True) for name in together}

    def items(self) -> ItemsView[str, Any]:
        """Return every name and tensor, which are fetched in as few requests as may be."""
        self.expect(self)
        return super().items()

    def __getitem__(self, name: str) -> Any:
        """Return a tensor, fetching it if it has not been."""
        run = self._runs.get(name) or self._local.span(name)
        if run not in self._done:
            self._remote.fetch(*run)
            self._local.written()
            self._done.add(run)
        return self._local[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape from the header; nothing is fetched."""
        return self._local.shape(name)

    def __contains__(self, name: object) -> bool:
        """Whether the file holds a tensor of that name; nothing is fetched."""
        return name in self._local

    def __iter__(self) -> Iterator[str]:
        """Iterate over the tensors' names."""
        return iter(self._local)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._local)


def _discard(file: IO[bytes], path: Path) -> None:
    file.close()
    path.unlink(missing_ok=True)


def _header_end(remote: RemoteFile) -> int:
    """Return where the header ends, by the length in the file's first eight bytes."""
    with remote.path.open("rb") as file:
        start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if not 0 < length <= min(HEADER_LIMIT, remote.size - 8):
        raise CheckpointError(
            f"{remote.url} is no safetensors file: its header would have {length} bytes, the file has {remote.size}"
        )
    return 8 + int(length)


def open_remote(repo: str, filename: str, revision: str | None = None) -> RemoteSafetensors | None:
    """Open a safetensors file on the hub by its header alone.

    None when the repository lacks the file, or the server gives no size or no ranges, so that it must be downloaded.
    Raises `ModelNotFoundError` and `CheckpointError`.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    try:
        with explained(repo, filename, revision):
            url = hf_hub_url(repo, filename, revision=revision)
            found = ask(url)
    except EntryNotFoundError:
        return None
    if not found.size:
        return None
    about = {"url": url, "revision": found.commit_hash, "etag": found.etag}
    if found.etag and re.fullmatch(r"[0-9a-f]{64}", found.etag):
        about["sha256_declared"] = found.etag  # what the hub says; the whole file is not here to be hashed
    pinned = hf_hub_url(repo, filename, revision=found.commit_hash or revision)
    try:
        return RemoteSafetensors(RemoteFile(repo, filename, pinned, found.size), about)
    except RangesIgnoredError:
        return None

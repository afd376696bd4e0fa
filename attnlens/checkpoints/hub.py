"""Weights on the Hugging Face hub: from the local cache first, then over the network.

``HF_HOME``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and ``HF_TOKEN`` are honoured by huggingface_hub, which reads them when
it is first imported. A download goes to a temporary name and into the cache when it is whole.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from attnlens.checkpoints.adapter_config import ADAPTER_BESIDE
from attnlens.checkpoints.base import INDEX_SUFFIX, Checkpoint
from attnlens.checkpoints.download import cached_path, is_whole
from attnlens.checkpoints.open import as_read, open_checkpoint
from attnlens.checkpoints.shards import TRANSFORMERS_FILES, read_index
from attnlens.checkpoints.transport import _offline_advice, ask, explained, is_offline
from attnlens.errors import CheckpointError, ModelNotFoundError

WEIGHT_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
"""Names a hub repository keeps its weights under, in the order timm tries them."""


def open_weights(
    repo: str,
    filename: str | None = None,
    revision: str | None = None,
    *,
    offline: bool = False,
    remote: bool = False,
) -> tuple[Checkpoint, dict[str, str]]:
    """Open the weights of a hub repository, and say which repository and commit they are of.

    What the cache holds is used. Otherwise the file is downloaded, or with ``remote`` a safetensors file is opened
    where it is, and only tensors that are asked for are fetched; a server that sends no ranges makes it a download.
    Raises `ModelNotFoundError` when there is no such repository, file or revision, or it cannot be reached,
    `CheckpointError` when what is there cannot be read.
    """
    cached = find_weights(repo, filename, revision)
    if remote and cached is None and not is_offline(offline):
        from attnlens.checkpoints.remote import open_remote

        for name in (filename,) if filename else WEIGHT_FILES:
            found = open_remote(repo, name, revision) if name.endswith(".safetensors") else None
            if found is not None:
                return as_read(found), {"hub": repo}
    path = cached or fetch_weights(repo, filename, revision, offline=offline)
    return open_checkpoint(path), {"hub": repo, "revision": _commit(path)}


def find_weights(repo: str, filename: str | None = None, revision: str | None = None) -> Path | None:
    """Return the weight file of a hub repository if it is in the local cache; nothing is asked of the network."""
    found = (_cached(repo, name, revision) for name in ((filename,) if filename else WEIGHT_FILES))
    return next((path for path in found if isinstance(path, Path)), None)


def fetch_weights(
    repo: str, filename: str | None = None, revision: str | None = None, *, offline: bool = False
) -> Path:
    """Return the weight file of a hub repository, trying the names timm tries, then an index of shards."""
    cached = find_weights(repo, filename, revision)
    if cached is not None:
        return cached
    names = (filename,) if filename else tuple(dict.fromkeys((*WEIGHT_FILES, *TRANSFORMERS_FILES)))
    for name in names:
        path = fetch(repo, name, revision, offline=offline)
        if path is not None:
            return _with_shards(path, repo, revision, offline=offline)
    raise ModelNotFoundError(f"{repo} holds no weights named {', '.join(names)}: pass --checkpoint FILE")


def _with_shards(path: Path, repo: str, revision: str | None, *, offline: bool) -> Path:
    """Fetch the shards an index lists, so that they lie beside it; any other file is left as it is."""
    if path.name.endswith(INDEX_SUFFIX):
        for shard in sorted(set(read_index(path)[0].values())):
            if fetch(repo, shard, _commit(path) or revision, offline=offline) is None:
                raise ModelNotFoundError(f"{repo} lists the shard {shard} in {path.name} and does not hold it")
    return path


def fetch(repo: str, filename: str, revision: str | None = None, *, offline: bool = False) -> Path | None:
    """Return a file of a hub repository, from the cache when it is there; None when the repository lacks it.

    With ``offline``, or ``HF_HUB_OFFLINE`` set, only the cache is looked at. Raises `ModelNotFoundError` when there is
    no network and nothing cached, or no such repository or revision, and says what to do; `CheckpointError` when what
    is sent has another sha256 than the hub declares.
    """
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    cached = _cached(repo, filename, revision)
    if isinstance(cached, Path):
        return cached
    if is_offline(offline):
        if cached is not None:  # it is known from before that the repository has no such file
            return None
        raise ModelNotFoundError(_offline_advice(repo, filename, "--offline or HF_HUB_OFFLINE forbids asking the hub"))
    try:
        with explained(repo, filename, revision):
            declared = ask(hf_hub_url(repo, filename, revision=revision)).etag
            path = Path(hf_hub_download(repo, filename, revision=revision))
    except EntryNotFoundError:
        return None
    _check_hash(path, declared, f"{repo}/{filename}")
    return path


def refuse_adapter(repo: str, revision: str | None, *, offline: bool) -> None:
    """Raise `CheckpointError` where a repository with a model holds an adapter too.

    The hub is asked where the cache does not know and does not hold the weights yet.
    """
    found = _cached(repo, "adapter_config.json", revision)
    if found is None and find_weights(repo, None, revision) is None and not is_offline(offline):
        found = fetch(repo, "adapter_config.json", revision)
    if isinstance(found, Path):
        raise CheckpointError(f"{repo} {ADAPTER_BESIDE}")


def _check_hash(path: Path, declared: str | None, name: str) -> None:
    """Compare a download with the sha256 the hub declares, and take it out of the cache where it has another.

    The hub declares the sha256 of large files; huggingface_hub itself compares nothing but the length.
    """
    if declared is None or not re.fullmatch(r"[0-9a-f]{64}", declared):
        return
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == declared:
            return
    path.resolve().unlink(missing_ok=True)  # the blob; the snapshot's file is a link to it
    path.unlink(missing_ok=True)
    raise CheckpointError(f"what the hub sends for {name} has not the sha256 it declares: it is damaged, try again")


def _cached(repo: str, filename: str, revision: str | None) -> Path | object | None:
    """Return the cached file, None when nothing is known, another object when it is known not to exist."""
    from huggingface_hub import try_to_load_from_cache

    with explained(repo, filename, revision):
        found = try_to_load_from_cache(repo, filename, revision=revision)
    return Path(found) if isinstance(found, str) else found


def _commit(path: Path) -> str:
    """Return the commit a file in the hub's cache is of: its folder below ``snapshots``."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else ""


Tag = dict[str, str | None]


def cached_tags(tags: Mapping[str, Tag]) -> dict[str, Tag]:
    """Return those of an architecture's pretrained tags whose weights the hub's or torch.hub's cache holds."""
    return {tag: place for tag, place in tags.items() if _is_cached(place)}


def _is_cached(place: Tag) -> bool:
    repo, url = place["hf_hub_id"], place["url"]
    if repo:
        repo, _, revision = repo.partition("@")
        return find_weights(repo, place["hf_hub_filename"], revision or None) is not None
    return url is not None and is_whole(cached_path(url))

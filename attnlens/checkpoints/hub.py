"""Weights on the Hugging Face hub: from the local cache first, then over the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnlens.errors import ModelNotFoundError

WEIGHT_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
"""Names a hub repository keeps its weights under, in the order timm tries them."""


def fetch(repo: str, filename: str, revision: str | None = None) -> Path | None:
    """Return a file of a hub repository, from the cache when it is there; None when the repository lacks it.

    ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` are honoured by huggingface_hub. Raises `ModelNotFoundError`
    when there is no network and nothing cached, or no such repository, and says what to do offline.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    cached: Any = try_to_load_from_cache(repo, filename, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(hf_hub_download(repo, filename, revision=revision))
    except LocalEntryNotFoundError as error:  # also an EntryNotFoundError, but it means: no network
        raise ModelNotFoundError(
            f"{repo}/{filename} is not in the local cache and the hub cannot be reached. Offline, download the file "
            f"elsewhere and pass --checkpoint FILE, or run `hf download {repo} {filename}` while online"
        ) from error
    except EntryNotFoundError:
        return None
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"{repo} needs its licence accepted on the hub: do that, then `hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(f"the hub has no repository {repo!r} (or it is private: set HF_TOKEN)") from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelNotFoundError(f"cannot download {repo}/{filename}: {str(error).splitlines()[0]}") from error


def fetch_weights(repo: str, filename: str | None = None, revision: str | None = None) -> Path:
    """Return the weight file of a hub repository, trying the names timm tries."""
    names = (filename,) if filename else WEIGHT_FILES
    missing: ModelNotFoundError | None = None
    for name in names:
        try:
            path = fetch(repo, name, revision)
        except ModelNotFoundError as error:
            missing = missing or error  # a later name may be cached
            continue
        if path is not None:
            return path
    raise missing or ModelNotFoundError(f"{repo} holds no weights named {', '.join(names)}: pass --checkpoint FILE")

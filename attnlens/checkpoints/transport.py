"""Requests that may fail: tried again where waiting helps, and told in one line where not."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from attnlens.errors import ModelNotFoundError, first_line

T = TypeVar("T")
RETRY_WAITS = (0.5, 1.0, 2.0)
"""Seconds between attempts where a server fails for the moment."""


def ask(url: str) -> Any:
    """Return the metadata of a file on the hub; raises what `explained` turns into a message.

    huggingface_hub itself tries for minutes to reach a hub that is not there: here a first connection that fails is
    final, and only a hub that answers is asked again.
    """
    from huggingface_hub import constants, get_hf_file_metadata
    from huggingface_hub.errors import HfHubHTTPError

    def attempt() -> Any:
        return get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)

    try:
        return attempt()
    except HfHubHTTPError as error:
        if not _passes(error):
            raise
    return patiently(attempt)


def patiently(attempt: Callable[[], T]) -> T:
    """Call ``attempt``, again after `RETRY_WAITS` where the connection broke or the server failed for the moment."""
    from huggingface_hub.errors import HfHubHTTPError

    for wait in RETRY_WAITS:
        try:
            return attempt()
        except transport_errors() as error:
            if isinstance(error, HfHubHTTPError) and not _passes(error):
                raise
            time.sleep(wait)
    return attempt()


def _passes(error: Exception) -> bool:
    """Whether the server's answer is one that may be another in a moment."""
    return getattr(getattr(error, "response", None), "status_code", None) in (408, 429, 500, 502, 503, 504)


def transport_errors() -> tuple[type[Exception], ...]:
    """Return the base classes of what huggingface_hub's HTTP library raises: requests, httpx or httpx2 by version."""
    from huggingface_hub.errors import HfHubHTTPError

    bases: Any = HfHubHTTPError.__bases__
    return (*bases, OSError)


@contextlib.contextmanager
def explained(repo: str, filename: str, revision: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises into a `ModelNotFoundError` of one line, save a missing file's error."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except LocalEntryNotFoundError as error:  # also an EntryNotFoundError, but it means: no answer
        reason = f"the hub gives no answer ({first_line(error.__cause__ or error)})"
        raise ModelNotFoundError(_offline_advice(repo, filename, reason)) from error
    except EntryNotFoundError:
        raise
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{repo} has no revision {revision!r}: give a branch, a tag or a commit") from error
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"{repo} needs its licence accepted on the hub: do that, then `hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(f"the hub has no repository {repo!r} (or it is private: set HF_TOKEN)") from error
    except HFValidationError as error:
        raise ModelNotFoundError(f"{repo!r} is no hub repository: give owner/name ({first_line(error)})") from error
    except transport_errors() as error:
        if getattr(error, "response", None) is None and type(error).__module__ != "builtins":
            reason = f"the hub cannot be reached ({first_line(error)})"
            raise ModelNotFoundError(_offline_advice(repo, filename, reason)) from error
        raise ModelNotFoundError(f"cannot download {repo}/{filename}: {first_line(error)}") from error


def _offline_advice(repo: str, filename: str, reason: str) -> str:
    return (
        f"{repo}/{filename} is not in the local cache, and {reason}. Run `hf download {repo} {filename}` while online, "
        "or download the file elsewhere and pass --checkpoint FILE"
    )


def is_offline(asked: bool) -> bool:
    """Whether the network is not to be used: asked for, or by ``HF_HUB_OFFLINE``."""
    from huggingface_hub import constants

    return asked or constants.HF_HUB_OFFLINE

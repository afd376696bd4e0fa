"""Which of timm's pretrained weights are on this machine already."""

from __future__ import annotations

from collections.abc import Mapping

from attnlens.checkpoints.download import cached_path, is_whole
from attnlens.checkpoints.hub import find_weights

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

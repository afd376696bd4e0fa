"""Every kind of network that stands in this folder, by the name of ``--model`` and by the names of its sizes."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from attnlens.training.networks import __name__ as package
from attnlens.training.networks import __path__ as folder
from attnlens.training.networks.base import KNOWN, Network


def networks() -> list[type[Network]]:
    """Return the kinds of networks, in the order of their files."""
    for file in iter_modules(folder):
        import_module(f"{package}.{file.name}")
    return list(KNOWN)


def network_named(model: object) -> type[Network] | None:
    """Return the kind ``--model`` names, which is trained from drawn weights alone; None for a pre-trained model."""
    if not isinstance(model, str):
        return None
    return next((kind for kind in networks() if kind.prefix and model.startswith(kind.prefix)), None)


def network_of(sizes: Any) -> Any:
    """Return the network with the sizes a configuration holds: the kind whose names they have."""
    if not isinstance(sizes, dict):
        return sizes  # a network already, or what the configuration refuses
    for kind in networks():
        needed = {name for name, field in kind.model_fields.items() if field.is_required()}
        if needed <= sizes.keys() <= kind.model_fields.keys():
            return kind.model_validate(sizes)
    raise ValueError(f"no network has the sizes {', '.join(map(str, sizes))}")

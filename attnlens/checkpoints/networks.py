"""Which networks a file holds, which of them is read, and its tensors' names without what wrappers add to them.

A training checkpoint keeps a network and the average of its weights, a student and its teacher, two towers. They are
told by their names: two are alike where a stack of the same name, with the same matrices in it, stands below two
different prefixes. Keys of dictionaries and prefixes of names are one thing here: ``teacher`` is a network whether the
file is ``{"teacher": {...}}`` or names its tensors ``teacher.blocks.0...``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from attnlens.checkpoints.base import Checkpoint, View
from attnlens.errors import CheckpointError, UsageError
from attnlens.words import counted

_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module"))
_AROUND = ("module.", "_forward_module.", "base_model.model.")
"""What DataParallel, DDP, Fabric and PEFT put in front of every name."""
_AVERAGED = re.compile(r"(^|[._])(ema|teacher|swa|averaged?)([._]|$)|ema$", re.IGNORECASE)
_PROJECTIONS = frozenset(("q", "k", "v", "kv", "qk", "wq", "wk", "wv"))
_IN_PROJECTIONS = ("qkv", "query", "q_proj", "q_lin", "to_q", "c_attn")
"""Names, and parts of names, of what projects tokens to queries, keys or values."""
_WORD = re.compile(r"\w+")
_MOST = 32
"""Networks of a file that are told apart."""


@dataclass(frozen=True)
class Network:
    """A network of a file: its name for the user, and its tensors, ``{name without wrappers: name in the file}``."""

    name: str
    tensors: Mapping[str, str]


class ChosenNetwork(View):
    """One network of a file under its own names; where the file holds several, the provenance says which it is."""

    def __init__(self, origin: Checkpoint, networks: tuple[Network, ...], chosen: Network, *, asked: bool) -> None:
        self.origin, self.behind = origin, (origin,)
        self._names = chosen.tensors
        self.metadata, self.computed = origin.metadata, origin.computed
        self.networks = networks
        self.chosen = chosen
        self.asked = asked
        self.title = chosen.name if len(networks) > 1 or asked else ""

    def whole(self) -> ChosenNetwork:
        """Return all tensors below the keys that the networks stand in, for a description that covers several."""
        if self.asked:
            return self
        everything = _everything(self.origin, self.origin.keys_in_front)
        return ChosenNetwork(self.origin, (everything,), everything, asked=False)

    def others(self) -> Iterator[ChosenNetwork]:
        """Yield the file's other networks, unless this one was asked for."""
        for network in () if self.asked else self.networks:
            if network is not self.chosen:
                yield ChosenNetwork(self.origin, self.networks, network, asked=False)

    def provenance(self) -> dict[str, Any]:
        """Return the file's provenance, and which of its networks this is."""
        which: dict[str, Any] = {"weights": self.title} if self.title else {}
        if len(self.networks) > 1:
            which["networks"] = [network.name for network in self.networks]
        return {**self.origin.provenance(), **which}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.origin.shape(self._names[name])

    def expect(self, names: Iterable[str]) -> None:
        """Tell the file which of its tensors will be asked for."""
        self.origin.expect([self._names[name] for name in names if name in self._names])

    def __getitem__(self, name: str) -> Any:
        """Return a tensor."""
        return self.origin[self._names[name]]


def rechosen(checkpoint: Checkpoint, wanted: str | None) -> Checkpoint:
    """Return another network of the same file, where one is asked for."""
    if wanted is None or (isinstance(checkpoint, ChosenNetwork) and checkpoint.asked):
        return checkpoint
    return choose_network(checkpoint.origin if isinstance(checkpoint, ChosenNetwork) else checkpoint, wanted)


def choose_network(origin: Checkpoint, wanted: str | None = None) -> Checkpoint:
    """Return the network of a file that ``wanted`` names, or the default one; the file itself if it is just that.

    Of several, an average of weights that was kept beside them (``ema``, ``teacher``) is the default, as timm and DINO
    take it; else the first in the file. ``wanted`` is a network's name, or any prefix of names. Raises `UsageError`,
    and `CheckpointError` where two have one name.
    """
    found = networks_of(origin, origin.keys_in_front)
    if wanted is not None:
        return ChosenNetwork(origin, found, _wanted(origin, found, wanted), asked=True)
    known = {network.name: network for network in found}
    alike = [network for network in found if known[network.name] is not network]
    if alike:
        both = (alike[0], known[alike[0].name])
        one, other = (next(iter(network.tensors.values()), network.name) for network in both)
        raise CheckpointError(f"{one} and {other} are of one network stored twice: save the file without one of them")
    chosen = next((network for network in found if _AVERAGED.search(network.name)), found[0])
    if len(chosen.tensors) == len(origin) and all(name == stored for name, stored in chosen.tensors.items()):
        return origin
    return ChosenNetwork(origin, found, chosen, asked=False)


def _wanted(origin: Checkpoint, found: tuple[Network, ...], wanted: str) -> Network:
    """Return the network of a name, or what stands below a prefix."""
    for network in found:
        if network.name == wanted:
            return network
    fitting = [network for network in found if network.name.startswith(f"{wanted}.")]
    if len(fitting) == 1:
        return fitting[0]
    below = _unwrapped_names(origin)
    tensors = {name.removeprefix(f"{wanted}."): old for name, old in below.items() if name.startswith(f"{wanted}.")}
    parts = [network for network in found if wanted in re.split(r"[._]", network.name)]
    if not tensors and len(parts) == 1:  # ema, of state_dict and state_dict_ema
        return parts[0]
    if not tensors:
        raise UsageError(f"the file holds no weights {wanted!r}: it holds {names_of(found)}")
    return Network(wanted, tensors)


def outline(checkpoint: Checkpoint) -> str:
    """Say what a file holds: its networks, where there are several, and the first names."""
    names = list(checkpoint)
    several = checkpoint.networks if isinstance(checkpoint, ChosenNetwork) else ()
    told = f"the networks {names_of(several)}, and " if len(several) > 1 else ""
    return f"{told}{counted(len(names), 'tensor')}, {', '.join(names[:2])}, ..."


def names_of(found: Iterable[Network]) -> str:
    """Name networks, to be chosen from."""
    return ", ".join(network.name or "one network without a name" for network in found)


def unwrapped(name: str) -> str:
    """Return a name without the parts that compiling, sharding and checkpointing of activations put into it."""
    if not any(part in name for part in _WRAPPERS):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _unwrapped_names(origin: Iterable[str]) -> dict[str, str]:
    """Return ``{name without wrappers: name in the file}``. Raises `CheckpointError` where two become one."""
    names: dict[str, str] = {}
    for name in origin:
        other = names.setdefault(unwrapped(name), name)
        if other != name:
            raise CheckpointError(f"{other} and {name} are one tensor stored twice: save the file without one of them")
    return names


@dataclass(frozen=True)
class _Stack:
    """Where numbered layers stand: the path in front of the stack, and the stack's own name."""

    parent: str
    name: str


def _stack_of(name: str, front: str = "") -> tuple[_Stack, str]:
    """Return the stack a tensor is of, and its place inside, with # for numbers.

    Modules without a number in their path are a network's only behind the keys ``front`` of a dictionary.
    """
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if any("0" <= c <= "9" for c in part)), None)
    if first is None:
        inside = name.removeprefix(front)
        return _Stack(front.rstrip("."), inside.rpartition(".")[0]), inside
    start = first - 1 if parts[first].isdecimal() and first else first
    inside = re.sub(r"[0-9]+", "#", ".".join(parts[start + 1 :]))
    return _Stack(".".join(parts[:start]), re.sub(r"[0-9]+", "#", parts[start]) if start < len(parts) else ""), inside


def networks_of(origin: Iterable[str], keys: Mapping[str, str]) -> tuple[Network, ...]:
    """Return the networks a file holds, in its order: one, unless stacks of the same name and kind say otherwise."""
    names = _unwrapped_names(origin)
    stacked = _stacked(names, keys)
    kinds: dict[_Stack, set[str]] = {}
    for stack, inside in stacked.values():
        kinds.setdefault(stack, set()).add(inside)
    alike: dict[tuple[str, frozenset[str]], list[str]] = {}
    for stack, within in kinds.items():
        alike.setdefault((stack.name, frozenset(within)), []).append(stack.parent)
    parents = list(dict.fromkeys(p for twins in alike.values() if len(twins) > 1 for p in twins))
    if not 1 < len(parents) <= _MOST:
        return (_everything(origin, keys),)
    fronts = {
        parent: _common({keys.get(names[name], "") for name, (stack, _) in stacked.items() if stack.parent == parent})
        for parent in parents
    }
    found = []
    for parent, front in fronts.items():
        own = f"{parent}." if parent else ""
        rivals = tuple(f"{p}." for p in parents if p and p != parent and not own.startswith(f"{p}."))
        alone = list(fronts.values()).count(front) == 1
        first = next(stack.name for stack, _ in stacked.values() if stack.parent == parent)
        label = (
            front.rstrip(".")
            if front and alone
            else own.removeprefix(front).removeprefix("module.").rstrip(".") or first
        )
        found.append(_network(label, names, front, rivals))
    return tuple(found)


def _projects(name: str) -> bool:
    """Whether a part of a dotted name is that of a projection of attention, in steps that grow with its length."""
    parts = name.split(".")
    if not _PROJECTIONS.isdisjoint(parts):
        return True
    if "in_proj" not in name and not any(word in name for word in _IN_PROJECTIONS):
        return False
    words = filter(_WORD.fullmatch, parts)
    return any(part.startswith("in_proj") or any(word in part for word in _IN_PROJECTIONS) for part in words)


def _stacked(names: Mapping[str, str], keys: Mapping[str, str]) -> dict[str, tuple[_Stack, str]]:
    """Return the stack of every projection of attention; without one, of the weights in the largest stacks."""
    found = {name: _stack_of(name, keys.get(old, "")) for name, old in names.items() if _projects(name)}
    if found:
        return found
    found = {name: _stack_of(name, keys.get(old, "")) for name, old in names.items() if name.endswith(".weight")}
    sizes = Counter(stack for stack, _ in found.values())
    largest = max(sizes.values(), default=0)
    return {name: (stack, inside) for name, (stack, inside) in found.items() if 2 * sizes[stack] >= largest}


def _everything(origin: Iterable[str], keys: Mapping[str, str]) -> Network:
    """Return what stands below the keys that all stacks of a file have in front."""
    names = _unwrapped_names(origin)
    front = _common({keys.get(names[name], "") for name in _stacked(names, keys)} or {*keys.values()})
    return _network(front.rstrip("."), names, front, ())


def _network(label: str, names: Mapping[str, str], front: str, rivals: tuple[str, ...]) -> Network:
    """Return the network of the tensors below the keys ``front`` that are not below one of its ``rivals``."""
    own = {n.removeprefix(front): old for n, old in names.items() if n.startswith(front) and not n.startswith(rivals)}
    for around in _AROUND * 2:
        if own and all(name.startswith(around) for name in own):
            own = {name.removeprefix(around): old for name, old in own.items()}
    return Network(label, own)


def _common(fronts: set[str]) -> str:
    """Return the keys that all stand below."""
    parts = [front.split(".")[:-1] for front in fronts] or [[]]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return "".join(f"{part}." for part in shared)

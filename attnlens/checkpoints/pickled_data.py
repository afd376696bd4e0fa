"""Pickles of strangers read as data: an interpreter of pickle's operations in which nothing is ever called or imported.

A training script stores more than weights: an argparse.Namespace, numpy numbers, paths, a whole `nn.Module`, the object
of a TorchScript archive. None of it needs to run for its tensors to be found. Here a global is its name, an instance of
an unknown class is an `Inert` with the name and what was stored in it, and a tensor is where its bytes lie.
"""

from __future__ import annotations

import os
import pickle
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

HOSTILE = frozenset(
    [
        "os",
        "posix",
        "nt",
        "ntpath",
        "sys",
        "subprocess",
        "shutil",
        "socket",
        "pty",
        "runpy",
        "importlib",
        "webbrowser",
        "ctypes",
        "code",
        "codeop",
        "pickle",
        "marshal",
        "multiprocessing",
        "asyncio",
        "http",
        "urllib",
        "ftplib",
        "smtplib",
        "tempfile",
        "signal",
        "threading",
        "_thread",
        "timeit",
        "pdb",
        "profile",
        "cProfile",
        "_posixsubprocess",
        "torch.hub",
    ]
)
"""Modules whose functions no checkpoint needs: a file that asks for one is refused, though nothing would be called."""
_HOSTILE_BUILTINS = frozenset(
    ["eval", "exec", "compile", "__import__", "open", "input", "breakpoint", "globals", "locals", "delattr", "setattr"]
)
_HOSTILE_TORCH = frozenset(("torch load", "torch.storage _load_from_bytes", "torch.serialization load"))
_LARGEST_KEY = 1 << 60
"""Integers beyond may be chosen to share a hash: they are no keys of a checkpoint."""
_MOST_AXES = 64
"""Of a tensor; numpy has as many."""
BITS = ("neg", "conj")
"""What torch says of a tensor whose numbers are stored before their sign, or their imaginary part's, is turned."""
_DICTS = frozenset(("collections OrderedDict", "builtins dict", "collections defaultdict", "collections Counter"))


@dataclass(frozen=True)
class Global:
    """The name of a class or function, ``module name``; it is never looked up."""

    name: str


@dataclass
class Inert:
    """An instance of a class that is not looked up: its class's name, its items and its state."""

    name: str
    items: dict[Any, Any] = field(default_factory=dict)
    state: Any = None

    def attributes(self) -> dict[Any, Any]:
        """Return the stored attributes by name, empty where its state is no dictionary."""
        state = self.state[0] if isinstance(self.state, tuple) and self.state else self.state
        return state if isinstance(state, dict) else {}


@dataclass(frozen=True)
class StorageRef:
    """A stored run of numbers: the name of its type, its key in the file, how many."""

    kind: str
    key: str
    elements: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor as a view of a stored run; ``dtype`` names torch's type where the run has none of its own.

    ``bits`` are those of `BITS` that are set: what the numbers of the run stand for is not what they are.
    """

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str | None = None
    bits: tuple[str, ...] = ()


class UpToEnd:
    """What a pickle is read from: no memory is set aside for more bytes than the file has, whatever is asked for.

    Read and not mapped: a page of a map behind the end of a file that is cut meanwhile is a bus error.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.size = file, os.fstat(file.fileno()).st_size
        self.readline, self.tell, self.seek = file.readline, file.tell, file.seek

    def read(self, count: int) -> bytes:
        """Return so many bytes, or those that are left."""
        return self._file.read(min(count, max(self.size - self.tell(), 0)))


def read_pickle(stream: IO[bytes] | UpToEnd, storages: dict[str, StorageRef] | None = None) -> Any:
    """Return what one pickle holds, as dictionaries, lists, numbers, text, `TensorRef` and `Inert`.

    Every run of numbers that it names is added to ``storages`` by its key, also where nothing that is read holds it.

    Raises `pickle.UnpicklingError` for globals of `HOSTILE` modules and operations no checkpoint uses, and whatever
    damaged operations raise.
    """
    machine = _Machine({} if storages is None else storages)
    for operation, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]
        machine.room += 1
        machine.step(operation.name, argument)
    return machine.stack[-1]


class _Machine:
    """The stack and the memo of a pickle that is being read."""

    def __init__(self, storages: dict[str, StorageRef]) -> None:
        self.storages = storages
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.room = 0
        """Pairs that may yet be copied into dictionaries: each took an operation, and one list may be given often."""

    def step(self, name: str, argument: Any) -> None:
        if name in _PUSHES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in ("PROTO", "FRAME", "STOP"):
            pass
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else int(argument)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[int(argument)])
        elif name in ("GLOBAL", "INST"):
            self._found(_global(str(argument)), call=name == "INST")
        else:
            method: Callable[[], None] | None = getattr(self, f"_{name.lower()}", None)
            if method is None:
                raise pickle.UnpicklingError(f"it uses the operation {name}, which no checkpoint needs")
            method()

    def _found(self, found: Global, *, call: bool) -> None:
        if call:
            self._marked()
        self.stack.append(Inert(found.name) if call else found)

    def _marked(self) -> list[Any]:
        """Take what stands above the last mark."""
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_global(f"{module} {name}"))

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        made = _made(function, arguments)
        self.room -= len(made) if isinstance(made, dict) else 0
        if self.room < 0:
            raise pickle.UnpicklingError("it makes dictionaries of one list again and again")
        self.stack.append(made)

    def _newobj(self) -> None:
        self._reduce()

    def _newobj_ex(self) -> None:
        self.stack.pop()
        self._reduce()

    def _obj(self) -> None:
        kind, *_ = self._marked()
        self.stack.append(_made(kind, ()))

    def _build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].state = state

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._store([key, value])

    def _setitems(self) -> None:
        self._store(self._marked())

    def _store(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        held = target.items if isinstance(target, Inert) else target
        if isinstance(held, dict):
            held.update(_keyed(pairs))

    def _append(self) -> None:
        value = self.stack.pop()
        if isinstance(self.stack[-1], list):
            self.stack[-1].append(value)

    def _appends(self) -> None:
        values = self._marked()
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)

    def _additems(self) -> None:
        self._marked()

    def _frozenset(self) -> None:
        self._marked()
        self.stack.append(Inert("builtins frozenset"))

    def _dict(self) -> None:
        self.stack.append(dict(_keyed(self._marked())))

    def _list(self) -> None:
        self.stack.append(self._marked())

    def _tuple(self) -> None:
        self.stack.append(tuple(self._marked()))

    def _tuple1(self) -> None:
        self._last(1)

    def _tuple2(self) -> None:
        self._last(2)

    def _tuple3(self) -> None:
        self._last(3)

    def _last(self, count: int) -> None:
        taken = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(taken)

    def _pop(self) -> None:
        self.stack.pop()

    def _pop_mark(self) -> None:
        self._marked()

    def _dup(self) -> None:
        self.stack.append(self.stack[-1])

    def _binpersid(self) -> None:
        found = _storage(self.stack.pop())
        if isinstance(found, StorageRef):
            self.storages[found.key] = found
        self.stack.append(found)


_PUSHES = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "BINBYTES8",
        "SHORT_BINBYTES",
        "UNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "SHORT_BINUNICODE",
        "BYTEARRAY8",
    ]
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": lambda: Inert("builtins set"),
}


def _global(name: str) -> Global:
    """Return the name of a global; refuse those that only a file meant to run code asks for."""
    module, _, leaf = name.partition(" ")
    top = module.partition(".")[0]
    builtin = top in ("builtins", "__builtin__") and leaf in _HOSTILE_BUILTINS
    if top in HOSTILE or module in HOSTILE or builtin or name in _HOSTILE_TORCH:
        raise pickle.UnpicklingError(f"it asks for {name[:100]}")
    return Global(name)


def _keyed(pairs: list[Any]) -> list[tuple[Any, Any]]:
    """Return the pairs whose keys are text or numbers; no other key is part of a checkpoint's names."""
    found = []
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if isinstance(key, str | bool | float) or (isinstance(key, int) and abs(key) < _LARGEST_KEY):
            found.append((key, value))
    return found


def _storage(identity: Any) -> Any:
    """Return the stored run that a persistent id of torch's names."""
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        return Inert("persistent id")
    _, kind, key, _, elements, *view = identity
    if not isinstance(kind, Global) or not isinstance(elements, int) or any(part is not None for part in view):
        raise pickle.UnpicklingError("it names a storage in a way that is not used")
    return StorageRef(kind.name, str(key), elements)


def _made(function: Any, arguments: Any) -> Any:
    """Return what calling ``function`` stands for: a dictionary, a tensor, or an object that does nothing."""
    name = function.name if isinstance(function, Global) else "object"
    given = arguments if isinstance(arguments, tuple) else ()
    if name in _DICTS:
        pairs = given[-1] if given and isinstance(given[-1], list) else []
        whole = all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)
        return dict(_keyed([part for pair in pairs for part in pair])) if whole else {}
    if name.startswith("torch._utils _rebuild_parameter") or name == "torch.nn.parameter Parameter":
        return given[0] if given else None
    if name == "torch._tensor _rebuild_from_type_v2" and len(given) > 2:
        plain = given[1] in (Global("torch Tensor"), Global("torch.nn.parameter Parameter"))
        return _made(given[0], given[2]) if plain else Inert(_text(given[1]))
    if name in ("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2"):
        return _tensor(given[:4], bits=given[6:])
    if name == "torch._utils _rebuild_tensor_v3" and len(given) > 6:
        return _tensor(given[:4], _text(given[6]), given[7:])
    return Inert(name)


def _text(value: Any) -> str:
    return value.name if isinstance(value, Global) else type(value).__name__


def _tensor(parts: tuple[Any, ...], dtype: str | None = None, bits: tuple[Any, ...] = ()) -> TensorRef:
    """Return a tensor of storage, offset, shape and stride; ``bits`` holds the dictionary of those set, or nothing."""
    told = bits[0] if bits and bits[0] is not None else {}
    if len(bits) > 1 or not isinstance(told, dict) or not told.keys() <= {*BITS}:
        raise pickle.UnpicklingError("it describes a tensor in a way that is not used")
    storage, offset, shape, stride = parts
    if len(shape) > _MOST_AXES or len(stride) > _MOST_AXES:
        raise pickle.UnpicklingError(f"it holds a tensor of more than {_MOST_AXES} axes")
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, StorageRef) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise pickle.UnpicklingError("it describes a tensor in a way that is not used")
    if len(shape) != len(stride):
        raise pickle.UnpicklingError("it describes a tensor in a way that is not used")
    return TensorRef(storage, offset, tuple(shape), tuple(stride), dtype, tuple(bit for bit in BITS if told.get(bit)))

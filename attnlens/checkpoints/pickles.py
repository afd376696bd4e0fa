"""Pickles of PyTorch: looked through before they are loaded, so that no code runs and nothing small becomes large.

`torch.load` with ``weights_only`` runs no code. It does believe sizes: `bytearray` of any length, chains of encodings
that double, tuples of tuples whose hash takes for ever, one number seen as a tensor of any shape. Here each operation
of a pickle is looked at first, by name, length and weight, and each tensor afterwards.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

from attnlens.checkpoints.archives import check_archive, data_offset
from attnlens.checkpoints.pickled_data import UpToEnd
from attnlens.errors import AttnlensError, first_line

_ZIP = b"PK\x03\x04"
_LEGACY_PICKLES = 5
"""Magic number, protocol, system, the object, names of storages: what stands in front of the bytes."""
_ALLOWED = re.compile(
    r"(collections OrderedDict|builtins set|__builtin__ set|torch (\w+Storage|Size|Tensor|device|u?int\d+|b?float\w+|"
    r"half|double|bool|long|short|complex\d+)|torch\.(cuda|storage) \w+Storage|torch\.nn\.parameter Parameter|"
    r"torch\._utils _rebuild_(tensor(_v[23])?|parameter(_with_state)?)|torch\._tensor _rebuild_from_type_v2)"
)
"""What weights are made of. Less than torch allows: nothing here allocates by a number or encodes text."""
_HEAVIEST = 1_000_000
"""Leaves of one tuple, counted as often as they are reached: hashing it takes that many steps."""
_LARGE_KEYS = 1000
"""Integers beyond 60 bits: many of them may be chosen to share a hash, and a dictionary of those takes for ever."""
TIED = 16
"""Bytes of tensors for each byte of the file: names may share a storage, each tensor must fit into the file."""


class _NoDescriptor(io.BufferedReader):
    """A file torch reads through Python: through a descriptor it first tries its oldest format, which unpacks tars."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


def load_pickle(path: Path, refusal: type[AttnlensError]) -> Any:
    """Load what `torch.save` wrote, tensors on the CPU and memory-mapped where the format allows.

    Memory: the file, if it is of the format before PyTorch 1.6; else what the pickle in it takes. Raises ``refusal``
    for files that hold more than weights and plain data, claim more than they hold, or are damaged.
    """
    import torch

    try:
        with path.open("rb") as file:
            zipped = file.read(len(_ZIP)) == _ZIP
        if zipped:
            _scan_zip(path)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            _scan_legacy(path)
            with _NoDescriptor(io.FileIO(path)) as file:
                loaded = torch.load(file, map_location="cpu", weights_only=True)
        _check_tensors(loaded, path.stat().st_size)
    except pickle.UnpicklingError as error:
        raise refusal(
            f"{path} holds more than weights, and unpickling it could run code: refused "
            f"({first_line(error)}). Save its state_dict() as safetensors and give that file"
        ) from error
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        raise refusal(f"{path} is no PyTorch checkpoint ({first_line(error)}): truncated or corrupt") from error
    return loaded


def _scan_zip(path: Path) -> None:
    """Look through the pickle of a zip archive, which must look the same to Python's reader and to torch's."""
    import torch

    with path.open("rb") as file:
        members = check_archive(file, stored=True)
    reader = torch._C.PyTorchFileReader(str(path))  # noqa: SLF001  # the reader `torch.load` uses
    own = {member.filename.partition("/")[2]: member for member in members}
    if len(own) < len(members) or set(own) != set(reader.get_all_records()):
        raise zipfile.BadZipFile("its directory can be read in two ways")
    offset = reader.get_record_offset("data.pkl")  # type: ignore[attr-defined]
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        if offset != data_offset(file, own["data.pkl"]):
            raise zipfile.BadZipFile("its directory can be read in two ways")
        _scan(io.BytesIO(archive.read(own["data.pkl"])))


def _scan_legacy(path: Path) -> None:
    with path.open("rb") as file:
        content = UpToEnd(file)
        for _ in range(_LEGACY_PICKLES):
            _scan(content)


def _scan(stream: IO[bytes] | UpToEnd) -> None:
    """Look through one pickle, up to its end. Raises `pickle.UnpicklingError` for what weights are not made of.

    The stack is followed by weight alone: a tuple weighs what it holds, a list or dictionary one, as nothing is hashed
    or compared by what is inside those.
    """
    stack: list[_Value] = []
    marks: list[int] = []
    memo: dict[int, _Value] = {}
    large = 0
    for operation, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]
        name = operation.name
        if name in ("GLOBAL", "INST", "STACK_GLOBAL") and not _ALLOWED.fullmatch(str(argument)):
            raise pickle.UnpicklingError(f"it asks for {str(argument)[:100]}")
        if isinstance(argument, int) and abs(argument) >> 60 and name != "PROTO":
            large += 1
        if large > _LARGE_KEYS:
            raise pickle.UnpicklingError("it holds too many integers beyond 60 bits")
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if argument is None else int(argument)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument)]._replace(shared=True))  # type: ignore[arg-type]
        elif name == "DUP":
            stack.append(stack[-1]._replace(shared=True))
        else:
            _follow(operation, str(argument), stack, marks)
        if stack and stack[-1].weight > _HEAVIEST:
            raise pickle.UnpicklingError("it nests tuples in tuples without end")


class _Value(NamedTuple):
    """What is known of a value on the stack."""

    weight: int
    shared: bool = False
    """Whether it is, or a tuple with it holds, something that stands elsewhere, too."""
    copies: bool = False
    """Whether it is a class that copies what it is called with."""


_COPYING = ("collections OrderedDict", "builtins set", "__builtin__ set")
_IN_PLACE = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")


def _follow(operation: pickletools.OpcodeInfo, argument: str, stack: list[_Value], marks: list[int]) -> None:
    """Apply one operation to the stack. Raises `pickle.UnpicklingError` for copies of what stands elsewhere, too."""
    name, before = operation.name, list(operation.stack_before)
    if pickletools.markobject in before:
        start = marks.pop()
        taken = stack[start:]
        del stack[start:]
        before = before[: before.index(pickletools.markobject)]
    else:
        taken = []
    for _ in before:
        taken.append(stack.pop())
    copied = name == "BUILD" or (name == "REDUCE" and taken[-1].copies)
    if copied and taken[0].shared:  # one list, copied again and again
        raise pickle.UnpicklingError("it copies one value again and again")
    holds = name.startswith(("TUPLE", "REDUCE", "NEWOBJ", "BINPERSID"))
    made = _Value(
        1 + sum(value.weight for value in taken) if holds else 1,
        taken[-1].shared if name in _IN_PLACE else name.startswith("TUPLE") and any(value.shared for value in taken),
        name == "GLOBAL" and argument in _COPYING,
    )
    stack.extend(made for _ in operation.stack_after)


def _check_tensors(loaded: Any, size: int) -> None:
    """Refuse tensors that are no plain memory, or larger than the file they came from."""
    import torch

    total, seen, waiting = 0, set(), [loaded]
    parts: dict[type, Callable[[Any], Any]] = {list: list, tuple: list, set: list, dict: dict.values}
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise ValueError(f"it holds a tensor of layout {value.layout} on {value.device}")
            claimed = value.numel() * value.element_size()
            total += claimed
            if claimed > size or total > TIED * size:
                raise ValueError(f"{size} bytes on disk claim to hold {max(claimed, total)} bytes of tensors")
        for kind, inner in parts.items():
            if isinstance(value, kind):
                waiting.extend(inner(value))

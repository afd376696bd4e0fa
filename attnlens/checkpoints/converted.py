"""Files of a timm architecture that timm did not write: renamed by timm's own functions, or read below a prefix."""

from __future__ import annotations

import contextlib
import inspect
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from attnlens.checkpoints.base import Checkpoint
from attnlens.checkpoints.files import NpzFile, SafetensorsFile
from attnlens.errors import CheckpointError, first_line

if TYPE_CHECKING:
    import torch
    from torch import nn

FILTER = "timm checkpoint_filter_fn"
LOADER = "timm load_pretrained (npz)"

# What a function that renames and reshapes raises when it is given another format than it was written for.
_MISFITS = (
    *(LookupError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError, ArithmeticError),
    MemoryError,
)
_GROWS = 8
"""Bytes a network converted to may have for each byte of the file: its sizes come from a file, too."""
_ALWAYS = 64 << 20


class ConvertedWeights(Checkpoint):
    """Tensors made from another checkpoint, whose provenance they keep; ``how`` says by what."""

    def __init__(self, tensors: Mapping[str, Any], origin: Checkpoint, how: str) -> None:
        self._tensors = tensors
        self._origin, self.behind = origin, (origin,)
        self.how = how

    def provenance(self) -> dict[str, Any]:
        """Return the origin's provenance, and how its tensors were converted."""
        return {**self._origin.provenance(), "converted": self.how}

    def __getitem__(self, name: str) -> Any:
        """Return a converted tensor, which may be pages of the origin's file: that is looked at first."""
        self._origin.check()
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a converted tensor."""
        return tuple(self._tensors[name].shape)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the tensors' names after conversion."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._tensors)


class PrefixedWeights(ConvertedWeights):
    """The tensors of a checkpoint below a prefix, under their names without it; each is read when it is asked for."""

    def __init__(self, origin: Checkpoint, prefix: str) -> None:
        names = {name.removeprefix(prefix): name for name in origin if name.startswith(prefix)}
        super().__init__(names, origin, f"prefix {prefix!r} taken off")

    def __getitem__(self, name: str) -> Any:
        """Return the tensor stored as prefix + name."""
        return self._origin[self._tensors[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the tensor stored as prefix + name."""
        return self._origin.shape(self._tensors[name])

    def expect(self, names: Iterable[str]) -> None:
        """Tell the origin which of its tensors will be asked for."""
        self._origin.expect(self._tensors[name] for name in names)

    def __contains__(self, name: object) -> bool:
        """Whether prefix + name is stored; nothing is read."""
        return name in self._tensors


def below_prefix(checkpoint: Checkpoint, shapes: Mapping[str, list[int]]) -> PrefixedWeights | None:
    """Find the one prefix below which every tensor of ``shapes`` is stored; None without one, or with several."""
    first = next(iter(shapes))
    prefixes = [name.removesuffix(first) for name in checkpoint if name.endswith(f".{first}")]
    fitting = [prefix for prefix in prefixes if all(prefix + name in checkpoint for name in shapes)]
    return PrefixedWeights(checkpoint, fitting[0]) if len(fitting) == 1 else None


def convert(
    name: str, model_args: dict[str, Any], checkpoint: Checkpoint, check: Callable[[dict[str, Any]], None]
) -> ConvertedWeights:
    """Pass a foreign checkpoint through what timm itself passes checkpoints of architecture ``name`` through.

    State dicts go through the architecture's ``checkpoint_filter_fn``, JAX/Flax archives through the model's
    ``load_pretrained``. ``check`` is given what `rehearse` takes, and raises where that takes too much. Raises
    `CheckpointError` when timm has neither for the architecture, or it fails.
    """
    checkpoint.check()
    if isinstance(checkpoint, NpzFile) and any("/" in key for key in checkpoint):
        found, how = _loaded(name, model_args, checkpoint, check), LOADER
    else:
        found, how = _filtered(name, model_args, checkpoint, check), FILTER
    checkpoint.check()
    return ConvertedWeights(found, checkpoint, how)


def rehearse(request: Mapping[str, Any]) -> None:
    """Convert zeros of the types and shapes of a file's tensors, or its JAX archive: what that costs is measured."""
    import torch

    if "path" in request:
        _read(request["name"], _empty(request["name"], request["model_args"]), request["path"])
        return
    with _told(f"timm's checkpoint_filter_fn for {request['name']}"):
        state = {}
        for key, kind, shape in request["tensors"]:
            dtype = getattr(torch, kind)
            zeros = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)  # memory that is not there until it is filled
            state[key] = torch.from_numpy(zeros).view(dtype).reshape(shape)
    _through(request["name"], *_filter_of(request["name"], request["model_args"]), state)


def _filtered(
    name: str, model_args: dict[str, Any], checkpoint: Checkpoint, check: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Return what the architecture's ``checkpoint_filter_fn`` makes of a state dict."""
    model, filter_fn = _filter_of(name, model_args)
    if filter_fn is None:
        raise CheckpointError(f"timm has no checkpoint_filter_fn for {name}")
    _check_size(name, model, checkpoint)
    with _told(f"timm's checkpoint_filter_fn for {name}"):
        state = _torch_state(checkpoint)
    tensors = [(key, str(value.dtype).removeprefix("torch."), list(value.shape)) for key, value in state.items()]
    stored = checkpoint.size() or sum(value.nbytes for value in state.values())
    check({"name": name, "model_args": model_args, "bytes": stored, "tensors": tensors})
    return _through(name, model, filter_fn, state)


def _through(
    name: str, model: nn.Module, filter_fn: Callable[..., dict[str, Any]] | None, state: dict[str, torch.Tensor]
) -> dict[str, Any]:
    assert filter_fn is not None, "it was looked for before"
    takes_model = len(inspect.signature(filter_fn).parameters) > 1  # a few take the state dict alone
    with _told(f"timm's checkpoint_filter_fn for {name}"):
        found = filter_fn(state, model) if takes_model else filter_fn(state)
    return {key: value for key, value in found.items() if hasattr(value, "is_meta") and not value.is_meta}


def _loaded(
    name: str, model_args: dict[str, Any], checkpoint: NpzFile, check: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Return what the model's own npz reader fills: every tensor starts as NaN; those that keep one are left out."""
    model = _empty(name, model_args)
    if not callable(getattr(model, "load_pretrained", None)):
        raise CheckpointError(f"{checkpoint.path} is a JAX archive, and timm has no reader of those for {name}")
    _check_size(name, model, checkpoint)
    path = str(checkpoint.path.absolute())
    check({"name": name, "model_args": model_args, "bytes": checkpoint.size(), "path": path})
    with checkpoint.reading() as file:
        model = _read(name, model, checkpoint.place_of(file), str(checkpoint.path))
    return {key: value for key, value in model.state_dict().items() if not value.isnan().any()}


def _empty(name: str, model_args: dict[str, Any]) -> nn.Module:
    """Return the architecture on the meta device."""
    import timm
    import torch

    with torch.device("meta"):
        return timm.create_model(name, pretrained=False, **model_args)


def _read(name: str, model: nn.Module, path: str, called: str = "") -> nn.Module:
    """Return the model, which is on the meta device, as its own npz reader fills it: with NaN where it does not.

    What goes wrong is told of the path that the file is ``called`` by.
    """
    import torch

    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
    with _told(f"timm's load_pretrained for {name}", {path: called or path}):
        reader: Any = model.load_pretrained
        reader(path)
    return model


def _filter_of(name: str, model_args: dict[str, Any]) -> tuple[nn.Module, Callable[..., dict[str, Any]] | None]:
    """Return the architecture on the meta device, and the function timm would pass its checkpoints through.

    Each model's factory makes that function (often a partial or a closure) and hands it to ``load_pretrained`` alone,
    so a stand-in for ``load_pretrained`` takes it down while the model is built; no weights are loaded.
    """
    import timm
    import torch
    from timm.models import _builder

    caught: list[Any] = []
    original = _builder.load_pretrained

    def take_down(_model: nn.Module, *_args: Any, filter_fn: Any = None, **_kwargs: Any) -> None:
        caught.append(filter_fn)

    _builder.load_pretrained = take_down
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=True, **model_args)
    finally:
        _builder.load_pretrained = original
    return model, next((function for function in caught if function is not None), None)


def _torch_state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint as a torch tensor; types that torch has not got are converted."""
    import torch

    if isinstance(checkpoint, SafetensorsFile):
        from safetensors.torch import load_file

        with checkpoint.reading() as file, checkpoint.by_path(file) as place:
            return dict(load_file(place))
    return {
        name: torch.from_numpy(np.array(value, _plain_type(value.dtype))) if isinstance(value, np.ndarray) else value
        for name, value in checkpoint.items()
    }


def _plain_type(kind: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type that torch shares with numpy: for those of ml_dtypes float32, for a longdouble float64."""
    if kind.isbuiltin == 2:  # of ml_dtypes
        return np.dtype(np.float32)
    return np.dtype(np.float64) if kind.kind == "f" and kind.itemsize > 8 else kind.newbyteorder("=")


def _check_size(name: str, model: nn.Module, checkpoint: Checkpoint) -> None:
    """Refuse a conversion to a network that is much larger than the file: position embeddings would be resampled."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    stored = checkpoint.size()
    if size > _GROWS * stored + _ALWAYS:
        raise CheckpointError(f"{name} as its model_args describe it takes {size} bytes, the file has {stored}")


@contextlib.contextmanager
def _told(what: str, names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turn what a conversion raises into one line, and keep what it prints off stdout, where JSON may be going.

    ``names`` has for a path what is said in its place.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except _MISFITS as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):  # torch has no error of its own for that
            raise CheckpointError(f"{what} takes more memory for this file than there is for it") from error
        text = first_line(error)
        for place, name in (names or {}).items():
            text = text.replace(place, name)
        raise CheckpointError(f"{what} cannot read this file either ({type(error).__name__}: {text})") from error

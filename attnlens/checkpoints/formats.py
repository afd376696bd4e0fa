"""What a file is, by how it begins: which reader takes it, or what it is and what converts it."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

from attnlens.checkpoints.base import INDEX_SUFFIX
from attnlens.errors import CheckpointError
from attnlens.strict_json import there

SUFFIXES = {".safetensors": "safetensors", ".npz": "npz"} | dict.fromkeys(
    (".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl", ".pickle", ".th", ".jit", ".torchscript"), "torch"
)
_SAVE = "load it with the library that wrote it and save its state_dict() as safetensors"
_DCP = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
_OTHERS = {
    ".onnx": f"an ONNX graph: {_SAVE}, or export the weights with the onnx package",
    ".gguf": "a GGUF file of llama.cpp: give the Hugging Face folder it was converted from",
    ".h5": f"an HDF5 file, of Keras or TensorFlow: {_SAVE}",
    ".hdf5": f"an HDF5 file, of Keras or TensorFlow: {_SAVE}",
    ".keras": f"a Keras archive: {_SAVE}",
    ".msgpack": f"a Flax msgpack file: {_SAVE} (transformers: from_pretrained(..., from_flax=True))",
    ".tflite": f"a TensorFlow Lite graph: {_SAVE}",
    ".distcp": f"a shard of a distributed checkpoint: run `{_DCP}`",
    ".engine": f"a TensorRT engine: {_SAVE}",
    ".mlmodel": f"a Core ML model: {_SAVE}",
    ".7z": "a 7-Zip archive: unpack it and give the weight file in it",
    ".rar": "a RAR archive: unpack it and give the weight file in it",
}
OTHER_FORMATS = tuple(_OTHERS)
"""Suffixes of formats that are told from the ones that are read, and refused with what converts them."""
_BEGINNINGS = (
    (
        b"version https://git-lfs",
        "a pointer of Git LFS and not the weights: run `git lfs pull`, or download the file itself",
    ),
    (
        b"<!doctype",
        "an HTML page and not the weights: the download was refused or redirected, download the file itself",
    ),
    (b"<html", "an HTML page and not the weights: the download was refused or redirected, download the file itself"),
    (b"<?xml", "an XML document and not the weights: the download was refused, download the file itself"),
    (b"gguf", _OTHERS[".gguf"]),
    (b"7z\xbc\xaf\x27\x1c", _OTHERS[".7z"]),
    (b"rar!\x1a\x07", _OTHERS[".rar"]),
    (b"\x89hdf\r\n\x1a\n", _OTHERS[".h5"]),
)
_FOLDERS = (
    (
        "*.distcp",
        "a distributed checkpoint",
        _DCP,
    ),
    ("zero_to_fp32.py", "a DeepSpeed checkpoint", "python FOLDER/zero_to_fp32.py FOLDER FILE"),
    ("*/mp_rank_00_model_states.pt", "a DeepSpeed checkpoint", "python FOLDER/zero_to_fp32.py FOLDER FILE"),
    (
        "mp_rank_00_model_states.pt",
        "a DeepSpeed checkpoint",
        "python zero_to_fp32.py FOLDER FILE, of the folder above it",
    ),
)


def kind_of(path: Path) -> str:
    """Return ``safetensors``, ``torch``, ``npz``, ``index`` or a key of `PACKED`: by the first bytes, else by the name.

    Raises `CheckpointError` for other formats, which says what the file is and what to do.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return "index"
    with path.open("rb") as file:
        start = file.read(512)
    lowered = start.lstrip().lower()
    for beginning, what in _BEGINNINGS:
        if lowered.startswith(beginning):
            raise CheckpointError(f"{path} is {what}")
    if start.startswith(b"\x08") and b"pytorch" in start[:40]:
        raise CheckpointError(f"{path} is {_OTHERS['.onnx']}")
    suffix = path.suffix.lower()
    if suffix in _OTHERS:
        raise CheckpointError(f"{path} is {_OTHERS[suffix]}")
    if _is_safetensors(start, path.stat().st_size):
        return "safetensors"
    if start.startswith(b"PK\x03\x04"):
        return _archive_kind(path, SUFFIXES.get(suffix, "zip"))
    if start[257:262] == b"ustar":
        return "tar"
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "compressed"
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    raise CheckpointError(f"{path} has suffix {suffix!r}, and does not begin as a format that is read: give {ACCEPTED}")


PACKED_SUFFIXES = (".tar", ".zip", ".gz", ".tgz", ".bz2", ".xz", ".txz", ".zst")
PACKED = {"tar": "a tar archive", "zip": "a zip archive around other files", "compressed": "a compressed file"}
ACCEPTED = "a .safetensors, .pth, .bin or .npz file, a shard index (.index.json), or an archive of one such file"


def _is_safetensors(start: bytes, size: int) -> bool:
    length = struct.unpack("<Q", start[:8])[0] if len(start) > 8 else 0
    return start[8:9] == b"{" and 2 <= length <= size - 8


def _archive_kind(path: Path, named: str) -> str:
    """Tell torch's and numpy's archives, and a zip around another file, by the members."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
    except Exception:  # noqa: BLE001  # a damaged directory is told by the reader that the name calls for
        return named if named != "zip" else "torch"
    if any(name.endswith("/data.pkl") and name.count("/") == 1 for name in names):
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    return "zip" if any(Path(name).suffix.lower() in SUFFIXES for name in names) else named


def refuse_folder(folder: Path) -> None:
    """Raise `CheckpointError` for a folder of a training library that is no model folder, with what converts it."""
    for pattern, what, command in _FOLDERS:
        if there(folder.is_dir) and next(folder.glob(pattern), None) is not None:
            raise CheckpointError(f"{folder} is {what}: make one file of it with `{command}`")

"""Archives around a weight file: the values of the file itself, one member of several, and refusals within bounds."""

import bz2
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

import attnlens
from attnlens.checkpoints import open_checkpoint
from attnlens.errors import AttnlensError, CheckpointError, UsageError


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b.0.attn.qkv.weight": (18, 6), "b.0.attn.proj.weight": (6, 6)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def pth(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def tarred(files, mode="w:", links=None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, (kind, target) in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    return buffer.getvalue()


def zipped(files, method=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


FILE = {"run/model.safetensors": save(tensors())}
PACKED = {
    "x.tar": tarred(FILE),
    "x.tar.gz": tarred(FILE, "w:gz"),
    "x.tgz": tarred(FILE, "w:gz"),
    "x.tar.bz2": tarred(FILE, "w:bz2"),
    "x.tar.xz": tarred(FILE, "w:xz"),
    "x.zip": zipped(FILE),
    "stored.zip": zipped(FILE, zipfile.ZIP_STORED),
    "named.zip": zipped({"run/": b"", "run/notes.txt": b"a", "__MACOSX/run/._model.safetensors": b"b", **FILE}),
    "model.safetensors.gz": gzip.compress(save(tensors())),
    "model.pth.bz2": bz2.compress(pth(tensors())),
    "model.pth.xz": lzma.compress(pth({"model": tensors(), "epoch": 3})),
    "two streams.pth.xz": lzma.compress(pth(tensors())[:1000]) + bytes(8) + lzma.compress(pth(tensors())[1000:]),
    "weights.gz": gzip.compress(pth(tensors())),
    "renamed.pth": tarred(FILE),
}


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Keep what is unpacked in a folder that the tests can see."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def put(folder, name, content):
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize("name", PACKED)
def test_what_is_packed_is_read_as_it_is_alone_and_nothing_stays(name, tmp_path, temporary):
    path = put(tmp_path, name, PACKED[name])
    checkpoint = open_checkpoint(path)
    for tensor, value in tensors().items():
        np.testing.assert_array_equal(np.asarray(checkpoint[tensor]), value)
    provenance = checkpoint.provenance()
    assert provenance["sha256"] == hashlib.sha256(PACKED[name]).hexdigest()
    assert (provenance["file"], provenance["bytes"]) == (name, len(PACKED[name]))
    inside = "run/model.safetensors" if "model" not in name and "weights" not in name and "two" not in name else None
    assert provenance.get("member") == inside
    assert attnlens.inspect(path, num_heads=2).depth == 1
    del checkpoint
    assert list(temporary.iterdir()) == []
    assert {file.name for file in tmp_path.iterdir()} == {name, "temporary"}


SEVERAL = {"a/first.pth": pth({"model": tensors(1), "ema": tensors(2)}), "a/second.safetensors": save(tensors(3))}


@pytest.mark.parametrize("pack", [tarred, zipped])
def test_of_several_files_one_is_asked_for_and_of_its_networks_one(tmp_path, pack):
    path = put(tmp_path, "two.archive.zip", pack(SEVERAL))
    with pytest.raises(UsageError, match=r"it holds 2 weight files, a/first.pth, a/second.safetensors: choose with"):
        open_checkpoint(path)
    with pytest.raises(UsageError, match=r"weights third.pth is not one of 2 weight files"):
        open_checkpoint(path, "third.pth")
    for wanted, seed in {
        "a/second.safetensors": 3,
        "second.safetensors": 3,
        "first.pth": 2,
        "a/first.pth:model": 1,
        "first.pth:ema": 2,
    }.items():
        found = open_checkpoint(path, wanted)["b.0.attn.proj.weight"]
        np.testing.assert_array_equal(np.asarray(found), tensors(seed)["b.0.attn.proj.weight"])


def test_of_one_file_weights_names_a_network(tmp_path):
    path = put(tmp_path, "one.tar.gz", tarred({"first.pth": SEVERAL["a/first.pth"]}, "w:gz"))
    for wanted, seed in {None: 2, "model": 1, "first.pth": 2}.items():
        found = open_checkpoint(path, wanted)["b.0.attn.proj.weight"]
        np.testing.assert_array_equal(np.asarray(found), tensors(seed)["b.0.attn.proj.weight"])


@pytest.mark.parametrize("pack", [tarred, zipped])
def test_a_packed_folder_is_read_with_its_configuration(tmp_path, pack):
    bert = {
        f"encoder.layer.0.attention.{name}.weight": torch.randn(6, 6)
        for name in ("self.query", "self.key", "self.value", "output.dense")
    } | {"embeddings.LayerNorm.weight": torch.ones(6)}
    config = {"model_type": "bert", "hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
    files = {"m/model.safetensors": save(bert), "m/config.json": json.dumps(config).encode()}
    found = attnlens.inspect(put(tmp_path, "m.zip", pack(files)))
    assert found.provenance["architecture"] == "bert"
    assert found.heads(0).num_heads == 2
    np.testing.assert_array_equal(found.heads(0).W_V[1].T, bert["encoder.layer.0.attention.self.value.weight"][3:])


ZEROS = bytes(80 << 20)
HOSTILE = {
    "bomb.gz": (gzip.compress(ZEROS), "unpacks to more than"),
    "bomb.xz": (lzma.compress(ZEROS, preset=0), "unpacks to more than"),
    "bomb.bz2": (bz2.compress(ZEROS), "unpacks to more than"),
    "bomb.zip": (zipped({"model.pth": ZEROS}), "claim to hold"),
    "way.zip": (zipped(FILE, zipfile.ZIP_LZMA), r"compressed in a way that is not used here\): unpack it yourself"),
    "many.zip": (zipped({f"{number}.txt": b"" for number in range(10_001)}), "holds more than 10000 members"),
    "x.7z": (b"7z\xbc\xaf\x27\x1c" + bytes(30), "is a 7-Zip archive: unpack it"),
    "renamed.pth": (b"Rar!\x1a\x07\x01\x00" + bytes(30), "is a RAR archive: unpack it"),
    "bomb.tar.gz": (tarred({"model.pth": ZEROS}, "w:gz"), "unpacks to more than"),
    "memory.xz": (
        lzma.compress(b"a", filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}]),
        "Memory usage limit",
    ),
    "link.tar": (tarred({}, links={"model.pth": (tarfile.SYMTYPE, "/etc/passwd")}), "no plain file"),
    "hard.tar": (tarred({"a.txt": b"a"}, links={"model.pth": (tarfile.LNKTYPE, "a.txt")}), "no plain file"),
    "device.tar": (tarred({}, links={"model.pth": (tarfile.CHRTYPE, "")}), "no plain file"),
    "nested.tar": (
        tarred({"inner.tar": tarred(FILE)}),
        "is an? .*(archive|file).*: unpack it and give the weight file in it",
    ),
    "nested.zip": (
        zipped({"inner.pth": zipped(FILE)}),
        "is an? .*(archive|file).*: unpack it and give the weight file in it",
    ),
    "nested.gz": (
        gzip.compress(gzip.compress(b"a")),
        "is an? .*(archive|file).*: unpack it and give the weight file in it",
    ),
    "zip.gz": (gzip.compress(zipped(FILE)), "is an? .*(archive|file).*: unpack it and give the weight file in it"),
    "nothing.tar": (tarred({"a.txt": b"a", "b.zip": b"b"}), "holds no weight file: it holds a.txt, b.zip"),
    "empty.tar.gz": (tarred({}, "w:gz"), "truncated or corrupt"),
    "shards.tar": (tarred({"model.safetensors.index.json": b"{}", "a.safetensors": b""}), "several shards"),
    "twice.tar": (tarred({"a.pth": b"1", "./a.pth": b"2"}), "two members"),
    "junk.tar": (tarred({"a.pth": b"junk"}), "a.pth in .*junk.tar is no PyTorch checkpoint"),
    "lfs.zip": (zipped({"a.safetensors": b"version https://git-lfs.github.com/spec/v1\n"}), "pointer of Git LFS"),
    "cut.tar.gz": (tarred(FILE, "w:gz")[:-200], "truncated or corrupt"),
    "cut.xz": (PACKED["model.pth.xz"][:-200], "truncated or corrupt"),
    "flipped.bz2": (PACKED["model.pth.bz2"][:300] + bytes(40) + PACKED["model.pth.bz2"][340:], "truncated or corrupt"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_claims_too_much_or_leads_elsewhere_is_refused_in_one_line(name, tmp_path, temporary):
    content, message = HOSTILE[name]
    path = put(tmp_path, name, content)
    with pytest.raises(AttnlensError, match=message) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(temporary) not in str(caught.value)
    assert str(path) in str(caught.value)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("name", ["../../out.pth", "/out.pth", "a/../../out.pth", "..\\out.pth", "C:\\out.pth"])
@pytest.mark.parametrize("pack", [tarred, zipped])
def test_names_that_lead_out_of_the_folder_write_nothing_there(tmp_path, temporary, pack, name):
    before = sorted(tmp_path.rglob("*"))
    path = put(tmp_path, "out.zip", pack({name: pth(tensors())}))
    checkpoint = open_checkpoint(path)
    (folder,) = temporary.iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["weights.pth"]
    assert len(checkpoint) == 2
    del checkpoint
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path])
    assert not Path("/out.pth").exists()


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python reads Zstandard itself")
def test_zstandard_is_named_where_neither_python_nor_a_package_reads_it(tmp_path, monkeypatch):
    path = put(tmp_path, "x.pth.zst", bytes.fromhex("28b52ffd2001090000") + b"a")  # one raw block: the letter a
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(CheckpointError, match=r"compressed by Zstandard, which Python reads from 3\.14 on"):
        open_checkpoint(path)


def test_zstandard_gives_the_values_of_the_file(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="reads .zst before Python 3.14: pip install zstandard")
    path = put(tmp_path, "x.pth.zst", zstandard.ZstdCompressor().compress(pth(tensors())))
    found = open_checkpoint(path)["b.0.attn.proj.weight"]
    np.testing.assert_array_equal(np.asarray(found), tensors()["b.0.attn.proj.weight"])

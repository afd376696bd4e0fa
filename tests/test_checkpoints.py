"""Weight files: every type is widened, nothing in them runs, broken ones are told in one line."""

import io
import json
import os
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from attnlens.checkpoints import ModuleWeights, networks, open_checkpoint
from attnlens.checkpoints.archives import array_header
from attnlens.checkpoints.memory import StateDict
from attnlens.errors import CheckpointError


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
def test_every_stored_type_widens_to_the_value_torch_gives(tmp_path, dtype):
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"w": values}, tmp_path / "a.safetensors", metadata={"architecture": "x"})
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(checkpoint["w"].astype(np.float64), values.double().numpy())
    assert checkpoint.metadata == {"architecture": "x"}


def test_a_truncated_safetensors_file_is_told_to_be_downloaded_again(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(4)}, path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"not a whole safetensors file .* download it again"):
        open_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, struct.pack("<Q", 4) + b"{}  "[:4]])
def test_junk_named_safetensors_is_refused_or_empty(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    try:
        assert len(open_checkpoint(path)) == 0
    except CheckpointError as error:
        assert "truncated or corrupt" in str(error)  # noqa: PT017  # both outcomes are right, by content


def test_a_header_whose_offsets_lie_is_refused(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return os.system, ("touch evil-ran",)


def test_a_pickle_that_holds_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": Evil()}, "a.pth")
    with pytest.raises(CheckpointError, match=r"holds more than weights.*refused"):
        open_checkpoint("a.pth")
    assert not (tmp_path / "evil-ran").exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("nest", [(), ("state_dict",), ("model",), ("model_ema",)])
def test_state_dicts_are_found_inside_training_checkpoints(tmp_path, nest, legacy):
    saved = {"module.w": torch.arange(3.0)}
    for name in nest:
        saved = {name: saved, "epoch": 3}
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(tmp_path / "a.pth")
    assert list(checkpoint) == ["w"]
    assert checkpoint["w"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04broken zip"])
def test_junk_named_pth_is_told_in_one_line(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "a.pth")
    assert "\n" not in str(caught.value)


def test_a_pickle_without_tensors_says_what_to_save(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"holds no tensors: save model\.state_dict\(\)"):
        open_checkpoint(tmp_path / "a.pth")


def test_a_missing_file_and_a_foreign_suffix_say_what_is_accepted(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not there: give a \.safetensors"):
        open_checkpoint(tmp_path / "absent.safetensors")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"suffix '\.txt'"):
        open_checkpoint(tmp_path / "a.txt")


def test_provenance_names_the_file_with_its_hash(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "a.safetensors")
    found = open_checkpoint(tmp_path / "a.safetensors").provenance()
    assert found["file"] == "a.safetensors"
    assert len(found["sha256"]) == 64
    assert found["bytes"] == (tmp_path / "a.safetensors").stat().st_size


def test_a_live_module_is_read_as_it_is_at_the_time():
    layer = torch.nn.Linear(2, 2)
    weights = ModuleWeights(layer)
    with torch.no_grad():
        layer.weight.fill_(7)
    assert weights["weight"].unique().tolist() == [7]


@pytest.mark.parametrize(
    "array",
    [np.zeros(()), np.zeros(3, "f2"), np.zeros((2, 3, 0), "i8"), np.zeros((2, 3), order="F"), np.zeros((1,) * 20)],
    ids=["scalar", "half", "empty", "Fortran", "many axes"],
)
def test_headers_that_numpy_writes_are_read(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    file.seek(0)
    assert array_header(file) == (array.shape, array.dtype)


@pytest.mark.parametrize(
    "text",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }[",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1, " * 3000,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1" * 9000,
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '<f4', 'shape': (3,), }",
        "(" * 9000,
        "",
    ],
    ids=["open bracket", "many lengths", "one length", "fields", "two entries", "brackets", "nothing"],
)
def test_a_header_that_numpy_does_not_write_is_refused_before_it_is_parsed(text, monkeypatch):
    monkeypatch.setattr("ast.literal_eval", lambda _: pytest.fail("it was parsed"))
    content = text.encode()
    with pytest.raises(ValueError, match="its header is"):
        array_header(io.BytesIO(b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "turned",
    [
        lambda c: c.conj().imag,
        lambda c: c.conj(),
        lambda c: torch._neg_view(c.conj()),
        lambda c: torch._neg_view(c.real),
    ],
    ids=["imaginary part of a conjugate", "conjugate", "negative conjugate", "negative"],
)
def test_a_tensor_stored_before_its_sign_was_turned_has_its_sign(tmp_path, turned, legacy):
    whole = torch.randn(4, 6, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    content = {"w": turned(whole), "v": torch.ones(3)}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(tmp_path / "x.pth")
    for name, stored in content.items():
        np.testing.assert_array_equal(checkpoint[name].numpy(), stored.resolve_conj().resolve_neg().numpy())


def test_a_sign_turned_of_numbers_that_torch_never_turns_is_refused(tmp_path):
    torch.save({"w": torch._neg_view(torch.ones(3, dtype=torch.bool))}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"turns the sign of numbers of type torch\.bool"):
        open_checkpoint(tmp_path / "x.pth")


def test_more_shards_than_files_that_may_be_open_are_told_by_the_limit(tmp_path):
    names = [f"{number}.weight" for number in range(90)]
    for name in names:
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in names}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    code = (
        "import resource, sys; from attnlens.checkpoints import open_checkpoint; import numpy, ml_dtypes, safetensors;"
        "stored = open_checkpoint(sys.argv[1]); stored['0.weight']; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); kept = [*stored.values()]"
    )
    script = [sys.executable, "-c", code, tmp_path / "m.safetensors.index.json"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert re.search(r"CheckpointError: cannot read /.*Too many open files: raise the limit, `ulimit -n", done.stderr)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", ["sparse", "quantised"])
@pytest.mark.parametrize("legacy", [True, False])
def test_tensors_beside_one_of_a_kind_that_is_not_read_are_read(kind, legacy, tmp_path):
    other = (
        torch.eye(5).to_sparse() if kind == "sparse" else torch.quantize_per_tensor(torch.ones(7), 0.5, 0, torch.qint32)
    )
    tensors = {"a": torch.arange(12.0), "other": other, "b": torch.arange(4.0, dtype=torch.float64)}
    torch.save(tensors, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    found = open_checkpoint(tmp_path / "x.pt")
    assert [found[name].tolist() for name in "ab"] == [tensors[name].tolist() for name in "ab"]
    with pytest.raises(
        CheckpointError, match=r"^other in .* is stored as torch\._utils\._rebuild_\w+, which is not read"
    ):
        found["other"]


def test_networks_of_one_name_without_tensors_are_refused_too(monkeypatch):
    alike = (networks.Network("a", {}), networks.Network("a", {"x": "a.x"}))
    monkeypatch.setattr(networks, "networks_of", lambda *_: alike)
    with pytest.raises(CheckpointError, match=r"^a and a\.x are of one network stored twice"):
        networks.choose_network(StateDict({"a.x": torch.ones(2, 2)}))


@pytest.mark.parametrize("kind", ["file", "state dict"])
@pytest.mark.parametrize("outer", ["", "state_dict."])
def test_a_name_of_two_tensors_is_refused(kind, outer, tmp_path):
    state = {f"{outer}a.b.weight": torch.ones(2, 2), f"{outer}a": {"b.weight": torch.zeros(2, 2)}}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"a\.b\.weight names two tensors, .*: keep one"):
        open_checkpoint(tmp_path / "x.pt") if kind == "file" else StateDict(state)


@pytest.mark.parametrize("front", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("last", [True, False])
def test_a_network_that_is_stored_twice_is_refused_by_name(front, last, tmp_path):
    plain = {f"blocks.{n}.attn.{name}.weight": torch.ones(9, 3) for n in range(2) for name in ("qkv", "proj")}
    wrapped = {front + name: 2 * tensor for name, tensor in plain.items()}
    torch.save({**wrapped, **plain} if last else {**plain, **wrapped}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.qkv\.weight and \S+ are .* stored twice"):
        open_checkpoint(tmp_path / "x.pt")

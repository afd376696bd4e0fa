"""Atomic writing: the old file or the new one, never half of either."""

import pytest
import safetensors.torch
import torch

from attnlens.atomic import write_atomic, write_text_atomic
from attnlens.checkpoints import written
from attnlens.checkpoints.written import write_safetensors
from attnlens.errors import OutputError


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    target = write_text_atomic(tmp_path / "deep" / "a.txt", "old")

    def fail(file):
        file.write(b"half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_atomic(target, fail)
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_a_place_that_cannot_be_written_is_named_with_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*a\.txt: .*Choose a folder you can write to with output"):
        write_text_atomic(tmp_path / "file" / "a.txt", "text")


def test_files_get_the_permissions_of_ordinary_new_files(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    assert write_text_atomic(tmp_path / "atomic", "").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_a_file_keeps_its_permissions_when_it_is_written_again(tmp_path, mode):
    path = write_text_atomic(tmp_path / "a.txt", "old")
    path.chmod(mode)
    assert write_text_atomic(path, "new").read_text() == "new"
    assert path.stat().st_mode & 0o777 == mode


def test_tensors_that_share_memory_are_written_each_by_themselves_in_the_bytes_of_a_copy(tmp_path):
    base = torch.arange(20.0)
    tensors = {
        "whole": base,
        "part": base[3:9],
        "tied": base,
        "transposed": torch.arange(35.0).reshape(5, 7).T,
        "empty": torch.zeros(0, 3),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "mask": torch.tensor([True, False]),
        "code": torch.arange(5, dtype=torch.int8),
        "double": torch.ones(2, dtype=torch.float64),
    }
    path = write_safetensors(tmp_path / "a.safetensors", tensors, {"key": "value"})
    copies = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    assert path.read_bytes() == safetensors.torch.save(copies, {"key": "value"})


@pytest.mark.parametrize("kind", list(written.TYPES), ids=str)
def test_weights_of_every_type_are_what_the_library_reads(tmp_path, kind):
    values = torch.arange(6).reshape(2, 3) % 2
    found = write_safetensors(tmp_path / "a.safetensors", {"a": values.to(getattr(torch, kind))}, {"key": "wörd"})
    read = safetensors.torch.load_file(found)["a"]
    assert str(read.dtype) == f"torch.{kind}"
    assert torch.equal(read.to(torch.float64), values.to(torch.float64))
    with safetensors.safe_open(found, "pt") as file:
        assert file.metadata() == {"key": "wörd"}

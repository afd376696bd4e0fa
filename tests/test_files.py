"""Atomic writing: the old file or the new one, never half of either."""

import pytest

from attnlens.atomic import write_atomic, write_text_atomic
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
    with pytest.raises(OutputError, match=r"cannot write .*a\.txt: .*Choose a folder you can write to with --output"):
        write_text_atomic(tmp_path / "file" / "a.txt", "text")


def test_files_get_the_permissions_of_ordinary_new_files(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    assert write_text_atomic(tmp_path / "atomic", "").stat().st_mode == plain.stat().st_mode

"""Small files that ask for much: headers of tars, names of tensors, many files, sizes that only a constructor sees."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import attnlens
from attnlens.checkpoints import open_checkpoint
from attnlens.checkpoints.low_rank import adapted
from attnlens.checkpoints.memory import StateDict
from attnlens.checkpoints.open import LONGEST_NAME
from attnlens.checkpoints.tars import LARGEST_HEADER
from attnlens.errors import AttnlensError, CheckpointError
from attnlens.models.bounded import names_bounded
from attnlens.models.sizes import shown_arguments
from attnlens.scans.plan import plan_scan
from attnlens.training.data.image_files import DatasetError, tar_files

PNG = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x02\x00\x00\x00\x90wS\xde\x00\x00\x00\x0c"
    b"IDATx\x9cc\xf8\xcf\xc0\x00\x00\x03\x01\x01\x00\xc9\xfe\x92\xef\x00\x00\x00\x00IEND\xaeB`\x82"
)


def header(kind, content, name="h"):
    """Return a header in front of a member as it is stored, whatever it says."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


def member(name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


def record(key, value):
    """Return a record of an extended header, which begins with its own length."""
    length = len(f" {key}={value}\n")
    while len(f"{length} {key}={value}\n") > length:
        length += 1
    return f"{length} {key}={value}\n".encode()


KEYS = b"".join(record(f"key{n}", "v") for n in range(500))
HEADERS = {
    "digits": [header(tarfile.XHDTYPE, b"1" * 300_000)],
    "records inside of each other": [header(tarfile.XHDTYPE, b"2 " * 50_000 + b"=")],
    "a long header": [header(tarfile.XHDTYPE, record("comment", "x" * (LARGEST_HEADER + 1)))],
    "a long name": [header(tarfile.GNUTYPE_LONGNAME, b"x" * (LARGEST_HEADER + 1))],
    "a header of Solaris": [header(tarfile.SOLARIS_XHDTYPE, b"1" * 300_000)],
    "headers in a row": [header(tarfile.XHDTYPE, record("comment", "x"))] * 5000,
    "names in a row": [header(tarfile.GNUTYPE_LONGLINK, b"x\0")] * 5000,
    "many global keys": [header(tarfile.XGLTYPE, KEYS), member("a.txt", b"")] * 3,
    "many large headers": [
        header(tarfile.XHDTYPE, b"1" * LARGEST_HEADER) + member(f"{n}.txt", b"") for n in range(100)
    ],
}


@pytest.mark.parametrize("kind", HEADERS)
def test_the_headers_in_front_of_a_member_are_bounded(kind, tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join(HEADERS[kind]) + member("train/a/1.png", PNG) + bytes(1024))
    began = time.process_time()
    with pytest.raises(CheckpointError, match=r"cannot be unpacked"):
        open_checkpoint(path)
    opened = time.process_time()
    with pytest.raises(DatasetError, match=r"cannot be read as a tar"):
        list(tar_files(path))
    assert (
        max(opened - began, time.process_time() - opened) < 20
    )  # what is promised; it takes 3 where nothing else runs


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_headers_that_archives_have_are_read(kind, tmp_path):
    path, long = tmp_path / "x.tar", "/".join(["d" * 100] * 20)
    weights = io.BytesIO()
    np.savez(weights, a=np.ones((2, 3)))
    told = {"comment": "a commit", "SCHILY.xattr.user.note": "n" * 900}
    with tarfile.open(path, "w", format=kind, pax_headers=told if kind == tarfile.PAX_FORMAT else {}) as archive:
        for name, content in ((f"{long}/train/a/1.png", PNG), (f"{long}/w.npz", weights.getvalue())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.pax_headers = {"mtime": "1700000000.25", "SCHILY.xattr.user.note": "n" * 900}
            archive.addfile(info, io.BytesIO(content))
    assert open_checkpoint(path)["a"].shape == (2, 3)
    assert list(tar_files(path)) == [(f"{long}/train/a/1.png", PNG)]


def test_what_a_global_header_says_is_not_kept_with_each_member(tmp_path):
    path = tmp_path / "x.tar"
    each = header(tarfile.XHDTYPE, record("comment", "x")) + member("a/1.png", PNG)
    path.write_bytes(header(tarfile.XGLTYPE, KEYS) + each * 8000 + bytes(1024))
    code = (
        "import resource, sys; from pathlib import Path; from attnlens.training.data.image_files import tar_files; "
        "rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = rss(); "
        "n = sum(1 for _ in tar_files(Path(sys.argv[1]))); print(n, (rss() - before) >> 10)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True, text=True)
    count, mib = map(int, done.stdout.split())
    assert count == 8000
    assert mib < 24  # 56 where the 500 keys are kept with each member


NAMES = {
    "parts of blocks": "blocks.1.1." * 20_000 + "\n\nx",
    "parametrizations": ".parametrizations.a" * 20_000 + ".\n\nx",
    "low rank": "a." * 100_000 + "lora_A\n",
    "numbers": ".1" * 100_000,
    "a name of letters": "x" * (LONGEST_NAME + 1),
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
def test_no_tensor_has_a_name_of_a_thousand_letters(kind, suffix, tmp_path):
    path, value = tmp_path / f"x{suffix}", np.ones((2, 2), np.float32)
    if suffix == ".safetensors":
        save_file({NAMES[kind]: value}, path)
    elif suffix == ".pth":
        torch.save({NAMES[kind]: torch.ones(2, 2)}, path)
    else:  # a name in a zip archive has at most 65,535 bytes
        np.savez(path, **{NAMES[kind][-60_000:]: value})
    began = time.process_time()
    with pytest.raises(CheckpointError, match=r"holds a name of \d+ characters"):
        open_checkpoint(path)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "words", ["qkv", "c_attn", "query", "to_q", "q.weight.", "lora_A.", ".parametrizations.a", "1."]
)
def test_long_names_of_projections_take_no_square_of_their_length(words, tmp_path):
    long = (words * LONGEST_NAME)[: LONGEST_NAME - 10]
    save_file({f"{number}.{long}-": np.ones((1, 1), np.float32) for number in range(400)}, tmp_path / "x.safetensors")
    began = time.process_time()
    with pytest.raises(AttnlensError, match="named like q, k, v"):
        attnlens.inspect(tmp_path / "x.safetensors", num_heads=1)
    assert time.process_time() - began < 3  # 18 where each place of a name is a beginning of its own


def test_a_name_of_a_thousand_letters_is_read(tmp_path):
    save_file({"x" * LONGEST_NAME: np.ones((2, 2), np.float32)}, tmp_path / "x.safetensors")
    assert list(open_checkpoint(tmp_path / "x.safetensors")) == ["x" * LONGEST_NAME]


def test_sizes_that_a_file_shows_are_built_within_bounds():
    """The sizes that the file shows come on top of those that it states: each is small, the network of both is not."""
    shapes = {"stages.0.blocks.0.x": (1,), "stages.1.blocks.0.x": (1,)}
    began = time.monotonic()
    assert shown_arguments("tiny_vit_5m_224", {"window_sizes": [200] * 4}, shapes) is None
    assert time.monotonic() - began < 60
    assert "torch" in sys.modules
    with pytest.raises(AttnlensError, match="timm cannot build"):
        names_bounded("tiny_vit_5m_224", {"window_sizes": [200] * 4})
    assert "blocks.0.attn.qkv.weight" in names_bounded("vit_tiny_patch16_224", {"depth": 1})


def test_a_pattern_over_many_files_takes_no_square_of_their_number(tmp_path):
    for number in range(6000):
        (tmp_path / f"{number}.pth").touch()
    (tmp_path / "a.txt").touch()
    began = time.process_time()
    plan = plan_scan([f"{tmp_path}/*"])
    assert len(plan.jobs) == 6000
    assert "1 of 6001 paths is no model" in plan.notes[0]
    assert time.process_time() - began < 4


def test_an_array_of_python_2_is_read_without_a_word(tmp_path):
    content = io.BytesIO()
    np.savez(content, a=np.arange(12.0).reshape(3, 4))
    raw = content.getvalue().replace(b"(3, 4), }  ", b"(3L, 4L), }")
    assert b"3L" in raw
    import zipfile

    with zipfile.ZipFile(io.BytesIO(content.getvalue())) as old, zipfile.ZipFile(tmp_path / "x.npz", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"(3, 4), }  ", b"(3L, 4L), }"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = open_checkpoint(tmp_path / "x.npz")
        assert found.shape("a") == (3, 4)
        assert np.array_equal(np.asarray(found["a"]), np.arange(12.0).reshape(3, 4))


def test_a_legacy_checkpoint_that_is_cut_while_it_is_opened_is_no_bus_error(tmp_path):
    """It is cut when its numbers' types are looked up, behind its pickles: pages beyond the cut are not mapped."""
    path = tmp_path / "x.pt"
    torch.save({f"w{n}": torch.ones(400, 400) for n in range(8)}, path, _use_new_zipfile_serialization=False)
    code = """
import os, sys
from attnlens.checkpoints import torch_files
found = torch_files._dtype
def cut(*given):
    os.truncate(sys.argv[1], 5000)
    return found(*given)
torch_files._dtype = cut
try:
    torch_files.TorchFile(__import__('pathlib').Path(sys.argv[1]))
except Exception as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "CheckpointError\n")


def test_many_files_in_a_scan_cost_no_square_when_outputs_are_checked(tmp_path):
    from attnlens.outputs import Outputs

    files = []
    for number in range(3000):
        files.append(tmp_path / f"{number}.pth")
        files[-1].touch()
    outputs = Outputs(tuple(files))
    began = time.process_time()
    for number in range(3000):
        outputs.spare(tmp_path / f"{number}.json")
    assert time.process_time() - began < 2
    os.link(files[7], tmp_path / "link.csv")
    with pytest.raises(AttnlensError, match="is what this command reads"):
        outputs.spare(tmp_path / "link.csv")


def test_the_scanned_files_are_no_results(tmp_path):
    models, output = tmp_path / "s" / "m", tmp_path / "s"
    models.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(attnlens.__file__).parent / "embedded" / name, models)
    (job,) = plan_scan([str(models)]).jobs
    (output / "models").mkdir()
    for suffix, target in ((".csv", "model.safetensors"), (".json", "config.json")):
        link = output / "models" / f"{job.key}{suffix}"
        link.symlink_to(models / target)
        before = (models / target).read_bytes()
        with pytest.raises(AttnlensError, match="is what this command reads"):
            attnlens.scan(str(models), output, workers=1, fold="raw", force=True)
        assert (models / target).read_bytes() == before
        link.unlink()
    (output / "scan.csv").write_text(f"{models}\n")
    with pytest.raises(AttnlensError, match=r"scan\.csv is what this command reads"):
        attnlens.scan(f"@{output}/scan.csv", output, workers=1, fold="raw", force=True)
    attnlens.scan(str(models), tmp_path / "t", workers=1, fold="raw")
    assert json.loads((tmp_path / "t" / "scan.json").read_text())["provenance"]["patterns"] == [str(models)]


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("quantised", [False, True])
def test_a_later_layer_that_lacks_a_tensor_is_named(suffix, quantised, tmp_path):
    """Of a network that names tell, the first layer is looked at for what it is; the others may hold less."""
    state = {"h.0.attn.c_attn.weight": (12, 4), "h.0.attn.c_proj.weight": (4, 4), "h.0.ln_1.weight": (4,)}
    state |= {"h.1.attn.c_attn.weight": (12, 4)}
    weights = {name: np.ones(shape, np.float32) for name, shape in state.items()}
    path = tmp_path / f"m{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else np.savez(path, **weights)
    if quantised:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"bits": 8}}))
    with pytest.raises(CheckpointError, match=r"h\.1\.attn\.c_proj\.weight is missing"):
        attnlens.inspect(path, num_heads=2)


@pytest.mark.parametrize("value", [1e-320, 1e-285, 0.0, 1e99])
def test_a_landscape_is_drawn_of_numbers_of_any_size(value, tmp_path):
    (tmp_path / "m").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(attnlens.__file__).parent / "embedded" / name, tmp_path / "m")
    scanned = attnlens.scan(str(tmp_path / "m"), tmp_path / "s", workers=1, fold="raw")
    for result in scanned.results.values():
        result["table"] = [
            [*row[:4], *(value if isinstance(one, float) else one for one in row[4:])] for row in result["table"]
        ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scanned.figure("raw").savefig(io.BytesIO())


@pytest.mark.parametrize(
    ("shapes", "alpha"),
    [({}, 10**4000), ({"lora_A.weight": (0, 4), "lora_B.weight": (4, 0), "alpha": (1,)}, None)],
)
def test_adapters_without_a_scale_that_is_a_number_are_refused(shapes, alpha):
    shapes = {"weight": (4, 4), "lora_A.weight": (2, 4), "lora_B.weight": (4, 2)} | shapes
    stored = StateDict({f"a.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()})
    with pytest.raises(CheckpointError, match=r"^a\.weight has .* adapter"):
        adapted(stored, lambda: {"adapter": {"lora_alpha": alpha}})["a.weight"]

"""Small files whose tensors would broadcast, or be resampled, to large ones: refused in one line, in little memory."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from attnlens.checkpoints import open_checkpoint
from attnlens.checkpoints.computed import Plan
from attnlens.checkpoints.converted import convert
from attnlens.checkpoints.memory import StateDict
from attnlens.errors import CheckpointError
from attnlens.models.bounded import check_conversion
from attnlens.models.weights import title_of
from attnlens.printable import one_line
from tests.conftest import ROOT

N = 7000
"""N x N numbers of 8 bytes are 374 MiB; N of 4 are 27 KiB."""
OLD, NEW = "m.weight_{}", "m.parametrizations.weight.{}"
ACROSS = {
    "a zero point": {"m.weight": (48, 4), "m.weight_scale": (1,), "m.weight_zero_point": (4, N)},
    "a zero point of rows": {"m.weight": (N, 1), "m.weight_scale": (N, 1), "m.weight_zero_point": (1, N)},
    "a mask": {OLD.format("orig"): (N, 1), OLD.format("mask"): (1, N)},
    "lengths": {OLD.format("g"): (N,), OLD.format("v"): (N, 1)},
    "lengths along": {OLD.format("g"): (1, N), OLD.format("v"): (N, 1)},
    "lengths, new": {NEW.format("original0"): (N,), NEW.format("original1"): (N, 1)},
    "v of spectral_norm": {OLD.format("orig"): (N, 1), OLD.format("u"): (N,), OLD.format("v"): (1, N)},
    "v of spectral_norm, new": {NEW.format("original"): (N, 1), NEW.format("0._u"): (N,), NEW.format("0._v"): (1, N)},
    "a bias": {"m.weight": (N, 1), "m.bias": (N, 1), "m.ia3_l.default": (N, 1)},
}
READ = """
import resource, sys
from pathlib import Path
from attnlens.checkpoints import open_checkpoint
from attnlens.errors import CheckpointError

rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = rss()
checkpoint = open_checkpoint(Path(sys.argv[1]))
for name in ("m.weight", "m.bias"):
    try:
        checkpoint[name] if name in checkpoint else None
    except CheckpointError as error:
        print(error)
print((rss() - before) >> 10)
"""


@pytest.mark.parametrize("kind", ACROSS)
def test_parts_of_other_shapes_are_refused_by_name_and_spread_nowhere(kind, tmp_path):
    tensors = {name: np.ones(shape, np.float32) for name, shape in ACROSS[kind].items()}
    if "zero" in kind:
        tensors["m.weight"] = tensors["m.weight"].astype(np.int8)
    save_file(tensors, tmp_path / "x.safetensors")
    script = [sys.executable, "-c", READ, tmp_path / "x.safetensors"]
    done = subprocess.run(script, cwd=ROOT, check=True, capture_output=True, text=True)
    *told, mib = done.stdout.splitlines()
    assert len(told) == 1
    assert told[0].startswith("m.bias " if kind == "a bias" else "m.weight ")
    assert 0 <= int(mib) < 64  # 374 and more where the parts are spread


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({OLD.format("orig"): (6, 4), OLD.format("mask"): (1, 4)}, "of shapes"),
        ({OLD.format("g"): (4,), OLD.format("v"): (6, 4)}, "has lengths"),
        ({OLD.format("g"): (2, 1), OLD.format("v"): (6, 4)}, "has lengths"),
    ],
)
def test_what_torch_never_writes_is_not_spread_to_fit(parts, named):
    from attnlens.checkpoints.parametrized import reparametrised

    stored = reparametrised(StateDict({name: np.ones(shape) for name, shape in parts.items()}))
    with pytest.raises(CheckpointError, match=rf"^m\.weight .*{named}"):
        stored.shape("m.weight")


@pytest.mark.parametrize("lengths", [(), (1,), (6, 1), (1, 4), (1, 1)])
def test_lengths_of_any_axis_are_applied(lengths):
    from attnlens.checkpoints.parametrized import reparametrised

    v = np.arange(1.0, 25).reshape(6, 4)
    found = reparametrised(StateDict({"m.weight_g": np.full(lengths, 2.0), "m.weight_v": v}))["m.weight"]
    axes = tuple(axis for axis, size in enumerate(lengths) if size == 1) if len(lengths) == 2 else (0, 1)
    np.testing.assert_allclose(found, 2 * v / np.sqrt((v * v).sum(axes, keepdims=True)), rtol=1e-12)
    assert type(found) is np.ndarray


def test_a_formula_beyond_memory_is_one_line():
    def formula(_):
        raise MemoryError

    plan = Plan(StateDict({"x": np.ones(3)}))
    plan.make("y", ("x",), (3,), formula)
    with pytest.raises(CheckpointError, match=r"^y cannot be computed \(so\): it takes more memory than there is$"):
        plan.view("so")["y"]


RESAMPLED = {
    "patches": ({"patch_embed.proj.weight": (1, 1, 72, 72)}, {}),
    "positions": ({"pos_embed": (1, 2, 20_000)}, {"img_size": 1024}),
    "a tower's positions": ({"visual.trunk.pos_embed": (1, 2, 20_000)}, {"img_size": 1024}),
    "patches of a window network": ({"patch_embed.proj.weight": (1, 1, 80, 80)}, {"embed_dim": 48}),
}
CONVERTED = """
import contextlib, json, sys
from pathlib import Path
from attnlens.checkpoints import open_checkpoint
from attnlens.checkpoints.converted import convert
from attnlens.errors import CheckpointError
from attnlens.models.bounded import check_conversion

def high_water():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024

name, arguments, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
with contextlib.suppress(CheckpointError):  # what is loaded is loaded
    convert(name, arguments, open_checkpoint(folder / "plain.safetensors"), check_conversion)
Path("/proc/self/clear_refs").write_text("5")
before = high_water()
try:
    convert(name, arguments, open_checkpoint(folder / "x.safetensors"), check_conversion)
except CheckpointError as error:
    print(str(error).count(chr(10)), "more memory" in str(error) or "it is not converted" in str(error))
print(high_water() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited and measured on Linux")
@pytest.mark.parametrize("kind", RESAMPLED)
def test_a_conversion_that_would_resample_to_much_is_not_done(kind, tmp_path):
    shapes, arguments = RESAMPLED[kind]
    name = "swin_tiny_patch4_window7_224" if "window" in kind else "vit_tiny_patch16_224"
    save_file({key: np.ones(shape, np.float32) for key, shape in shapes.items()}, tmp_path / "x.safetensors")
    save_file({"x": np.ones(3, np.float32)}, tmp_path / "plain.safetensors")
    size = (tmp_path / "x.safetensors").stat().st_size / 2**20
    script = [sys.executable, "-c", CONVERTED, name, json.dumps(arguments), tmp_path]
    done = subprocess.run(script, cwd=ROOT, check=True, capture_output=True, text=True)
    told, mib = done.stdout.splitlines()
    assert told == "0 True"
    assert float(mib) < 64 * size + 64


def test_a_jax_archive_that_would_be_resampled_to_much_is_not_read(tmp_path):
    arrays = {"embedding/kernel": np.ones((120, 120, 1, 1), np.float32), "embedding/bias": np.ones(192, np.float32)}
    np.savez(tmp_path / "x.npz", **arrays, cls=np.ones((1, 1, 192), np.float32))
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=r"more memory|it is not converted"):
        convert("vit_tiny_patch16_224", {}, open_checkpoint(tmp_path / "x.npz"), check_conversion)
    assert time.monotonic() - began < 60


def test_ordinary_resampling_is_done():
    state = {"patch_embed.proj.weight": np.ones((192, 3, 32, 32), np.float32), "pos_embed": np.ones((1, 50, 192), "f4")}
    found = convert("vit_tiny_patch16_224", {}, StateDict(state), check_conversion)
    assert (found.shape("patch_embed.proj.weight"), found.shape("pos_embed")) == ((192, 3, 16, 16), (1, 197, 192))


@pytest.mark.parametrize("name", ["epoch" + "1" * 200 + "!", "model" + "1.1" * 60 + "x!", "ckpt" + "-step" * 40 + "!"])
def test_the_name_of_a_file_is_looked_through_once(name, tmp_path):
    began = time.process_time()
    assert title_of(tmp_path / f"{name}.pth") == name
    assert title_of(tmp_path / "models" / "epoch12345678901234567890.pth") == "models-epoch12345678901234567890"
    assert time.process_time() - began < 1


def test_a_long_row_of_spaces_is_looked_through_once():
    began = time.process_time()
    for _ in range(50):
        assert one_line(f"a{' ' * 4000}b \n c").endswith("b c")
    assert time.process_time() - began < 1

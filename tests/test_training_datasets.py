"""Data sets: class folders and tars, their cache, unsafe archives, limits, splits; the command line around it all."""

import io
import json
import os
import sys
import tarfile
import types

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from attnlens.arguments import as_options
from attnlens.cli.app import app
from attnlens.errors import UsageError
from attnlens.training.data import image_files as images
from attnlens.training.data import sources as datasets
from attnlens.training.data.image_files import DatasetError
from attnlens.training.data.images import Images
from attnlens.training.data.sources import load_dataset
from tests.conftest import ROOT
from tests.training_setup import write_source


def picture(seed, size=6):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8))


def png(seed, size=6):
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Write 2 classes of 3 training and 2 test images."""
    root = tmp_path / "pets"
    for part, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            for number in range(count):
                path = root / part / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(100 * label + 10 * number + (part == "test")))
    return root


def archive(path, members):
    with tarfile.open(path, "w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, tarfile.TarInfo):
                file.addfile(content)
                continue
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def test_folders_and_tars_of_the_same_images_are_the_same_data(folder, tmp_path):
    members = {
        f"top/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in sorted(folder.rglob("*.png"))
    }
    packed = archive(tmp_path / "pets.tar.gz", dict(reversed(members.items())))
    unpacked, found = (load_dataset(str(path), cache=tmp_path / "cache") for path in (folder, packed))
    assert unpacked.name == found.name == "pets"
    assert unpacked.sha256() == found.sha256()
    assert found.classes == ("cat", "dog")
    assert found.train.shape == (6, 3, 6, 6)
    assert found.test_labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(found.train[4].transpose(1, 2, 0), np.asarray(picture(110)))


def test_decoded_images_come_from_the_cache_and_a_damaged_cache_is_made_again(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = load_dataset(str(folder), cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "decoded", None)
        assert load_dataset(str(folder), cache=cache).sha256() == first.sha256()
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 255
    file.write_bytes(content)
    assert load_dataset(str(folder), cache=cache).sha256() == first.sha256()
    (folder / "train" / "cat" / "0.png").write_bytes(png(999))  # another image: another key
    assert load_dataset(str(folder), cache=cache).sha256() != first.sha256()


def test_a_cache_that_cannot_be_written_costs_time_alone(folder, tmp_path):
    blocked = tmp_path / "cache"
    blocked.write_text("a file where the folder should be")
    assert load_dataset(str(folder), cache=blocked).train.shape == (6, 3, 6, 6)


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("../outside/cat/0.png", None),
        ("/etc/cat/0.png", None),
        ("train/cat/../../../0.png", None),
        ("train/cat/0.png", link("train/cat/0.png", "/etc/passwd", tarfile.SYMTYPE)),
        ("train/cat/1.png", link("train/cat/1.png", "/etc/passwd", tarfile.LNKTYPE)),
        ("train/cat/2.png", link("train/cat/2.png", "", tarfile.CHRTYPE)),
    ],
)
def test_archives_that_reach_outside_are_refused_and_nothing_is_written(tmp_path, name, member):
    packed = archive(tmp_path / "bad.tar.gz", {"train/dog/0.png": png(0), name: member or png(1)})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DatasetError, match=r"a path outside the archive|a link or device"):
        load_dataset(str(packed), cache=tmp_path / "cache")
    assert sorted(tmp_path.rglob("*")) == before


def test_huge_truncated_and_broken_members_are_refused(tmp_path, monkeypatch):
    packed = archive(tmp_path / "broken.tar.gz", {"train/cat/0.png": b"no image"})
    with pytest.raises(DatasetError, match=r"broken: train/cat/0.png is not an image"):
        load_dataset(str(packed), cache=tmp_path / "cache")
    whole = packed.read_bytes()
    (tmp_path / "half.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match="cannot be read as a tar"):
        load_dataset(str(tmp_path / "half.tar.gz"), cache=tmp_path / "cache")
    monkeypatch.setattr(images, "LARGEST_FILE", 10)
    packed = archive(tmp_path / "huge.tar.gz", {"train/cat/0.png": png(0)})
    with pytest.raises(DatasetError, match="that is no image"):
        load_dataset(str(packed), cache=tmp_path / "cache")


def test_the_share_of_the_commonest_class_is_told_where_classes_are_uneven(tmp_path):
    for name, sizes in (("uneven", (30, 10)), ("even", (20, 19))):
        for label, count in zip("ab", sizes, strict=True):
            (tmp_path / name / label).mkdir(parents=True)
            for number in range(count):
                (tmp_path / name / label / f"{number}.png").write_bytes(png(100 * ord(label) + number))
    found = load_dataset(str(tmp_path / "uneven"), cache=tmp_path / "cache")
    assert found.commonest() == pytest.approx(6 / 8)
    assert load_dataset(str(tmp_path / "even"), cache=tmp_path / "cache").commonest() is None
    assert load_dataset("digits").commonest() is None


def test_folders_without_a_test_part_hold_out_a_fifth_of_each_class(tmp_path):
    root = tmp_path / "flat"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for number in range(10):
            (root / name / f"{number}.png").write_bytes(png(100 * ord(name) + number))
    found = load_dataset(str(root), cache=tmp_path / "cache")
    assert np.bincount(found.train_labels).tolist() == [8, 8]
    assert np.bincount(found.test_labels).tolist() == [2, 2]
    train, test = ({array.tobytes() for array in part} for part in (found.train, found.test))
    assert not train & test


def test_images_of_several_sizes_need_a_size(tmp_path):
    root = tmp_path / "mixed"
    for name, size in (("a", 6), ("b", 9)):
        for number in range(5):
            path = root / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(number, size))
    with pytest.raises(UsageError, match="not all squares of one size: pass image_size"):
        load_dataset(str(root), cache=tmp_path / "cache")
    found = load_dataset(str(root), image_size=8, cache=tmp_path / "cache")
    assert found.train.shape == (8, 3, 8, 8)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "holds no images"),
        (["train/0.png", "test/cat/0.png"], "lies in no class folder"),
        (["cat/0.png", "cat/1.png"], "lies in no class folder|has one class"),
    ],
)
def test_folders_that_are_no_data_set_say_why(tmp_path, paths, message):
    root = tmp_path / "odd"
    root.mkdir()
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(png(0))
    with pytest.raises(DatasetError, match=message):
        load_dataset(str(root), cache=tmp_path / "cache")


def test_digits_are_scikit_learns(tmp_path):
    from sklearn.datasets import load_digits

    found = load_dataset("digits", cache=tmp_path)
    assert found.train.shape == (1000, 1, 8, 8)
    assert found.test.shape == (797, 1, 8, 8)
    pixels = np.concatenate([found.train, found.test])[:, 0]
    expected = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, pixels)) == sorted(map(bytes, expected))
    mean, std = found.moments()
    assert mean[0] == pytest.approx(found.train.mean() / 255)
    assert std[0] == pytest.approx(found.train.std() / 255)


def test_limits_balance_the_classes_and_nest():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 5)
    pixels = np.arange(85, dtype=np.uint8)[:, None, None, None]
    data = Images("x", pixels, labels, pixels, labels, ("a", "b", "c"))
    small, larger = data.limited(12, None), data.limited(24, None)
    assert np.bincount(small.train_labels).tolist() == [4, 4, 4]
    assert np.bincount(larger.train_labels)[2] == 5
    assert abs(np.diff(np.bincount(larger.train_labels)[:2]))[0] <= 1
    assert set(small.train.ravel()) <= set(larger.train.ravel())
    assert len(small.test) == 85


def test_the_tuning_split_takes_nothing_from_the_test_images():
    pixels = np.arange(100, dtype=np.uint8)[:, None, None, None]
    labels = np.arange(100) % 4
    tuning = Images("x", pixels[:90], labels[:90], pixels[90:], labels[90:], tuple("abcd")).tuning()
    assert len(tuning.train) == 81
    assert len(tuning.test) == 9
    assert set(tuning.train.ravel()) | set(tuning.test.ravel()) == set(range(90))


def cifar_files(root, *, spoil=False):
    """Write CIFAR-10's folder with few images, and torchvision's checksums to fit."""
    import hashlib
    import pickle

    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    sums = {}
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = {"data": rng.integers(0, 256, (4, 3072)).astype(np.uint8), "labels": [0, 1, 2, 9]}
        (base / name).write_bytes(pickle.dumps(data))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    for path in base.iterdir():
        sums[path.name] = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if spoil:
        (base / "data_batch_3").write_bytes(b"changed")
    return sums


@pytest.mark.parametrize("spoil", [False, True])
def test_cifar_goes_through_torchvisions_checksums(tmp_path, monkeypatch, spoil):
    from torchvision.datasets import CIFAR10

    sums = cifar_files(tmp_path, spoil=spoil)
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/nothing.tar.gz")  # a download would be refused at once
    if spoil:
        with pytest.raises(DatasetError, match=r"could not be downloaded .*put torchvision's files there"):
            load_dataset("cifar10", data_dir=tmp_path)
        return
    found = load_dataset("cifar10", data_dir=tmp_path)
    assert found.train.shape == (20, 3, 32, 32)
    assert found.test_labels.tolist() == [0, 1, 2, 9]
    direct = CIFAR10(str(tmp_path), train=True)
    np.testing.assert_array_equal(found.train[7].transpose(1, 2, 0), np.asarray(direct[7][0]))


def test_hfds_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match="hfds/some/thing needs the package datasets: pip install datasets"):
        load_dataset("hfds/some/thing")


def test_hfds_is_read_through_timm(monkeypatch):
    """timm's own reader, over a stand-in for the package `datasets`, which is not installed here."""

    places, size = {"a": 0, "b": 1}, types.SimpleNamespace(num_examples=6)
    labels = types.SimpleNamespace(names=["a", "b"], _str2int=places, str2int=places.get)

    class Rows(list):
        info = types.SimpleNamespace(
            features={"image": None, "label": labels}, splits=dict.fromkeys(("train", "test"), size)
        )

        def cast_column(self, _name, _kind):
            return self

    def loaded(_name, split=None, **_kwargs):
        if split not in ("train", "test"):
            raise ValueError(f"Unknown split {split}")
        first = 50 * (split == "test")
        return Rows({"image": {"bytes": png(first + i)}, "label": i % 2} for i in range(6))

    stub = types.ModuleType("datasets")
    stub.load_dataset, stub.Image = loaded, lambda decode: decode
    monkeypatch.setitem(sys.modules, "datasets", stub)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    found = load_dataset("hfds/some/thing")
    assert found.train.shape == (6, 3, 6, 6)
    assert found.test_labels.tolist() == [0, 1, 0, 1, 0, 1]
    np.testing.assert_array_equal(found.test[1].transpose(1, 2, 0), np.asarray(picture(51)))


def run_command(*arguments):
    return CliRunner().invoke(app, ["train-compare", *map(str, arguments)])


@pytest.fixture(scope="module")
def small_command(tmp_path_factory):
    source = write_source(tmp_path_factory.mktemp("source"))
    sizes = {"--patch-size": 4, "--train-images": 80, "--test-images": 40, "--batch-size": 20, "--epochs": 2}
    pairs = {"--model": source, "--seeds": 2, "--arms": "default,mimetic", "--device": "cpu", **sizes}
    return [str(part) for pair in pairs.items() for part in pair]


def test_the_command_prints_its_report_and_stops_on_its_budget(small_command, tmp_path):
    folder = tmp_path / "out"
    stopped = run_command(*small_command, "--output", folder, "--time-budget", 0)
    assert stopped.exit_code == 0
    assert "0 of 4 runs finished" in stopped.stdout
    assert "--resume" in stopped.stderr
    assert not list((folder / "runs").glob("*"))
    done = run_command(*small_command, "--output", folder, "--resume")
    assert done.exit_code == 0, done.stderr
    assert "4 of 4 runs finished" in done.stdout
    assert done.stdout.strip() == (folder / "report.md").read_text().strip()
    assert "default-0 accuracy" in done.stderr
    assert json.loads((folder / "summary.json").read_text())["complete"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", ","], "--arms is empty"),
        (["--contrasts", "mimetic"], "--contrasts mimetic is no pair: write ARM:OTHER"),
        (["--tune-lr", "fast"], "--tune-lr fast is no number"),
        (["--tune-lr", "-1"], "--tune-lr -1 is no learning rate"),
    ],
)
def test_the_command_refuses_what_it_cannot_read(small_command, tmp_path, arguments, message):
    found = run_command(*small_command, "--output", tmp_path / "out", *arguments)
    assert isinstance(found.exception, UsageError)
    with as_options():
        assert message in str(found.exception)


@pytest.fixture(scope="module")
def tiny_cifar(tmp_path_factory):
    """Pack the first twenty images of every class of cifar10-jpeg75, training and test."""
    folder = ROOT / os.environ.get("ATTNLENS_TEST_DATA", ROOT.parent / "shared" / "data")
    whole = folder / "cifar10-jpeg75.tar.xz"
    if not whole.is_file():
        pytest.skip("cifar10-jpeg75.tar.xz is neither in ../shared/data nor in ATTNLENS_TEST_DATA")
    with tarfile.open(whole) as file:
        members = {m.name: file.extractfile(m).read() for m in file if m.isfile() and m.name[-8:-4] < "0020"}
    return archive(tmp_path_factory.mktemp("cifar") / "cifar10-jpeg75.tar.gz", members)


def test_a_tiny_cifar_comparison_runs_over_every_arm(tiny_cifar, tmp_path):
    every = "default,mimetic,fitted,pretrained,norm-matched,norm-matched-mimetic,qk-only,ov-only,ov-positive"
    small = ["--seeds", 1, "--epochs", 1, "--train-images", 200, "--test-images", 100, "--batch-size", 50]
    found = run_command(
        *["--dataset", tiny_cifar, "--arms", f"{every},pretrained-attention", "--device", "cpu"],
        *[*small, "--output", tmp_path / "out"],
    )
    assert found.exit_code == 0, found.exception
    assert "10 of 10 runs finished" in found.stdout
    assert "cifar10-jpeg75: 200 training and 100 test images" in found.stdout


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("compressed", ["", "gz", "xz"])
@pytest.mark.parametrize("member", ["readme.txt", "train/cat/0.png"])
@pytest.mark.parametrize("size", [2**62, 2**40, 2**33])
def test_a_member_that_declares_more_than_there_is_ends_the_reading(size, member, compressed, kind, tmp_path):
    info = tarfile.TarInfo(member)
    info.size = size
    with tarfile.open(tmp_path / "images.tar", f"w:{compressed}", format=kind) as archive:
        archive.fileobj.write(info.tobuf(kind))
    with pytest.raises(DatasetError, match=r"cannot be read as a tar|that is no image"):
        load_dataset(str(tmp_path / "images.tar"), cache=tmp_path)

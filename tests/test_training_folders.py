"""Image folders as people have them: how classes, splits and pixels are read, and data that memory does not hold."""

import io
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from attnlens.errors import UsageError
from attnlens.training.data import reading, rows
from attnlens.training.data.decoding import pixels_of, quiet_pillow
from attnlens.training.data.folders import split_of
from attnlens.training.data.image_files import DatasetError
from attnlens.training.data.images import Images, ResidentImages
from attnlens.training.data.on_device import Chunked, SideBySide
from attnlens.training.data.rows import Picked, in_file
from attnlens.training.data.sources import load_dataset
from tests.training_setup import compare, config, small, write_source

SEVEN = np.random.default_rng(7).integers(0, 256, (7, 7, 3)).astype(np.uint8)


def encoded(image, kind="png", **how):
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def png(seed, size=7):
    return encoded(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8)))


def written(root, files):
    for number, (path, content) in enumerate(files.items()):
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(number) if content is None else content)
    return root


def names(template, classes, count):
    return [template.format(name=name, i=i) for name in classes for i in range(count)]


def decoded(content, size=None):
    with Image.open(io.BytesIO(content)) as image, warnings.catch_warnings():
        warnings.simplefilter("error")
        return pixels_of(image, size)


def test_the_class_is_the_first_folder_below_the_split_whatever_lies_below_it():
    paths = [f"{name}/{day}/{i}.png" for name in ("cat", "dog") for day in ("day1", "day2") for i in range(10)]
    found = split_of("pets", paths)
    assert found.classes == ("cat", "dog")
    assert len(found.train) == 32
    assert all(
        found.classes[label] == path.split("/")[0] for path, label in zip(found.test, found.test_labels, strict=True)
    )
    split = split_of(
        "pets", [f"train/{path}" for path in paths] + names("val/{name}/deep/er/{i}.png", ("dog", "cat"), 3)
    )
    assert split.classes == ("cat", "dog")
    assert split.tested == "val"
    assert split.test_labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("test", ["test", "val", "valid", "validation", "Test", "testing"])
@pytest.mark.parametrize("train", ["train", "training", "Train"])
def test_splits_are_known_by_the_names_people_give_them(train, test):
    found = split_of("x", names(train + "/{name}/{i}.png", "ab", 3) + names(test + "/{name}/{i}.png", "ab", 2))
    assert (len(found.train), len(found.test), found.tested) == (6, 4, test)


def test_of_several_test_folders_the_first_with_classes_is_taken_and_the_rest_counted():
    train, val = names("train/{name}/{i}.png", "ab", 3), names("val/{name}/{i}.png", "ab", 2)
    both = split_of("x", [*train, *val, *names("test/{name}/{i}.png", "ab", 1)])
    assert (both.tested, both.unused) == ("test", {"val": 4})
    flat = split_of("x", [*train, *val, "test/0.png", "test/1.png", "test/2.png", "extra/a/0.png"])
    assert (flat.tested, flat.unused) == ("val", {"test": 3, "extra": 1})


def test_a_train_folder_alone_is_cut_and_a_class_called_train_stays_one():
    alone = split_of("x", names("train/{name}/{i}.png", "ab", 10))
    assert (len(alone.train), len(alone.test), alone.classes) == (16, 4, ("a", "b"))
    vehicles = split_of("x", names("{name}/{i}.png", ("train", "car", "bus"), 5))
    assert vehicles.classes == ("bus", "car", "train")


def test_an_archives_own_folder_is_no_class_and_a_class_is_no_archives_folder():
    nested = names("cat/{name}/{i}.png", ("day1", "day2"), 5)
    with pytest.raises(
        DatasetError, match=r"x has one class, cat: .*If its subfolders are the classes, name that folder"
    ):
        split_of("x", nested)
    assert split_of("x", [f"top/{path}" for path in names("{name}/{i}.png", "ab", 5)], packed=True).classes == (
        "a",
        "b",
    )
    packed = split_of("x", [f"top/{path}" for path in names("train/{name}/{i}.png", "ab", 5)])
    assert packed.train[0] == "top/train/a/0.png" or packed.test[0] == "top/train/a/0.png"


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["a/0.png", "b/0.png"], "2 images of 2 classes, one each: none is left to test on"),
        (["val/a/0.png", "val/b/0.png"], "holds val/ and no train/: there is nothing to train on"),
        (
            names("train/{name}/{i}.png", "ab", 2) + names("test/{name}/{i}.png", "abcd", 2),
            "test/ holds the classes c, d, of which train/ holds no image: give both the same classes",
        ),
        (["train/a/0.png", "train/b/0.png", "test/0.png"], "test/0.png lies in no class folder"),
        (["train/0.png", "test/a/0.png"], "train/0.png lies in no class folder"),
        (["train/a/0.png", "train/b/0.png", "0.png"], "0.png lies in no class folder"),
    ],
)
def test_what_is_no_data_set_is_refused_in_one_line(paths, message):
    with pytest.raises(DatasetError, match=message) as refused:
        split_of("x", paths)
    assert "\n" not in str(refused.value)


def test_two_images_are_refused_before_anything_is_decoded(tmp_path):
    root = written(tmp_path / "two", dict.fromkeys(["a/0.png", "b/0.png"]))
    with pytest.raises(DatasetError, match="two holds 2 images of 2 classes, one each"):
        load_dataset(str(root), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_class_of_one_image_is_trained_on_and_a_class_without_test_images_is_named(tmp_path):
    root = written(tmp_path / "few", dict.fromkeys([*names("{name}/{i}.png", "a", 9), "rare/0.png"]))
    found = load_dataset(str(root), cache=tmp_path / "cache")
    assert (len(found.train), len(found.test)) == (8, 2)
    assert "no test image of rare" in found.note


RAMP = (np.arange(49, dtype=np.uint16) * 1365).reshape(7, 7)


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.fromarray(RAMP)),
        b"P5 7 7 65535\n" + RAMP.astype(">u2").tobytes(),
    ],
    ids=["png", "pgm"],
)
def test_16_bit_images_keep_their_range(content):
    found = decoded(content)
    assert len(np.unique(found)) == 49
    expected = np.round(RAMP / 257)
    for channel in found:
        np.testing.assert_array_equal(channel, expected)


def test_12_bit_images_of_a_format_that_says_so_fill_the_range():
    found = decoded(b"P5 7 7 4095\n" + (np.arange(49) * 85).astype(">u2").tobytes())
    np.testing.assert_allclose(found[0].ravel(), np.arange(49) * 85 * 255 / 4095, atol=0.51)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_held_otherwise_gives_the_same_picture(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.arange(5 * 3 * 3, dtype=np.uint8).reshape(5, 3, 3))
    content = encoded(stored, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content)))).transpose(2, 0, 1)
    np.testing.assert_array_equal(decoded(content), expected)
    assert (decoded(content).shape == (3, 5, 3)) == (orientation < 5)


def test_damaged_metadata_leaves_the_picture_as_it_is():
    whole = encoded(Image.fromarray(SEVEN), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    with Image.open(io.BytesIO(whole)) as image, quiet_pillow():
        np.testing.assert_array_equal(pixels_of(image, None), SEVEN.transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "P", "CMYK"])
def test_every_kind_of_colour_becomes_what_pillow_calls_rgb_without_a_warning(mode):
    image = Image.fromarray(SEVEN).convert(mode)
    how = {"transparency": bytes(range(256))} if mode == "P" else {}
    content = encoded(image, "jpeg" if mode == "CMYK" else "png", **how)
    expected = image.convert("RGB") if mode != "CMYK" else Image.open(io.BytesIO(content)).convert("RGB")
    np.testing.assert_array_equal(decoded(content), np.asarray(expected).transpose(2, 0, 1))


def test_values_of_unknown_range_are_refused():
    with pytest.raises(ValueError, match="32-bit values of unknown range: save it with 8 or 16 bits"):
        decoded(encoded(Image.fromarray(np.ones((7, 7), np.float32)), "tiff"))


@pytest.fixture
def odd(tmp_path):
    """Write two classes of ten images beside what people's folders hold otherwise."""
    frames = [Image.fromarray(np.full((7, 7, 3), value, np.uint8)) for value in (10, 200)]
    whole = png(99)
    others = {
        "a/.hidden.png": None,
        "a/._0.png": b"macOS",
        ".cache/a/0.png": None,
        "__MACOSX/a/0.png": b"",
        "b/cut.png": whole[: len(whole) // 2],
        "b/empty.jpg": b"",
        "b/moving.gif": encoded(frames[0], "gif", save_all=True, append_images=frames[1:]),
        "readme.txt": b"words",
        "a/Thumbs.db": b"",
    }
    return written(tmp_path / "odd", {**dict.fromkeys(names("{name}/{i}.png", "ab", 10)), **others})


def test_hidden_and_damaged_files_are_left_out_and_counted(odd, tmp_path):
    found = load_dataset(str(odd), cache=tmp_path / "cache")
    assert len(found.train) + len(found.test) == 21
    assert found.classes == ("a", "b")
    assert found.left_out == {"hidden": 4, "unreadable": 2}
    assert "left out: 4 hidden, 2 unreadable; the first unreadable one: b/cut.png (" in found.note
    assert "of 1 animated image (b/moving.gif, ...) the first frame" in found.note
    values = np.concatenate([found.train, found.test])
    assert (values == 10).all((1, 2, 3)).sum() == 1
    again = load_dataset(str(odd), cache=tmp_path / "cache")
    assert (again.note, again.left_out, again.sha256()) == (found.note, found.left_out, found.sha256())


def test_what_is_left_out_stands_in_configuration_and_report(odd, tmp_path):
    source = write_source(tmp_path)
    changes = {"dataset": str(odd), "image_size": 8, "train_images": None, "test_images": None, "batch_size": 4}
    found = compare(None, tmp_path / "out", options=small(source, epochs=1, seeds=1, arms=("default",), **changes))
    assert found.findings.config.left_out == {"hidden": 4, "unreadable": 2}
    assert "left out: 4 hidden, 2 unreadable" in found.report


@pytest.fixture
def little_memory(monkeypatch):
    """Let no data set fit in memory, and chunks hold three images of 7 x 7."""
    monkeypatch.setattr(rows, "free_memory", lambda: 1000)
    monkeypatch.setattr("attnlens.training.data.images.BLOCK", 3 * 3 * 49)
    monkeypatch.setattr(rows, "BLOCK", 3 * 3 * 49)


@pytest.fixture
def pets(tmp_path):
    return written(tmp_path / "pets", dict.fromkeys(names("{name}/{i}.png", ("cat", "dog"), 30)))


def test_images_that_memory_does_not_hold_stay_in_the_cache_and_are_the_same(pets, tmp_path, request):
    whole = load_dataset(str(pets), cache=tmp_path / "cache")
    assert not in_file(whole.train)
    request.getfixturevalue("little_memory")
    mapped = load_dataset(str(pets), cache=tmp_path / "cache")
    assert isinstance(mapped.train, np.memmap)
    assert mapped.sha256() == whole.sha256()
    assert mapped.moments() == whole.moments()
    few, expected = mapped.limited(11, 5), whole.limited(11, 5)
    assert isinstance(few.train, Picked)
    assert few.sha256() == expected.sha256()
    assert few.tuning().sha256() == expected.tuning().sha256()
    assert isinstance(few.tuning().train, Picked)
    fresh = load_dataset(str(pets), cache=tmp_path / "other")
    assert isinstance(fresh.train, np.memmap)
    assert fresh.sha256() == whole.sha256()


@pytest.mark.parametrize("augment", ["none", "flip-shift", "flip-randaugment"])
def test_an_epoch_made_in_chunks_is_the_epoch_made_at_once(pets, tmp_path, request, augment):
    settings = config(recipe={"augment": augment, "batch_size": 5}, mean=[0.3] * 3, std=[0.4] * 3)
    whole = ResidentImages(load_dataset(str(pets), cache=tmp_path / "cache"), settings, torch.device("cpu"))
    request.getfixturevalue("little_memory")
    parts = ResidentImages(load_dataset(str(pets), cache=tmp_path / "cache"), settings, torch.device("cpu"))
    for epoch in range(2):
        expected, found = whole.epoch(3, epoch), parts.epoch(3, epoch)
        assert isinstance(found.inputs, Chunked)
        assert found.stream == expected.stream
        both = SideBySide([found.inputs, found.inputs])
        for start in range(0, 45, 5):
            torch.testing.assert_close(
                both[:, start : start + 5][1], expected.inputs[start : start + 5], rtol=0, atol=0
            )
    torch.testing.assert_close(parts.test_inputs[None, 2:9], whole.test_inputs[None, 2:9], rtol=0, atol=0)


def test_a_comparison_read_from_disk_is_the_one_read_from_memory_bit_for_bit(tmp_path, request):
    root = written(tmp_path / "pets", {path: png(i, 8) for i, path in enumerate(names("{name}/{i}.png", "ab", 30))})
    source = write_source(tmp_path)
    changes = {"dataset": str(root), "train_images": None, "test_images": None, "batch_size": 8, "seeds": 1}
    options = small(source, **changes, augment="flip-randaugment", tune_lr=[1e-3, 2e-3])
    scores = []
    for folder, fixture in (("memory", None), ("disk", "little_memory")):
        if fixture:
            request.getfixturevalue(fixture)
        found = compare(None, tmp_path / folder, options=options, cache=tmp_path / "cache")
        scores.append((found.findings.curves, found.findings.config.sha256()))
    assert scores[0] == scores[1]


def test_memory_that_would_end_is_told_of_before_it_does(pets, tmp_path, monkeypatch):
    blocked = tmp_path / "cache"
    blocked.write_text("a file where the folder should be")
    monkeypatch.setattr(reading, "free_memory", lambda: 1000)
    with pytest.raises(
        DatasetError, match=r"take 0\.0 MB, 0\.0 MB of memory are free, and the cache cannot be written: set"
    ):
        load_dataset(str(pets), cache=blocked)


def test_a_full_disk_is_told_of_while_decoding(pets, tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, content):  # noqa: ARG002
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(rows.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(DatasetError, match=r"do not fit on the disk of the cache \(No space left on device after 0"):
        load_dataset(str(pets), cache=tmp_path / "cache")


def test_a_cache_with_a_member_beyond_its_end_is_made_again(pets, tmp_path, request):
    whole = load_dataset(str(pets), cache=tmp_path / "cache")
    request.getfixturevalue("little_memory")
    (file,) = (tmp_path / "cache").glob("*.npz")
    content = file.read_bytes()
    file.write_bytes(content.replace(b"'shape': (48,", b"'shape': (99,", 1))
    assert load_dataset(str(pets), cache=tmp_path / "cache").sha256() == whole.sha256()


def test_an_archive_that_holds_a_name_twice_gives_the_last_one(tmp_path):
    path = tmp_path / "twice.tar"
    with tarfile.open(path, "w") as file:
        for name, seed in [*((name, i) for i, name in enumerate(names("{name}/{i}.png", "ab", 5))), ("a/0.png", 77)]:
            content = png(seed)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    found = load_dataset(str(path), cache=tmp_path / "cache")
    every = {image.tobytes() for image in np.concatenate([found.train, found.test])}
    assert len(every) == 10
    assert decoded(png(77)).tobytes() in every
    assert decoded(png(0)).tobytes() not in every


def test_sizes_that_differ_are_refused_before_all_is_decoded(tmp_path):
    root = written(tmp_path / "mixed", {"a/0.png": png(0), "a/1.png": png(1, 5), "b/0.png": png(2), "b/1.png": png(3)})
    with pytest.raises(UsageError, match="not all squares of one size: pass image_size"):
        load_dataset(str(root), cache=tmp_path / "cache")


def test_images_need_no_notes_to_be_a_data_set():
    pixels, labels = np.zeros((4, 3, 7, 7), np.uint8), np.arange(4) % 2
    assert Images("x", pixels, labels, pixels, labels, ("a", "b")).left_out == {}

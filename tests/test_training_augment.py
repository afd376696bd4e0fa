"""Augmentation on the device against Pillow, operation by operation, and the streams it is drawn from."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment

from attnlens.training.data import randaugment
from attnlens.training.data.augment import augmented, draw_epoch, shifted
from attnlens.training.data.order import digest, epoch_order, generator

FILL = (10, 200, 77)
GOLDEN_ORDER = [8, 0, 3, 7, 6, 4, 1, 5, 2, 9]
GOLDEN_DIGEST = "ff0e521c49b6f80f"
TIMM = {
    "AutoContrast": "auto_contrast",
    "Equalize": "equalize",
    "Invert": "invert",
    "Rotate": "rotate",
    "Posterize": "posterize",
    "Solarize": "solarize",
    "SolarizeAdd": "solarize_add",
    "Color": "color",
    "Contrast": "contrast",
    "Brightness": "brightness",
    "Sharpness": "sharpness",
    "ShearX": "shear_x",
    "ShearY": "shear_y",
    "TranslateX": "translate_x_rel",
    "TranslateY": "translate_y_rel",
}


@pytest.fixture(scope="module")
def pictures():
    """Return images of 19 x 23 pixels: smooth ones, noise of a narrow range, and one of a single colour."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (30, 6, 6, 3)).astype(np.uint8)
    smooth = [np.asarray(Image.fromarray(picture).resize((23, 19), Image.Resampling.BICUBIC)) for picture in coarse]
    narrow = rng.integers(40, 90, (9, 19, 23, 3)).astype(np.uint8)
    return np.concatenate([np.stack(smooth), narrow, np.full((1, 19, 23, 3), 7, np.uint8)])


@pytest.mark.parametrize("name", randaugment.OPERATIONS)
def test_every_operation_equals_pillows_as_timm_calls_it(pictures, name):
    rng = np.random.default_rng(1)
    count = len(pictures)
    sign = np.where(rng.random(count) < 0.5, -1.0, 1.0)
    argument = randaugment.argument_of(name, rng.random(count), sign)
    ours = randaugment.apply(
        name,
        torch.from_numpy(pictures).permute(0, 3, 1, 2),
        torch.from_numpy(argument),
        torch.tensor(FILL, dtype=torch.uint8),
    )
    function = getattr(auto_augment, TIMM[name])
    how = {"resample": Image.Resampling.BILINEAR, "fillcolor": FILL} if name in randaugment.AFFINE else {}
    for picture, value, found in zip(pictures, argument, ours, strict=True):
        given = (int(value) if name in randaugment.POINTWISE else float(value),)
        if name in ("AutoContrast", "Equalize", "Invert"):
            given = ()
        expected = np.asarray(function(Image.fromarray(picture), *given, **how))
        np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("name", [name for name in randaugment.OPERATIONS if name not in ("Invert", "Equalize")])
def test_arguments_are_timms_at_every_level(name):
    timm_name = {"TranslateX": "TranslateXRel", "TranslateY": "TranslateYRel"}.get(name, name)
    if name in (*randaugment.BLEND, "Posterize", "Solarize"):
        timm_name += "Increasing"
    level_to_argument = auto_augment.LEVEL_TO_ARG[timm_name]
    if level_to_argument is None:
        assert randaugment.argument_of(name, np.array([0.7]), np.array([1.0])) == 0
        return
    for level in (0.0, 3.3, 8.6, 9.0, 10.0):
        allowed = {level_to_argument(level, {})[0] for _ in range(40)}  # timm draws the sign itself
        ours = {
            float(randaugment.argument_of(name, np.array([level / 10]), np.array([sign]))[0]) for sign in (-1.0, 1.0)
        }
        assert {round(value, 9) for value in ours} == {round(float(value), 9) for value in allowed}


def test_draws_follow_the_named_policy():
    draws = randaugment.draw(20_000, generator(3, 0, "augment"))
    applied = draws["operation"] >= 0
    assert abs(applied.mean() - 0.5) < 0.01
    shares = np.bincount(draws["operation"][applied], minlength=15) / applied.sum()
    assert np.abs(shares - 1 / 15).max() < 0.006
    rotations = draws["argument"][draws["operation"] == randaugment.OPERATIONS.index("Rotate")]
    assert abs(np.abs(rotations).mean() - 27) < 0.15  # 9 of 10 of 30 degrees
    assert abs(np.abs(rotations).std() - 1.5) < 0.15
    assert abs((rotations > 0).mean() - 0.5) < 0.05


def test_flips_are_pillows_mirror(pictures):
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    flip = np.arange(len(pictures)) % 2 == 0
    found = augmented(images, {"flip": flip}, torch.tensor(FILL, dtype=torch.uint8)).permute(0, 2, 3, 1).numpy()
    for picture, mirrored, ours in zip(pictures, flip, found, strict=True):
        expected = np.asarray(ImageOps.mirror(Image.fromarray(picture))) if mirrored else picture
        np.testing.assert_array_equal(ours, expected)


def test_shifts_move_the_image_and_fill_what_is_left(pictures):
    images = torch.from_numpy(pictures[:2]).permute(0, 3, 1, 2)
    found = shifted(images, torch.tensor([[2, -3], [-1, 4]]), torch.tensor(FILL, dtype=torch.uint8))
    for picture, (down, right), ours in zip(pictures, [(2, -1), (-3, 4)], found, strict=False):
        expected = Image.new("RGB", (23, 19), FILL)
        expected.paste(Image.fromarray(picture), (right, down))
        np.testing.assert_array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_whole_epochs_compose_layer_after_layer(pictures):
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    fill = torch.tensor(FILL, dtype=torch.uint8)
    draws = draw_epoch("flip-randaugment", 0, 0, len(pictures), 23)
    found = augmented(images, draws, fill)
    one = images[11:12].flip(-1) if draws["flip"][11] else images[11:12]
    for layer in range(2):
        index = draws["operation"][layer, 11]
        if index >= 0:
            argument = torch.tensor([draws["argument"][layer, 11]])
            one = randaugment.apply(randaugment.OPERATIONS[index], one, argument, fill)
    assert torch.equal(found[11:12], one)
    assert not torch.equal(found, images)


def test_streams_are_pure_functions_of_seed_epoch_and_purpose():
    first = epoch_order(3, 5, 103, 10)
    epoch_order(3, 6, 103, 10)
    np.random.default_rng().random(5)
    np.testing.assert_array_equal(first, epoch_order(3, 5, 103, 10))
    assert len(first) == 100
    assert len(set(first.tolist())) == 100
    for other in (epoch_order(4, 5, 103, 10), epoch_order(3, 6, 103, 10)):
        assert not np.array_equal(first, other)
    assert generator(3, 5, "order").random() != generator(3, 5, "augment").random()
    draws = draw_epoch("flip-shift", 3, 5, 100, 8)
    assert digest(first, draws) == digest(epoch_order(3, 5, 103, 10), draw_epoch("flip-shift", 3, 5, 100, 8))
    assert digest(first, draws) != digest(first, draw_epoch("flip-shift", 3, 6, 100, 8))


def test_streams_keep_their_numbers_across_versions():
    """Literal values: a library that changes them would silently unpair runs made before and after."""
    assert epoch_order(0, 0, 10, 5).tolist() == GOLDEN_ORDER
    assert digest(epoch_order(1, 2, 50, 10), draw_epoch("flip-randaugment", 1, 2, 50, 32)) == GOLDEN_DIGEST

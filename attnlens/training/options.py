"""What a comparison is told, and how that becomes a configuration: data, source, sizes, recipe, arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnlens.errors import UsageError
from attnlens.training.arms import CONTROLS, DEFAULT_ARMS, initial_state
from attnlens.training.config import AUGMENTATIONS, Augmentation, Config, Recipe, TextData, check_config, check_shape
from attnlens.training.data.images import Images, load_dataset
from attnlens.training.data.text import PREFIX, Text, load_text
from attnlens.training.families import build
from attnlens.training.presets import TEXT, chosen, eval_every, preset_of
from attnlens.training.shapes import AnyShape, ConvMixerShape, GptShape, Shape
from attnlens.training.source import Scratch, Source, is_scratch
from attnlens.training.starts import BASELINE, MATCHED, PRETRAINED, WIRINGS, start_of
from attnlens.training.store import stored_config

if TYPE_CHECKING:
    import torch

DEFAULT_LANGUAGE_MODEL = "gpt-tiny"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a comparison may be told; None takes the data set's preset (`presets`) or what the source model gives.

    Of a text, ``train_images`` are the windows an epoch draws and ``test_images`` those it is tested on.
    """

    dataset: str = "digits"
    data_dir: Path | None = None
    model: str | None = None
    checkpoint: Path | None = None
    params: Path | None = None
    arms: Sequence[str] | None = None
    contrasts: Sequence[tuple[str, str]] | None = None
    seeds: int = 6
    data_seed: int = 0
    init_seed: int = 0
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float = 0.05
    augment: Augmentation | None = None
    patch_size: int | None = None
    image_size: int | None = None
    context: int | None = None
    train_images: int | None = None
    test_images: int | None = None
    target: float | None = None
    eval_every: int | None = None
    tune_lr: Sequence[float] = ()
    tune_seeds: int = 2
    device: str = "auto"
    freeze_filters: bool = False
    stack: int | None = None
    compiled: bool | None = None


def load_data(options: Options, cache: Path | None) -> Images | Text:
    """Load what ``--dataset`` names. Raises `DatasetError`, `UsageError`."""
    if options.dataset.startswith(PREFIX):
        return load_text(options.dataset, data_dir=options.data_dir)
    found = load_dataset(options.dataset, data_dir=options.data_dir, image_size=options.image_size, cache=cache)
    return found.limited(options.train_images, options.test_images)


def find_source(options: Options) -> Source | Scratch:
    """Open the pre-trained model, or look up a network that has none, and check that it reads the data.

    Raises `UsageError` and what `Source.of` and `Scratch.of` raise.
    """
    text = options.dataset.startswith(PREFIX)
    name = options.model
    if text and name is None and options.checkpoint is None:
        name = DEFAULT_LANGUAGE_MODEL
    if not is_scratch(name):
        if text:
            raise UsageError(f"--dataset {options.dataset} is text: name a language model, as in --model gpt-tiny")
        return Source.of(name, options.checkpoint, options.params)
    assert name is not None
    if options.checkpoint is not None:
        raise UsageError(f"--checkpoint: {name} is trained from drawn weights alone. Leave one of the two out")
    found = Scratch.of(name, options.params)
    if text != found.reads_text:
        what = "bytes: name a text, as in --dataset text:FILE" if found.reads_text else "images: name another --dataset"
        raise UsageError(f"--model {name} reads {what}")
    return found


def settle(
    options: Options, data: Images | Text, source: Source | Scratch, device: torch.device, output: Path, *, resume: bool
) -> tuple[Config, Images | Text]:
    """Settle every choice; return the configuration, and the data cut to it. Raises `UsageError`."""
    for name in ("patch_size", "image_size", "augment"):
        if isinstance(data, Text) and getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is about images, and {data.name} is text: leave it out")
    if options.context is not None and not isinstance(data, Text):
        raise UsageError(f"--context is about text, and {data.name} holds images: leave it out")
    preset = TEXT if isinstance(data, Text) else preset_of(options.dataset, data.train.shape[-1])
    settled = chosen(preset._asdict(), {name: getattr(options, name) for name in preset._fields})
    shape = shape_of(source, data, settled)
    check_shape(shape, data.name)
    if isinstance(data, Text):
        assert isinstance(shape, GptShape)
        data = data.cut(shape.context, settled["train_images"], settled["test_images"])
        counts = settled["train_images"], len(data.test_starts(shape.context))
    else:
        counts = len(data.train), len(data.test)
    config = _config(options, data, counts, shape, settled, source, device)
    check_config(config)
    _check_arms(config, source)
    config = config.model_copy(update={"params_sha256": source.params_sha256(build(shape, 0))})
    if options.stack is None and device.type == "cuda":
        stored = (stored_config(output) or {}).get("stack") if resume else None
        from attnlens.training.stack_size import fastest_stack

        config = config.model_copy(update={"stack": stored or fastest_stack(config, device)})
    return config, data


def shape_of(source: Source | Scratch, data: Images | Text, settled: dict[str, Any]) -> AnyShape:
    """Return the network's sizes: widths and depth from the source, the rest from the data."""
    if isinstance(data, Text):
        assert isinstance(source, Scratch)
        return GptShape(**{**source.sizes, "context": settled["context"]})
    outside = {
        "image_size": data.train.shape[-1],
        "patch_size": settled["patch_size"],
        "channels": data.train.shape[1],
        "classes": len(data.classes),
    }
    if isinstance(source, Scratch):
        return ConvMixerShape(**outside, **source.sizes)
    return Shape(
        **outside,
        embed_dim=source.embed_dim,
        depth=source.depth,
        num_heads=source.num_heads,
        mlp_ratio=source.mlp_ratio,
    )


def _config(
    options: Options,
    data: Images | Text,
    counts: tuple[int, int],
    shape: AnyShape,
    settled: dict[str, Any],
    source: Source | Scratch,
    device: torch.device,
) -> Config:
    augment = settled.get("augment", "none")
    if augment not in AUGMENTATIONS:
        raise UsageError(f"--augment {augment} is not known: choose from {', '.join(AUGMENTATIONS)}")
    asked = options.arms
    if asked is None:
        asked = source.default_arms() if isinstance(source, Scratch) else DEFAULT_ARMS
    arms = list(dict.fromkeys(asked))
    starts = {arm: start_of(arm, source).describe() for arm in arms}
    if isinstance(shape, Shape):  # arms of the plain ViT need no words that its first comparisons did not have
        starts = {arm: start for arm, start in starts.items() if arm in WIRINGS}
    declared = options.contrasts if options.contrasts is not None else default_contrasts(arms, source)
    mean, std = data.moments() if isinstance(data, Images) else ([], [])
    cuda = device.type == "cuda"
    return Config(
        dataset=data.name,
        data_sha256=data.sha256(),
        train_images=counts[0],
        test_images=counts[1],
        mean=mean,
        std=std,
        source=source.record(),
        params_sha256="",
        shape=shape,
        recipe=Recipe(
            epochs=settled["epochs"],
            batch_size=settled["batch_size"],
            lr=settled["lr"],
            weight_decay=options.weight_decay,
            augment=augment,
        ),
        arms=arms,
        contrasts=list(declared),
        seeds=options.seeds,
        data_seed=options.data_seed,
        init_seed=options.init_seed,
        target=settled["target"],
        eval_every=options.eval_every or eval_every(settled["epochs"], *counts),
        lr_grid=sorted(set(options.tune_lr)),
        tune_seeds=options.tune_seeds,
        device="cuda" if cuda else "cpu",
        precision="bfloat16" if cuda else "float32",
        compiled=cuda if options.compiled is None else options.compiled,
        stack=options.stack or 1,
        text=_text_data(data) if isinstance(data, Text) else None,
        freeze_filters=options.freeze_filters,
        starts=starts,
    )


def _text_data(data: Text) -> TextData:
    return TextData(files=data.files, train_bytes=len(data.train), test_bytes=len(data.test), split=data.split)


def _check_arms(config: Config, source: Source | Scratch) -> None:
    """Let what cannot start fail now, not in an hour. Raises what building and initialising raise."""
    if config.freeze_filters:
        from attnlens.filters import filter_parameters

        if not filter_parameters(build(config.shape, 0)):
            raise UsageError("--freeze-filters: the network has no depthwise filters. Name another --model")
    risky = (PRETRAINED, "pretrained-attention", *WIRINGS)
    for arm in config.arms:
        if arm in risky or isinstance(source, Scratch):
            initial_state(arm, 0, config.shape, source)


def default_contrasts(arms: Sequence[str], source: Source | Scratch | None = None) -> list[tuple[str, str]]:
    """Return each arm against the default, and what has a control of its own scale against that."""
    found = [(arm, BASELINE) for arm in arms if arm != BASELINE and BASELINE in arms]
    controls = CONTROLS | ({source.scale()["of"]: MATCHED} if isinstance(source, Scratch) else {})
    found += [(arm, control) for arm, control in controls.items() if arm in arms and control in arms]
    if "mimetic" in arms and MATCHED in arms and CONTROLS["mimetic"] not in arms and ("mimetic", MATCHED) not in found:
        found.append(("mimetic", MATCHED))
    if {"mimetic", "mimetic-positive"} <= set(arms):
        found.append(("mimetic", "mimetic-positive"))
    return found
